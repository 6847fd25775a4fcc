"""COIECD: contrast the context's likely tokens, and leave the rest to the model.

Source: Yuan et al. 2024, "Discerning and Resolving Knowledge Conflicts through Adaptive Decoding with Contextual
Information-Entropy Constraint" (arXiv:2402.11893).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.context import ContextRecord, brief
from ..models.lm import LM
from ..patches.decode.patch import DecodePatch
from ..patches.decode.rules import Coiecd
from ..probes.integrated_gradients.probe import examples
from ..progress import Progress

reads = "context"
"""The kind of records ``fit`` takes."""
needs_records = False
"""It learns nothing from them, so they may be left out."""


@dataclass(frozen=True)
class Config:
    """COIECD. Defaults: the released settings."""

    alpha: float = 1.0
    """How often log p with context minus log p without is added to every token."""
    ratio: float = 4.0
    """Tokens within this factor of the context's first choice start from log p with context, others from log p without.
    Where the first choice is alone, it does not count as near either."""
    tail: bool = False
    """As released: tokens within this factor of the least likely one count as near, too."""


def fit(lm: LM, records: Sequence[ContextRecord], cfg: Config, *, progress: Progress | None = None) -> DecodePatch:
    """Pack the rule. Nothing is computed.

    Args:
        records: kept as what the rule is meant for; nothing is learned from them.
    Raises:
        BadInput: a ratio below 1, or numbers that are not finite.
    Source: Yuan et al. 2024 (arXiv:2402.11893), sec. 3.
    Differs: the bound at the other end of the distribution, an artefact of the released code, is off; ``tail`` is it.
    """
    rule = Coiecd(cfg.alpha, cfg.ratio, cfg.tail)
    return DecodePatch.make(lm, rule, method="coiecd", config=cfg, edits=brief(records))


def example(lm: LM) -> tuple[list[ContextRecord], Config]:
    """Records, and settings that move a tiny model's answers."""
    return examples(), Config()
