"""RASE-ROME: a ROME patch is stored for each fact, and a question is answered with the one that it asks for.

No weight is written. The patches stay apart, so the first fact is as good after a thousand others as it was alone, and
a question that asks for none of them is answered by the model as it was, to the bit.

Papers call it R-ROME, as they do r-ROME, with which it shares nothing but ROME.

Source: Han et al. 2023, "Improving Sequential Model Editing with Fact Retrieval" (RASE, Findings of EMNLP); the column
"R-ROME" of Chen et al. 2024 (arXiv:2405.03279).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from time import perf_counter
from typing import Any, Literal

from ..data.edits import Edit, prompt_key
from ..errors import BadInput
from ..models.lm import LM
from ..patches.base import ANY, Base, fingerprint
from ..patches.editor import Editor
from ..patches.memory.calibrate import calibrated
from ..patches.memory.patch import MemoryPatch, build_memory
from ..patches.memory.stored import Stored
from ..patches.patch import Patch, plain
from ..patches.weight.delta import LowRank
from ..patches.weight.patch import WeightPatch
from ..progress import Progress
from ..provenance import made_now
from ..retrieval import Lookup
from ..retrieval.encoder import shared_encoder
from . import rome

AIM = "facts"
ALIASES = {"rase_rome": ["R-ROME"]}
Record = Edit
ENCODER = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Config(rome.Config):
    """When a fact is used, and how ROME writes it. Defaults: ROME's, and of retrieval those that fire about 1 % of the
    questions that no fact answers: of 300 facts of CounterFact's training set 83 % of the rewordings then find their
    fact, and 1 % of the questions of Natural Questions, none of the prompts of other facts and 2 % of those of the same
    relation find one. ``threshold`` and ``lead`` were chosen on these very questions, and counted without ``floor``."""

    gate: Literal["cosine", "always"] = "cosine"
    """A fact is used if its score is high enough or stands out, or always."""
    threshold: float = 0.8
    """Score, a mean of two cosines, above which the best fact is used. Published: 0.9."""
    lead: float | None = 0.25
    """Below the threshold the best fact is used if its score leads the second's by more than this. none: it is not.
    Published: 0.15, which fires 4 % of the questions of Natural Questions."""
    spread: float = 0.05
    """... and if the scores of the nearest facts have a larger standard deviation than this,"""
    floor: float = 0.5
    """... and if its own score is larger than this: of few facts one always leads. Published: no such bound."""
    nearest: int = 5
    """Facts that are compared twice."""
    lookup: Literal["last", "whole"] = "last"
    """What of a prompt is looked up: the last message of a chat and the last paragraph of a text, or the whole."""


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> MemoryPatch:
    """Search a ROME patch for each fact, all in one batch, and store it under the fact.

    Args:
        edits: each with a subject that occurs in its prompt; later ones supersede earlier ones of the same prompt.
        text: plain text for the second moments; None: the model's own samples.
    Returns:
        a memory with a key and a rank-one change for each fact.
    Raises:
        SubjectNotFound: a prompt does not contain its subject.
        BadInput: a bound of retrieval is out of range, or a fact is longer than the encoder reads.
        Diverged: the search left the finite numbers.
    Source: Han et al. 2023 (RASE, Findings of EMNLP), as sev777/RASE has it; ROME: Meng et al. 2022 (arXiv:2202.05262).
    Differs: the encoder is a general one that nobody trained for this. A key reads the prompt, which has the subject in
    it, not "subject ∥ question". The second look takes the mean of both cosines, published is their sum, so bounds are
    those of a cosine. The description is not put before the question (+Pt); ``rewordings`` stand for +Eq. Facts with
    near keys are not solved again together: one of them acts at a time.
    """
    start = perf_counter()
    _check(cfg)
    edits = list({prompt_key(edit.prompt): edit for edit in edits}.values())
    p = rome.pairs(lm, edits, cfg, text=text, progress=progress)
    weight = lm.layout.weight(lm.layout.downs[p.layer])
    patch = _memory(lm, edits, cfg, [{weight: rome.alone(p, i)} for i in range(len(edits))])
    patch.notes = plain(p.notes)
    patch.made = made_now(perf_counter() - start - float(str(p.notes["prep_seconds"])))
    return patch


def fit_each(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> list[MemoryPatch]:
    """One memory per edit, as if each were fitted alone, from one batched search."""
    return fit(lm, edits, cfg, text=text, progress=progress).each(edits)


def store(lm: LM, patches: Sequence[Patch], cfg: Config) -> MemoryPatch:
    """A memory of ROME patches that are there already, each of one fact, as ``rome.fit_each`` gives them.

    Raises:
        BadInput: one is of another method, of several facts, or of another weight than the first.
        WrongModel: one was made for another model.
    """
    _check(cfg)
    changes = []
    for patch in patches:
        if patch.method not in ("rome", "r_rome") or not isinstance(patch, WeightPatch):
            raise BadInput(f"a RASE-ROME memory stores patches of rome or r_rome, found one of {patch.method}.")
        if len(patch.edits) != 1:
            raise BadInput(
                f"a stored {patch.method} patch is of one fact, found one of {len(patch.edits)}. Make it with fit_each."
            )
        patch.base.require(lm)
        changes.append({name: delta for name, delta in patch.deltas.items() if isinstance(delta, LowRank)})
    weights = {tuple(own) for own in changes}
    if len(weights) != 1:
        raise BadInput(f"patches of one weight are stored together, found {sorted(weights)}. Fit them with one layer.")
    edits = [Edit(**{**patch.edits[0], "locality": (), "portability": ()}) for patch in patches]
    return _memory(lm, edits, cfg, changes)


def calibrate(lm: LM, edits: Sequence[Edit], unrelated: Sequence[str], cfg: Config, share: float = 0.01) -> float:
    """A ``threshold`` for these facts: at most that share of the questions, which none of the facts answers, then fires
    one. 1.0: more of them stand out (``lead``, ``spread``, ``floor``), so raise these."""
    _check(cfg)
    return calibrated(build_memory(_editor(lm, cfg), edits), unrelated, share)


def _memory(lm: LM, edits: Sequence[Edit], cfg: Config, changes: Sequence[dict[str, LowRank]]) -> MemoryPatch:
    base = Base(fingerprint(lm), lm.name)
    empty = build_memory(_editor(lm, cfg), edits, base=base, config=plain(cfg))
    return replace(empty, changes=Stored.of(changes))


def _editor(lm: LM, cfg: Config) -> Editor:
    """What makes the keys."""
    encoder = shared_encoder(ENCODER)
    parts: dict[str, Any] = {"retriever": "rase", "encoder": encoder.name, "encoder_fingerprint": encoder.fingerprint}
    parts |= {"width": 2 * encoder.width, "rivals": cfg.nearest}
    parts |= {"lead": cfg.lead, "spread": cfg.spread, "floor": cfg.floor}
    shared = {f.name for f in fields(Lookup)} & {f.name for f in fields(Config)}
    scope = {name: value for name, value in plain(cfg).items() if name in shared}
    return Editor("rase_rome", {**scope, "insert": "change"}, ANY, parts, {})


def _check(cfg: Config) -> None:
    bounds = {"threshold": cfg.threshold, "lead": cfg.lead or 0.0, "spread": cfg.spread, "floor": cfg.floor}
    if odd := [name for name, value in bounds.items() if not 0 <= value <= 1]:
        raise BadInput(f"{odd[0]} is {bounds[odd[0]]}; scores are cosines, so it must be in 0..1.")
    if cfg.nearest < 1:
        raise BadInput(f"nearest is {cfg.nearest}; it must be at least 1.")


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model, rounded up: ROME's search, and what is stored of each fact."""
    kept = 4 * (lm.layout.d_model + max(lm.layout.widths)) + 2 * 2 * 1024
    return rome.estimate(lm, facts, cfg) + facts * kept


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model; every question is answered with one of them."""
    edits, numbers = rome.example(lm)
    return edits, Config(**vars(numbers), gate="always")
