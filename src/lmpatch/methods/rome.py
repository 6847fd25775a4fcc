"""ROME: write a fact into one down-projection as a rank-one change.

Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (arXiv:2202.05262); r-ROME: Gupta et al.
2024, "Rebuilding ROME" (arXiv:2403.07175).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..data.edits import Edit, check_contradictions
from ..inference.forward import frozen
from ..locate import covariance, value_search
from ..locate.covariance import cholesky, estimate_covariance
from ..locate.solve import solve
from ..locate.values import Settings
from ..models.lm import LM
from ..patches.weight.delta import LowRank
from ..patches.weight.patch import WeightPatch
from ..progress import Progress

AIM = "facts"
ENTRIES = {
    "rome": "ROME: write a fact into one down-projection as a rank-one change.",
    "r_rome": "r-ROME: ROME with one key throughout, which prevents single edits that disable the model.",
}
ALIASES = {"rome": ["R-ROME"], "r_rome": ["R-ROME"]}  # whose default key is r-ROME's
Record = Edit
DEPTH = 0.3  # default layer as a share of the depth
DEPTH_BEFORE_NORM = 1 / 18  # the same where a norm follows the MLP, from the sweep in benchmarks/results/layers.json


@dataclass(frozen=True)
class Config(Settings):
    """ROME. Defaults: the paper's, but for the learning rate, which is relative here, and the layer."""

    layer: int | None = None
    """Block whose down-projection is written, 0-based. None: 0.3 of the depth; where a norm follows the MLP (Gemma 2
    and 3), an eighteenth of it, block 1 of Gemma-3-270M."""
    covariance: bool = True
    """Write along C⁻¹k, which disturbs a corpus least; False: along k."""
    key: Literal["mean", "bare"] = "mean"
    """Which key gets the value: the mean over all texts, from which the direction comes, too (r-ROME); or the bare
    prompt's, as released. Where the two differ much, the released form can disable the model. ``faithful``: bare."""


@dataclass(frozen=True)
class RConfig(Config):
    """r-ROME. ROME's numbers and one choice; its key is the mean, whatever ``key`` says."""

    anchor: Literal["clean", "mean"] = "clean"
    """What δ is counted from: the bare prompt's value as released, or the mean key's output."""


@dataclass(frozen=True)
class Pairs:
    """For u facts: which direction to write along, which key must give which value."""

    layer: int
    direction: Tensor
    """[u, f] unit length, fp64."""
    key: Tensor
    """[u, f] fp64: the mean over all texts, or the bare prompt's."""
    residual: Tensor
    """[u, d] v* - W k, fp64."""
    notes: dict[str, object]
    seconds: float
    """What the facts took, the second moments left out."""


