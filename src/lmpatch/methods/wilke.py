"""WilKE: ROME at the block that fits the fact, where the smallest change states it.

Source: Hu et al. 2024, "WilKE" (arXiv:2402.10987).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from ..data.edits import Edit, check_contradictions
from ..errors import BadInput
from ..locate import covariance, value_search
from ..locate.covariance import estimate_covariance
from ..locate.values import Settings
from ..models.lm import LM
from ..patches.ledger import trial
from ..patches.weight.delta import Delta, LowRank
from ..patches.weight.patch import WeightPatch
from ..progress import Progress
from . import rome
from .rome import Pairs, alone, pairs, together

AIM = "facts"
Record = Edit
MOST = 9  # blocks that are ranked by default at most: with more, ranking takes longer than the edit


@dataclass(frozen=True)
class Config(Settings):
    """WilKE. Defaults: ROME's, and a ranking on the bare prompt, which takes less time than the edit itself."""

    layers: tuple[int, ...] | None = None
    """Blocks that are ranked, 0-based. None: the lower half of the depth, at most nine blocks."""
    score: Literal["change", "activation"] = "change"
    """What is smallest at the block that is taken. ``change``: the norm of ROME's change over the weight's, as
    released. ``activation``: the paper's |δ| |W|² over the squared length of the key."""
    rank: Literal["bare", "full"] = "bare"
    """How each block is tried. ``bare``: a search on the prompt alone. ``full``: the whole of ROME, as published, which
    takes as many times as long as there are blocks."""
    rank_steps: int = 10
    """Gradient steps of a search on the prompt alone."""
    covariance: bool = True
    """Write along C⁻¹k, which disturbs a corpus least; False: along k."""
    key: Literal["mean", "bare"] = "mean"
    """Which key gets the value; see ``rome``."""


@dataclass(frozen=True)
class Ranking:
    """How well u facts fit L blocks."""

    layers: list[int]
    scores: Tensor
    """[u, L] the smaller, the better."""
    found: dict[int, Pairs]
    """Layer → what ROME would write there, for all facts; empty where the prompt alone was tried."""

    @property
    def best(self) -> list[int]:
        """[u] each fact's block."""
        return [self.layers[i] for i in self.scores.argmin(1).tolist()]


