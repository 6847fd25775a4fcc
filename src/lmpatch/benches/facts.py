"""``facts``: do edits hold, in other words too, and does everything else stay as it was?

Answers are generated greedily and compared as text; nothing is taken from the wanted answer, not even its length.
Every run is scored beside the unpatched model and beside the fact simply written into the prompt. What is measured,
and how each number is defined, stands in docs/benches.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from ..data.edits import Ask, Edit, read_asks, read_edits
from ..errors import BadInput
from ..models.lm import LM
from ..patches.patch import Mount, Patch
from ..progress import Progress
from ..resources import require_memory
from . import _ask
from ._ask import Answers
from ._cases import Chunk, plan
from ._engine import Engine, MakeEach, Place, all_questions, protocol
from ._health import perplexity, working_memory
from ._record import identity, results
from ._report import Report, Run, combine, read_report
from ._rows import Metric, Row
from ._store import Store
from ._writer import Make, refuse_decode, refuse_patched

__all__ = [
    "Answers", "Config", "Estimate", "Metric", "Report", "Row", "Run",
    "baseline", "combine", "estimate", "load", "read_report", "run", "score", "with_unrelated",
]  # fmt: skip

BASELINES = ("none", "fact_in_prompt")


@dataclass(frozen=True)
class Config:
    """The facts bench. What each number means: docs/benches.md."""

    n: int = 1
    """Edits that are in the model together; after them it is restored."""
    commit_size: int | None = None
    """Edits written by one call of the method. None: all n."""
    chunks: int | None = None
    """Groups of n edits to run at most. None: as many as the data fills."""
    seed: int = 0
    """Order of the edits."""
    max_new_tokens: int = 32
    """Length of an answer at most; a new line ends it earlier."""
    em_rule: Literal["prefix", "full"] = "prefix"
    """An answer is right if it begins with an accepted spelling, or (full, for chat models) if it is one."""
    chat: bool = False
    """Ask through the tokenizer's chat template."""
    immediate: bool = True
    """Also score each edit right after its commit, where a chunk has several."""
    retention: bool = False
    """Follow a tenth of the edits while later ones are written."""
    teacher_forced: bool = True
    """Also the tf_ numbers of older papers. They are easier than the generated ones and stand apart."""
    per_kind: int = 5
    """Prompts of one kind a case may ask."""
    distractor: bool = True
    """Also ask one locality prompt of each case behind the edit sentence."""
    sample: int = 1000
    """Edits of a larger chunk that are scored."""
    raw: bool = False
    """No rules for colliding facts, to reproduce others' numbers."""
    health: bool = True
    """Perplexity of fixed text after each commit; a chunk stops at twice the base's."""
    latency: bool = True
    """Time a prompt and a token with and without the first chunk's patches."""
    fit_batch: int = 32
    """Independent single edits fitted in one call, by methods that can."""
    batch_size: int = 64
    """Prompts in one forward."""
    bootstrap: int = 1000
    """Resamples behind each interval."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take, fitting left out."""

    seconds: float
    bytes: int
    """Memory on top of the model."""
    prompts: int


def load(
    path: str | Path, *, limit: int | None = None, seed: int | None = None, unrelated: str | Path | None = None
) -> list[Edit]:
    """Facts from a file, see ``data.readers``.

    Args:
        unrelated: a file of questions; one of them joins each edit as locality kind ``unrelated``.
    """
    edits = read_edits(path, limit=limit, seed=seed)
    return edits if unrelated is None else with_unrelated(edits, read_asks(unrelated))


def with_unrelated(edits: Sequence[Edit], asks: Sequence[Ask]) -> list[Edit]:
    """The edits, each with one of the questions as locality kind ``unrelated``, in turn."""
    return [
        replace(edit, locality=(*edit.locality, ("unrelated", (asks[i % len(asks)],)))) for i, edit in enumerate(edits)
    ]


def baseline(lm: LM, edits: Sequence[Edit], cfg: Config | None = None) -> Answers:
    """What the unpatched model says to everything that ``score`` asks about these edits.

    Raises:
        BadInput: the model carries patches.
    """
    cfg = cfg or Config()
    refuse_patched(lm)
    return _ask.ask_base(lm, _one_chunk(edits, cfg).questions, protocol(cfg), None)


def score(lm: LM, edits: Sequence[Edit], cfg: Config | None = None, *, base: Answers | None = None) -> list[Row]:
    """Score the model as it is now on these edits, whether or not they are in it.

    Args:
        base: ``baseline`` of the same edits and settings; None takes it now, from a model without patches.
    Returns:
        one row per prompt.
    Raises:
        BadInput: no ``base``, and the model carries patches.
    """
    cfg = cfg or Config()
    base = base or baseline(lm, edits, cfg)
    chunk, how = _one_chunk(edits, cfg), protocol(cfg)
    made = _ask.rows(lm, chunk.questions, base, _ask.ask(lm, chunk.questions, how), how)
    return Place("score", chunk, written=len(edits)).rows(made, chunk.questions, "final")