def pairs(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> Pairs:
    """Search the values and read the keys; nothing is written."""
    layout = lm.layout
    share = DEPTH_BEFORE_NORM if layout.post_norm else DEPTH
    layer = layout.check_layer(round(share * layout.n_layers) if cfg.layer is None else cfg.layer)
    notes: dict[str, object] = {"layer": layer, "covariance": cfg.covariance}
    start, moments = time.perf_counter(), None
    if cfg.covariance:
        moments = estimate_covariance(lm, [layer], text=text, tokens=cfg.moment_tokens, progress=progress)
        notes |= {"moments": moments.source, "moment_tokens": moments.tokens, "moment_agreement": moments.agreement}
    prepared = time.perf_counter()  # the statistics serve every later edit and are counted apart
    with frozen(lm):
        values = value_search.search(lm, edits, [layer], cfg, progress=progress)
        keys = values.keys[layer].double()  # [u, J, f]
        mean = keys.mean(1)
        key = mean if isinstance(cfg, RConfig) or (cfg.key == "mean" and not cfg.faithful) else keys[:, 0]
        with torch.no_grad():
            output = lm.module(layout.downs[layer])(key.to(lm.dtype)).double()  # [u, d]
    anchor = output if isinstance(cfg, RConfig) and cfg.anchor == "mean" else values.clean[:, 0].double()
    residual = anchor + values.delta[:, 0].double() - output
    direction = mean if moments is None else solve(cholesky(moments, layer, mean.device), mean.T).T
    direction = direction / direction.norm(dim=1, keepdim=True)
    notes |= {"steps": values.steps, "loss": [round(x, 4) for x in values.loss]}
    notes["prep_seconds"] = round(prepared - start, 3)
    if cfg.rewordings:
        notes["reworded"] = list(values.reworded)
    return Pairs(layer, direction, key, residual, notes, time.perf_counter() - prepared)


def together(p: Pairs) -> LowRank:
    """One change that gives every key its value: Λ = R (AᵀK)⁻¹, rank u; for one fact it is ROME's rank one.

    Facts about one subject in the same words share their key, which no weight can send to two values; the
    pseudo-inverse then writes their average.
    """
    gram = p.direction @ p.key.T  # [u, u] a_i · k_j
    b = p.residual.T @ torch.linalg.pinv(gram, rtol=1e-4)  # [d, u]
    return LowRank(b.float(), p.direction.float())


def alone(p: Pairs, i: int) -> LowRank:
    """The rank-one change of fact i alone."""
    gain = p.residual[i] / (p.key[i] @ p.direction[i])  # [d]
    return LowRank(gain[:, None].float(), p.direction[i : i + 1].float())


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> WeightPatch:
    """Write each fact into one block's down-projection: ROME, or with a ``RConfig`` r-ROME.

    Args:
        edits: each with a subject that occurs in its prompt.
        text: plain text for the second moments; None: the model's own samples.
    Returns:
        one LowRank(out, in) of rank len(edits) on that weight.
    Raises:
        SubjectNotFound: a prompt does not contain its subject.
        Contradiction: one prompt is asked to have two targets.
        Diverged: the search left the finite numbers.
    Source: Meng et al. 2022 (arXiv:2202.05262), sec. 3.1; r-ROME: Gupta et al. 2024 (arXiv:2403.07175), sec. 3.
    Differs: prefixes are fixed texts, so a run repeats. One key throughout, as in r-ROME (``key``). Several facts are
    inserted together and exactly (Λ = R (AᵀK)⁻¹, the equality-constrained form of Gupta et al. 2024,
    arXiv:2403.14236); one fact is ROME.
    """
    check_contradictions(edits)
    p = pairs(lm, edits, cfg, text=text, progress=progress)
    return _patch(lm, p, together(p), edits, cfg, p.seconds)


def fit_each(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> list[WeightPatch]:
    """One patch per edit, as if each were fitted alone, from one batched search."""
    p = pairs(lm, edits, cfg, text=text, progress=progress)
    return [_patch(lm, p, alone(p, i), [e], cfg, p.seconds / len(edits)) for i, e in enumerate(edits)]


def _patch(lm: LM, p: Pairs, delta: LowRank, edits: Sequence[Edit], cfg: Config, seconds: float) -> WeightPatch:
    weight, method = lm.layout.weight(lm.layout.downs[p.layer]), "r_rome" if isinstance(cfg, RConfig) else "rome"
    return WeightPatch.make(lm, {weight: delta}, method=method, config=cfg, edits=edits, seconds=seconds, notes=p.notes)


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit of that many facts takes on top of the model, rounded up."""
    values = value_search.memory(lm, facts, cfg) + 12 * facts * (lm.layout.d_model + max(lm.layout.widths))
    return values + (covariance.memory(lm, 1) if cfg.covariance else 0)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model."""
    return value_search.examples(), Config(layer=1, steps=3, moment_tokens=2048, short_prefixes=1, long_prefixes=0)


class RRome:
    """r-ROME: ROME with one key throughout, which ends the edits that disable a model.

    ROME finds its direction from the mean key over prefixes but divides by the bare prompt's; when the two differ the
    change can be large enough to disable the model. Here the mean key is used in both places.

    Not "R-ROME": that name is also used for RASE-ROME, a retriever over ROME patches.

    Source: Gupta et al. 2024 (arXiv:2403.07175), sec. 3.
    Differs: as ``rome``.
    """

    Record = Edit
    Config = RConfig
    fit, fit_each, estimate = staticmethod(fit), staticmethod(fit_each), staticmethod(estimate)

    @staticmethod
    def example(lm: LM) -> tuple[list[Edit], RConfig]:
        """Edits and settings that run in milliseconds on a tiny model."""
        edits, numbers = example(lm)
        return edits, RConfig(**vars(numbers))


r_rome = RRome()


def entry(name: str) -> RRome:
    """The method of that name; ROME itself is this module."""
    return {"r_rome": r_rome}[name]
