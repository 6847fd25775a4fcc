"""ARR: lean to whichever of memory and context is surer, as far as the two are apart.

Source: arXiv:2606.10298, keith-Jiang/conflict-aware-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.context import ContextRecord, brief
from ..models.lm import LM
from ..patches.decode.patch import DecodePatch
from ..patches.decode.rules import Arr
from ..probes.integrated_gradients.probe import examples
from ..progress import Progress

reads = "context"
"""The kind of records ``fit`` takes."""
needs_records = False
"""It learns nothing from them, so they may be left out."""


@dataclass(frozen=True)
class Config:
    """ARR has no settings: the exponent is 1 + JSD / ln 2 where the likeliest token is likelier with the context than
    without, else 1 - JSD / ln 2."""


def fit(lm: LM, records: Sequence[ContextRecord], cfg: Config, *, progress: Progress | None = None) -> DecodePatch:
    """Pack the rule. Nothing is computed.

    Args:
        records: kept as what the rule is meant for; nothing is learned from them.
    Source: arXiv:2606.10298, first version.
    """
    return DecodePatch.make(lm, Arr(), method="arr", config=cfg, edits=brief(records))


def example(lm: LM) -> tuple[list[ContextRecord], Config]:
    """Records, and settings that move a tiny model's answers."""
    return examples(), Config()
