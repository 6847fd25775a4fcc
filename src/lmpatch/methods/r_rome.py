"""r-ROME: ROME with one key throughout, which ends the edits that disable a model.

Not "R-ROME": that name is also used for RASE-ROME, a retriever over ROME patches.

Source: Gupta et al. 2024, "Rebuilding ROME" (arXiv:2403.07175).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..data.edit import Edit
from ..models.lm import LM
from ..patches.weight.patch import WeightPatch
from ..progress import Progress
from . import _rome, rome


@dataclass(frozen=True)
class Config(rome.Config):
    """r-ROME. ROME's numbers and one choice."""

    anchor: Literal["clean", "mean"] = "clean"
    """What δ is counted from: the bare prompt's value as released, or the mean key's output."""


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> WeightPatch:
    """Write each fact into one block's down-projection at its mean key over prefixes.

    ROME finds its direction from the mean key but divides by the bare prompt's; when the two differ the change
    can be large enough to disable the model. Here the mean key is used in both places.

    Args:
        edits: each with a subject that occurs in its prompt.
        text: plain text for the second moments; None: the model's own samples.
    Returns:
        one LowRank(out, in) of rank len(edits) on that weight.
    Raises:
        SubjectNotFound: a prompt does not contain its subject.
        Contradiction: one prompt is asked to have two targets.
        Diverged: the search left the finite numbers.
    Source: Gupta et al. 2024 (arXiv:2403.07175), sec. 3.
    Differs: as ``rome``.
    """
    return _fit(lm, edits, cfg, text, progress, each=False)[0]


def fit_each(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> list[WeightPatch]:
    """One patch per edit, as if each were fitted alone, from one batched search."""
    return _fit(lm, edits, cfg, text, progress, each=True)


def _fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, text: Sequence[str] | None, progress: Progress | None, *, each: bool
) -> list[WeightPatch]:
    mean = cfg.anchor == "mean"
    return _rome.fit(lm, edits, cfg, "r_rome", text=text, progress=progress, each=each, mean_key=True, anchor_mean=mean)


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit of that many facts takes on top of the model, rounded up."""
    return _rome.memory(lm, facts, cfg)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model."""
    edits, numbers = rome.example(lm)
    return edits, replace(Config(), **vars(numbers))