def estimate(lm: LM, edits: Sequence[Edit], cfg: Config | None = None) -> Estimate:
    """Time a few prompts and tell what ``run`` will take.

    Raises:
        NotEnoughMemory: more than is free.
    """
    cfg = cfg or Config()
    chunks, _ = _plan(edits, cfg)
    questions = [q for chunk in chunks for q in chunk.questions if not q.flag]
    prompts = list(dict.fromkeys(q.text for q in questions))
    need = _need(lm, prompts, cfg)
    sample = questions[:: max(1, len(questions) // 16)][:16]
    start = perf_counter()
    _ask.ask(lm, sample, protocol(cfg))
    each = (perf_counter() - start) / len({q.text for q in sample})
    moments = 3 + (cfg.immediate and _commit_size(cfg) < cfg.n)  # unpatched, fact in prompt, patched
    health = perf_counter()
    if cfg.health:
        perplexity(lm)
    commits = sum(len(chunk.commits) for chunk in chunks) * (perf_counter() - health)
    return Estimate(each * len(prompts) * moments + commits, need, len(prompts) * moments)


def run(
    lm: LM,
    edits: Sequence[Edit],
    cfg: Config | None = None,
    *,
    make: Make | None = None,
    make_each: MakeEach | None = None,
    patch: Patch | None = None,
    mount: Mount | None = None,
    settings: Mapping[str, Any] | None = None,
    prep: Mapping[str, Any] | None = None,
    run_id: str = "",
    data_name: str = "",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write edits chunk by chunk, score each chunk with all its edits in place, restore the model.

    With ``patch``, that patch is scored on all ``edits`` as one chunk. With none of the three, only the baselines are.

    Args:
        make: makes the patch of one commit; called with the model carrying the chunk's earlier commits.
        make_each: makes one patch per edit, as if each were fitted alone; used in place of ``make`` when n is 1.
        settings: of the method, for the record; a run is resumed only under equal ones.
        prep: what was spent before the first edit, for the record: seconds, data.
        run_id: the name in tables; empty: the patch's method.
        out: folder for rows and records. A run that is there already goes on where it stopped.
    Raises:
        BadInput: the model carries patches, ``patch`` is a decode patch, too few edits, or the folder holds something
            else.
        NotEnoughMemory: scoring would need more than is free.
        ForeignWrite: the model did not come back as it was.
    """
    if patch is not None and (make or make_each):
        raise BadInput("give either a patch or a function that makes patches, not both.")
    cfg = cfg or Config()
    if patch is not None:
        cfg = replace(cfg, n=len(edits), commit_size=None, chunks=None)
        settings = {"patch": patch.hash(), **(settings or {})}
    if make_each and not make and cfg.n > 1:
        raise BadInput(f"make_each fits single edits, and n is {cfg.n}. Give make as well.")
    refuse_patched(lm)
    refuse_decode(patch)
    chunks, left = _plan(edits, cfg, shuffle=patch is None)
    questions = [q for chunk in chunks for q in all_questions(chunk)]
    _need(lm, [q.text for q in questions if not q.flag], cfg)
    store = Store(Path(out) if out is not None else None, Row.read)
    who = identity(
        lm, edits, cfg, mount=mount, settings=settings, prep=prep, data_name=data_name, planned=len(chunks), left=left
    )
    name = run_id or (patch.method if patch else "patched")
    names = (*BASELINES, name) if patch or make or make_each else BASELINES
    for each in names:
        store.open_run(who.of(each, baseline=each in BASELINES))
    base = _ask.ask_base(lm, questions, protocol(cfg), store.folder, progress)
    engine = Engine(lm, cfg, mount, store, base, len(chunks), progress)
    engine.baselines(chunks)
    if patch is not None:
        engine.patch(name, chunks[0], patch)
    elif make_each and cfg.n == 1:
        engine.singles(name, chunks, make_each)
    elif make:
        engine.commits(name, chunks, make)
    for each in names:
        done = Run(store.runs[each], store.rows_of(each), store.chunks_of(each))
        store.put_run(done.record | results(lm, done))
    return Report.of(store)


def _plan(edits: Sequence[Edit], cfg: Config, shuffle: bool = True) -> tuple[list[Chunk], int]:
    if cfg.n < 1 or _commit_size(cfg) < 1:
        raise BadInput(f"n is {cfg.n} and commit_size {cfg.commit_size}; both must be 1 or more.")
    return plan(
        edits,
        n=cfg.n,
        commit_size=_commit_size(cfg),
        seed=cfg.seed if shuffle else None,
        chunks=cfg.chunks,
        per_kind=cfg.per_kind,
        distractor=cfg.distractor,
        sample=cfg.sample,
        raw=cfg.raw,
    )


def _one_chunk(edits: Sequence[Edit], cfg: Config) -> Chunk:
    whole = replace(cfg, n=len(edits), commit_size=None, chunks=None)
    return _plan(edits, whole, shuffle=False)[0][0]


def _commit_size(cfg: Config) -> int:
    return cfg.n if cfg.commit_size is None else cfg.commit_size


def _need(lm: LM, prompts: list[str], cfg: Config) -> int:
    need = working_memory(lm, prompts, cfg.max_new_tokens, cfg.batch_size)
    require_memory(need, lm.device, "scoring")
    return need
