"""GRD: decide once per answer whether to trust the context or the model.

Source: arXiv:2606.10298, keith-Jiang/conflict-aware-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..data.context import ContextRecord, brief
from ..models.lm import LM
from ..patches.decode.patch import DecodePatch
from ..patches.decode.rules import Grd
from ..probes.integrated_gradients.probe import examples
from ..progress import Progress

reads = "context"
"""The kind of records ``fit`` takes."""
needs_records = False
"""It learns nothing from them, so they may be left out."""


@dataclass(frozen=True)
class Config:
    """GRD. Defaults: the released settings."""

    lam: float = 0.75
    """Where the model is trusted, 0 leaves its token and the context's even and 1 takes its own distribution."""
    gate: Literal["full", "confidence", "entropy"] = "full"
    """What makes it trusted at the first token on which the two differ: its token has p > 0.5 without context, the
    entropy is lower without context, or both."""


def fit(lm: LM, records: Sequence[ContextRecord], cfg: Config, *, progress: Progress | None = None) -> DecodePatch:
    """Pack the rule. Nothing is computed.

    Args:
        records: kept as what the rule is meant for; nothing is learned from them.
    Raises:
        BadInput: ``lam`` outside 0..1.
    Source: arXiv:2606.10298, sec. 3.
    Differs: released code names the gates full, conf_only and ent_only; where it emits one token alone, the logits that
    have it as first choice are given, so that answers can be scored and drawn.
    """
    return DecodePatch.make(lm, Grd(cfg.lam, cfg.gate), method="grd", config=cfg, edits=brief(records))


def example(lm: LM) -> tuple[list[ContextRecord], Config]:
    """Records, and settings that move a tiny model's answers."""
    return examples(), Config(gate="entropy")
