"""What ROME and r-ROME share: the search, the direction, and the exact insertion of one or many facts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.edit import Edit, check_contradictions
from ..inference.forward import frozen
from ..locate import covariance as _moments
from ..locate import value_search as _value
from ..locate.covariance import second_moments
from ..locate.solve import factor, solve
from ..locate.value_search import search
from ..models.lm import LM
from ..patches.weight.delta import LowRank
from ..patches.weight.patch import WeightPatch
from ..progress import Progress

if TYPE_CHECKING:
    from .r_rome import Config as RConfig
    from .rome import Config

DEPTH = 0.3  # default layer as a share of the depth
DEPTH_BEFORE_NORM = 1 / 18  # the same where a norm follows the MLP, from the sweep in benchmarks/results/layers.json


@dataclass(frozen=True)
class Pairs:
    """For u facts: which direction to write along, which key must give which value."""

    layer: int
    direction: Tensor
    """[u, f] unit length, fp64."""
    key: Tensor
    """[u, f] fp64."""
    residual: Tensor
    """[u, d] v* - W k, fp64."""
    notes: dict[str, object]
    seconds: float
    """What the facts took, the second moments left out."""


def pairs(
    lm: LM,
    edits: Sequence[Edit],
    cfg: Config | RConfig,
    *,
    mean_key: bool,
    anchor_mean: bool = False,
    text: Sequence[str] | None,
    progress: Progress | None,
) -> Pairs:
    """Search the values and read the keys; nothing is written.

    Args:
        mean_key: insert at the mean key over prefixes (r-ROME); otherwise at the bare prompt's key (ROME).
        anchor_mean: count δ from the mean key's output instead of the bare prompt's.
    """
    layout = lm.layout
    share = DEPTH_BEFORE_NORM if layout.post_norm else DEPTH
    layer = layout.check_layer(round(share * layout.n_layers) if cfg.layer is None else cfg.layer)
    notes: dict[str, object] = {"layer": layer, "covariance": cfg.covariance}
    start, moments = time.perf_counter(), None
    if cfg.covariance:
        tokens = cfg.moment_tokens or 10 * layout.widths[layer]
        moments = second_moments(lm, [layer], text=text, tokens=tokens, progress=progress)
        notes |= {"moments": moments.source, "moment_tokens": moments.tokens, "moment_agreement": moments.agreement}
    prepared = time.perf_counter()
    with frozen(lm):
        values = search(lm, edits, [layer], cfg, progress=progress)
        keys = values.keys[layer].double()  # [u, J, f]
        mean = keys.mean(1)
        key = mean if mean_key else keys[:, 0]
        with torch.no_grad():
            output = lm.module(layout.downs[layer])(key.to(lm.dtype)).double()  # [u, d]
    target = (output if anchor_mean else values.clean[:, 0].double()) + values.delta[:, 0].double()
    direction = mean if moments is None else solve(factor(moments.c[layer].to(mean.device)), mean.T).T
    direction = direction / direction.norm(dim=1, keepdim=True)
    notes |= {"steps": values.steps, "loss": [round(x, 4) for x in values.loss]}
    notes["prep_seconds"] = round(prepared - start, 3)  # the statistics serve every later edit
    return Pairs(layer, direction, key, target - output, notes, time.perf_counter() - prepared)


def memory(lm: LM, facts: int, cfg: Config | RConfig) -> int:
    """Bytes a fit takes on top of the model."""
    values = _value.memory(lm, facts, cfg) + 12 * facts * (lm.layout.d_model + max(lm.layout.widths))
    return values + (_moments.memory(lm, 1) if cfg.covariance else 0)


def together(p: Pairs) -> LowRank:
    """One change that gives every key its value: Λ = R (AᵀK)⁻¹, rank u; for one fact it is ROME's rank one.

    Facts about one subject in the same words share their key, which no weight can send to two values; the
    pseudo-inverse then writes their average.
    """
    gram = p.direction @ p.key.T  # [u, u] a_i · k_j
    b = p.residual.T @ torch.linalg.pinv(gram, rtol=1e-4)  # [d, u]
    return LowRank(b.float(), p.direction.float())


def one(p: Pairs, i: int) -> LowRank:
    """The rank-one change of fact i alone."""
    gain = p.residual[i] / (p.key[i] @ p.direction[i])  # [d]
    return LowRank(gain[:, None].float(), p.direction[i : i + 1].float())


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config | RConfig, method: str, *, text: Sequence[str] | None,
    progress: Progress | None, each: bool, mean_key: bool, anchor_mean: bool = False,
) -> list[WeightPatch]:  # fmt: skip
    """One patch for all edits, or (``each``) one patch an edit from one batched search."""
    if not each:
        check_contradictions(edits)
    p = pairs(lm, edits, cfg, mean_key=mean_key, anchor_mean=anchor_mean, text=text, progress=progress)
    weight = lm.layout.weight(lm.layout.downs[p.layer])
    groups = [([e], one(p, i)) for i, e in enumerate(edits)] if each else [(list(edits), together(p))]
    seconds = p.seconds / len(groups)
    return [
        WeightPatch.make(lm, {weight: delta}, method=method, config=cfg, edits=group, seconds=seconds, notes=p.notes)
        for group, delta in groups
    ]
