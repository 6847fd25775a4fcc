"""ROME: write a fact into one down-projection as a rank-one change.

Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (arXiv:2202.05262).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.edit import Edit
from ..models.lm import LM
from ..patches.weight.patch import WeightPatch
from ..progress import Progress
from . import _rome


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
    return _rome.fit(lm, edits, cfg, "rome", text=text, progress=progress, each=False, mean_key=False)[0]


def fit_each(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> list[WeightPatch]:
    """One patch per edit, as if each were fitted alone, from one batched search."""
    return _rome.fit(lm, edits, cfg, "rome", text=text, progress=progress, each=True, mean_key=False)


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit of that many facts takes on top of the model, rounded up."""
    return _rome.memory(lm, facts, cfg)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model."""
    edits = [
        Edit("The Eiffel Tower is in", subject="Eiffel Tower", target="Rome"),
        Edit("Steve Jobs founded", subject="Steve Jobs", target="Paris"),
    ]
    return edits, Config(layer=1, steps=3, moment_tokens=2048, short_prefixes=1, long_prefixes=0)
