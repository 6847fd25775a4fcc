"""CAD: what the context adds to an answer is added once more.

Source: Shi et al. 2023, "Trusting Your Evidence: Hallucinate Less with Context-aware Decoding" (arXiv:2305.14739).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.context import ContextRecord, brief
from ..models.lm import LM
from ..patches.decode.patch import DecodePatch
from ..patches.decode.rules import Power
from ..probes.integrated_gradients.probe import examples
from ..progress import Progress

reads = "context"
"""The kind of records ``fit`` takes."""
needs_records = False
"""It learns nothing from them, so they may be left out."""


@dataclass(frozen=True)
class Config:
    """CAD. The paper takes 0.5 for summaries and 1 for NQ-Swap, IRCAN takes 0.5."""

    alpha: float = 0.5
    """Strength: logits are (1 + alpha) times those with context minus alpha times those without. 0 changes nothing."""


def fit(lm: LM, records: Sequence[ContextRecord], cfg: Config, *, progress: Progress | None = None) -> DecodePatch:
    """Pack the rule. Nothing is computed.

    Args:
        records: kept as what the rule is meant for; nothing is learned from them.
    Raises:
        BadInput: a strength that is no finite number. The message names the exponent, 1 + alpha.
    Source: Shi et al. 2023 (arXiv:2305.14739), eq. 2.
    """
    return DecodePatch.make(lm, Power(1 + cfg.alpha), method="cad", config=cfg, edits=brief(records))


def example(lm: LM) -> tuple[list[ContextRecord], Config]:
    """Records, and settings that move a tiny model's answers."""
    return examples(), Config()
