"""The power family with one fixed exponent: from memory alone, through the context, to more than the context.

Source: "Conflict-aware decoding" (arXiv:2606.10298), keith-Jiang/conflict-aware-decoding.
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
    """The power family. The paper tries 0.25, 0.5 and 0.75."""

    tau: float = 0.5
    """p = p_context^tau p_bare^(1 - tau), normalised: 0 is the answer from memory, 1 the answer with the context,
    above 1 is CAD with a strength of tau - 1."""


def fit(lm: LM, records: Sequence[ContextRecord], cfg: Config, *, progress: Progress | None = None) -> DecodePatch:
    """Pack the rule. Nothing is computed.

    Args:
        records: kept as what the rule is meant for; nothing is learned from them.
    Raises:
        BadInput: an exponent that is no finite number.
    Source: arXiv:2606.10298, sec. 3.
    """
    return DecodePatch.make(lm, Power(cfg.tau), method="power", config=cfg, edits=brief(records))


def example(lm: LM) -> tuple[list[ContextRecord], Config]:
    """Records, and settings that move a tiny model's answers."""
    return examples(), Config()