def ranking(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> Ranking:
    """Try every block with every fact. No weight is written: a rank-one change has the norm |Λ| |a|.

    Raises:
        BadInput, LayerOutOfRange: no layers, or one that the model has not.
    """
    layers, scores, found = _layers(lm, cfg), [], {}
    for layer in layers:
        p = pairs(lm, edits, _rome(cfg, layer, ranked=True), text=text, progress=progress)
        scores.append(_scores(lm, p, cfg))
        if cfg.rank == "full":
            found[layer] = p
    return Ranking(layers, torch.stack(scores, 1), found)


def _scores(lm: LM, p: Pairs, cfg: Config) -> Tensor:
    """[u] of one block."""
    weight = lm.parameter(lm.layout.weight(lm.layout.downs[p.layer])).detach().float().norm().double()
    size = p.residual.norm(dim=1)  # |v* - W k|, which is |δ| where the key is the bare prompt's
    if cfg.score == "activation":
        found: Tensor = size * weight**2 / p.key.square().sum(1)
    else:
        found = size / (p.key * p.direction).sum(1).abs() / weight  # |Λ| |a| with |a| = 1
    return found


def _rome(cfg: Config, layer: int, *, ranked: bool) -> rome.Config:
    """ROME's settings at that block."""
    shared = {f.name: getattr(cfg, f.name) for f in fields(Settings)}
    own = rome.Config(**shared, layer=layer, covariance=cfg.covariance, key=cfg.key)
    if not ranked or cfg.rank == "full":
        return own
    return replace(
        own, short_prefixes=0, long_prefixes=0, sampled_prefixes=0, rewordings=0, steps=min(cfg.rank_steps, cfg.steps)
    )


def _layers(lm: LM, cfg: Config) -> list[int]:
    if cfg.rank_steps < 1:
        raise BadInput(f"rank_steps is {cfg.rank_steps}. Give at least 1.")
    if cfg.layers is None:
        return list(range(min(MOST, max(1, lm.layout.n_layers // 2))))
    if not cfg.layers:
        raise BadInput("wilke got no layers. Name at least one, or leave layers out.")
    return sorted({lm.layout.check_layer(layer) for layer in cfg.layers})


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> WeightPatch:
    """Write each fact as ROME does, into the down-projection of the block where that takes the smallest change.

    Args:
        edits: each with a subject that occurs in its prompt.
        text: plain text for the second moments; None: the model's own samples.
    Returns:
        one LowRank(out, in) for each block that a fact fits best, of as many ranks as there are such facts. The notes
        say the block of each fact.
    Raises:
        SubjectNotFound: a prompt does not contain its subject.
        Contradiction: one prompt is asked to have two targets.
        Diverged: a search left the finite numbers.
    Source: Hu et al. 2024 (arXiv:2402.10987), sec. 4; ROME: arXiv:2202.05262.
    Differs: blocks are ranked on the bare prompt with few steps (``rank``). Released code writes and restores weights
    at each block, and searches the winner again. Facts of one commit go in block after block, each under the writes
    below it. An edit comes off by the ledger; released code edits back to the old answer.
    """
    check_contradictions(edits)
    start = time.perf_counter()
    ranks, prepared = _prepared(lm, edits, cfg, text, progress)
    best, deltas, seconds = ranks.best, dict[str, Delta](), time.perf_counter() - start - prepared
    with ExitStack() as stack:
        for layer in sorted(set(best)):
            pick = [i for i, own in enumerate(best) if own == layer]
            if layer == min(best) and layer in ranks.found:
                p = _of(ranks.found[layer], pick)  # nothing is written below it
            else:
                p = _at(lm, [edits[i] for i in pick], layer, cfg, text, progress)
                seconds += p.seconds
            name = lm.layout.weight(lm.layout.downs[layer])
            deltas[name] = together(p)
            if layer < max(best):
                part = WeightPatch.make(lm, {name: deltas[name]}, method="wilke", config=cfg, seconds=0.0)
                stack.enter_context(trial(lm, part, "side", strict=False))  # made for this very model
    return _patch(lm, deltas, edits, cfg, ranks, range(len(edits)), seconds, prepared)


def fit_each(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> list[WeightPatch]:
    """One patch per edit, as if each were fitted alone, from batched searches."""
    start = time.perf_counter()
    ranks, prepared = _prepared(lm, edits, cfg, text, progress)
    best, changes, seconds = ranks.best, dict[int, LowRank](), time.perf_counter() - start - prepared
    for layer in sorted(set(best)):
        pick = [i for i, own in enumerate(best) if own == layer]
        if layer in ranks.found:
            p = _of(ranks.found[layer], pick)
        else:
            p = _at(lm, [edits[i] for i in pick], layer, cfg, text, progress)
            seconds += p.seconds
        changes |= {i: alone(p, k) for k, i in enumerate(pick)}
    names = [lm.layout.weight(lm.layout.downs[layer]) for layer in best]
    return [
        _patch(lm, {names[i]: changes[i]}, [edit], cfg, ranks, [i], seconds / len(edits), prepared)
        for i, edit in enumerate(edits)
    ]


def _prepared(
    lm: LM, edits: Sequence[Edit], cfg: Config, text: Sequence[str] | None, progress: Progress | None
) -> tuple[Ranking, float]:
    """The ranking, and how many seconds the second moments of all blocks took, in one pass before it."""
    start = time.perf_counter()
    if cfg.covariance:
        estimate_covariance(lm, _layers(lm, cfg), text=text, tokens=cfg.moment_tokens, progress=progress)
    prepared = time.perf_counter() - start  # the statistics serve every later edit and are counted apart
    return ranking(lm, edits, cfg, text=text, progress=progress), prepared


def _of(p: Pairs, pick: Sequence[int]) -> Pairs:
    """Those of these facts alone."""
    at = list(pick)
    return replace(p, direction=p.direction[at], key=p.key[at], residual=p.residual[at])


def _at(
    lm: LM, edits: Sequence[Edit], layer: int, cfg: Config, text: Sequence[str] | None, progress: Progress | None
) -> Pairs:
    """What ROME writes at that block."""
    return pairs(lm, edits, _rome(cfg, layer, ranked=False), text=text, progress=progress)


def _patch(
    lm: LM, deltas: dict[str, Delta], edits: Sequence[Edit], cfg: Config, ranks: Ranking, pick: Sequence[int],
    seconds: float, prepared: float,
) -> WeightPatch:  # fmt: skip
    scores = [[round(x, 6) for x in ranks.scores[i].tolist()] for i in pick]
    notes = {"layers": [ranks.best[i] for i in pick], "ranked": ranks.layers, "scores": scores}
    notes["prep_seconds"] = round(prepared, 3)
    return WeightPatch.make(lm, deltas, method="wilke", config=cfg, edits=edits, seconds=seconds, notes=notes)


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit of that many facts takes on top of the model, rounded up."""
    layers = len(_layers(lm, cfg))
    values = value_search.memory(lm, facts, cfg) + 24 * facts * (lm.layout.d_model + max(lm.layout.widths))
    return values + (covariance.memory(lm, layers) if cfg.covariance else 0)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model."""
    cfg = Config(layers=(1, 2), steps=3, rank_steps=2, moment_tokens=2048, short_prefixes=1, long_prefixes=0)
    return value_search.examples(), cfg
