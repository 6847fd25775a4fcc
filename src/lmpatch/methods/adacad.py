"""AdaCAD: CAD whose strength is how far the two distributions are apart, token by token.

Source: Wang et al. 2024, "AdaCAD: Adaptively Decoding to Balance Conflicts between Contextual and Parametric Knowledge"
(arXiv:2409.07394).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.context import ContextRecord, brief
from ..models.lm import LM
from ..patches.decode.patch import DecodePatch
from ..patches.decode.rules import AdaCAD
from ..probes.integrated_gradients.probe import examples
from ..progress import Progress

reads = "context"
"""The kind of records ``fit`` takes."""
needs_records = False
"""It learns nothing from them, so they may be left out."""


@dataclass(frozen=True)
class Config:
    """AdaCAD. The default is the paper's for questions; long answers take a floor of 0.3."""

    floor: float = 0.0
    """The strength is the Jensen-Shannon divergence in nats, 0..ln 2, and at least this."""


def fit(lm: LM, records: Sequence[ContextRecord], cfg: Config, *, progress: Progress | None = None) -> DecodePatch:
    """Pack the rule. Nothing is computed.

    Args:
        records: kept as what the rule is meant for; nothing is learned from them.
    Raises:
        BadInput: a floor below 0.
    Source: Wang et al. 2024 (arXiv:2409.07394), sec. 3.
    """
    return DecodePatch.make(lm, AdaCAD(cfg.floor), method="adacad", config=cfg, edits=brief(records))


def example(lm: LM) -> tuple[list[ContextRecord], Config]:
    """Records, and settings that move a tiny model's answers."""
    return examples(), Config()
