"""ROME: write a fact into one down-projection as a rank-one change.

Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (arXiv:2202.05262); r-ROME: Gupta et al.
2024, "Rebuilding ROME" (arXiv:2403.07175).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..data.edits import Edit, check_contradictions
from ..inference.forward import frozen
from ..locate import covariance, value_search
from ..locate.covariance import estimate_covariance
from ..locate.factors import cholesky
from ..locate.solve import solve
from ..locate.value_search import search
from ..models.lm import LM
from ..patches.weight.delta import LowRank
from ..patches.weight.patch import WeightPatch
from ..progress import Progress

AIM = "facts"
ENTRIES = {
    "rome": "ROME: write a fact into one down-projection as a rank-one change.",
    "r_rome": "r-ROME: ROME with one key throughout, which prevents single edits that disable the model.",
}
Record = Edit
DEPTH = 0.3  # default layer as a share of the depth
DEPTH_BEFORE_NORM = 1 / 18  # the same where a norm follows the MLP, from the sweep in benchmarks/results/layers.json


@dataclass(frozen=True)
class Config:
    """ROME. Defaults: the paper's, but for the learning rate, which is relative here, and the layer."""

    layer: int | None = None
    """Block whose down-projection is written, 0-based. None: 0.3 of the depth; where a norm follows the MLP (Gemma 2
    and 3), an eighteenth of it, block 1 of Gemma-3-270M."""
    steps: int = 20
    """Gradient steps that search the value vector."""
    lr: float = 0.3
    """Adam's step per entry of the value, in units of the value's RMS. At 0.03 the search of 20 steps ends half way
    on Gemma-3-270M (docs/log.md)."""
    kl: float = 0.0625
    """Weight of KL(p_δ || p_0) at the end of "{subject} is a"."""
    decay: float = 0.0
    """Weight of |δ|²/|v|². The paper has 0.5; behind a norm, where only directions count, it does harm."""
    clamp: float = 4.0
    """|δ| stays below this many |v|."""
    stop: float = 0.05
    """The search of a fact ends at this loss, nats."""
    covariance: bool = True
    """Write along C⁻¹k, which disturbs a corpus least; False: along k."""
    moment_tokens: int | None = None
    """Keys in the estimate of C at most. None: 10 times d_ff."""
    short_prefixes: int = 5
    """Fixed prefixes of about 5 tokens under which the value must hold."""
    long_prefixes: int = 5
    """Fixed prefixes of about 10 tokens."""
    faithful: bool = False
    """As released: KL at the subject's last token, penalty |δ| instead of |δ|², one update fewer."""


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
    cfg: Config,
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
        moments = estimate_covariance(lm, [layer], text=text, tokens=tokens, progress=progress)
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
    direction = mean if moments is None else solve(cholesky(moments, layer, mean.device), mean.T).T
    direction = direction / direction.norm(dim=1, keepdim=True)
    notes |= {"steps": values.steps, "loss": [round(x, 4) for x in values.loss]}
    notes["prep_seconds"] = round(prepared - start, 3)  # the statistics serve every later edit
    return Pairs(layer, direction, key, target - output, notes, time.perf_counter() - prepared)


def memory(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model."""
    values = value_search.memory(lm, facts, cfg) + 12 * facts * (lm.layout.d_model + max(lm.layout.widths))
    return values + (covariance.memory(lm, 1) if cfg.covariance else 0)


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


def write(
    lm: LM, edits: Sequence[Edit], cfg: Config, method: str, *, text: Sequence[str] | None,
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


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> WeightPatch:
    """Write each fact into one block's down-projection.

    Args:
        edits: each with a subject that occurs in its prompt.
        text: plain text for the second moments; None: the model's own samples.
    Returns:
        one LowRank(out, in) of rank len(edits) on that weight.
    Raises:
        SubjectNotFound: a prompt does not contain its subject.
        Contradiction: one prompt is asked to have two targets.
        Diverged: the search left the finite numbers.
    Source: Meng et al. 2022 (arXiv:2202.05262), sec. 3.1.
    Differs: prefixes are fixed texts, so a run repeats. Several facts are inserted together and exactly
    (Λ = R (AᵀK)⁻¹, the equality-constrained form of Gupta et al. 2024, arXiv:2403.14236); one fact is ROME.
    """
    return write(lm, edits, cfg, "rome", text=text, progress=progress, each=False, mean_key=False)[0]


def fit_each(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> list[WeightPatch]:
    """One patch per edit, as if each were fitted alone, from one batched search."""
    return write(lm, edits, cfg, "rome", text=text, progress=progress, each=True, mean_key=False)


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit of that many facts takes on top of the model, rounded up."""
    return memory(lm, facts, cfg)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model."""
    edits = [
        Edit("The Eiffel Tower is in", subject="Eiffel Tower", target="Rome"),
        Edit("Steve Jobs founded", subject="Steve Jobs", target="Paris"),
    ]
    return edits, Config(layer=1, steps=3, moment_tokens=2048, short_prefixes=1, long_prefixes=0)


@dataclass(frozen=True)
class RConfig(Config):
    """r-ROME. ROME's numbers and one choice."""

    anchor: Literal["clean", "mean"] = "clean"
    """What δ is counted from: the bare prompt's value as released, or the mean key's output."""


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
    estimate = staticmethod(estimate)

    @staticmethod
    def fit(
        lm: LM,
        edits: Sequence[Edit],
        cfg: RConfig,
        *,
        text: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """As ROME's ``fit``, at the mean key over prefixes.

        Source: Gupta et al. 2024 (arXiv:2403.07175), sec. 3.
        """
        return _write_at_mean(lm, edits, cfg, text, progress, each=False)[0]

    @staticmethod
    def fit_each(
        lm: LM,
        edits: Sequence[Edit],
        cfg: RConfig,
        *,
        text: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> list[WeightPatch]:
        """One patch per edit, as if each were fitted alone, from one batched search."""
        return _write_at_mean(lm, edits, cfg, text, progress, each=True)

    @staticmethod
    def example(lm: LM) -> tuple[list[Edit], RConfig]:
        """Edits and settings that run in milliseconds on a tiny model."""
        edits, numbers = example(lm)
        return edits, replace(RConfig(), **vars(numbers))


def _write_at_mean(
    lm: LM, edits: Sequence[Edit], cfg: RConfig, text: Sequence[str] | None, progress: Progress | None, *, each: bool
) -> list[WeightPatch]:
    mean = cfg.anchor == "mean"
    return write(lm, edits, cfg, "r_rome", text=text, progress=progress, each=each, mean_key=True, anchor_mean=mean)


r_rome = RRome()


def entry(name: str) -> RRome:
    """The method of that name; ROME itself is this module."""
    return {"r_rome": r_rome}[name]
