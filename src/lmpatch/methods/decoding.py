"""Rules that weigh, at each token, what a model says with a context against what it says without.

A fit packs the rule and computes nothing; ``patches.decode.rules`` has the equations and what their numbers mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.context import ContextRecord, brief
from ..inference.interventions import Rule
from ..models.lm import LM
from ..patches.decode.patch import DecodePatch
from ..patches.decode.rules import AdaCAD, Arr, Coiecd, Grd, Power
from ..probes.integrated_gradients.probe import examples
from ..progress import Progress

AIM = "context"
ENTRIES = {
    "adacad": "AdaCAD: CAD whose strength at each token is the divergence of the two distributions.",
    "arr": "ARR: at each token, lean to the context or the model's own knowledge, whichever is more certain.",
    "cad": "CAD: contrast the logits with and without context, to amplify what the context changes.",
    "coiecd": "COIECD: contrast as CAD does, but trust the context only on the tokens it makes likely.",
    "grd": "GRD: decide once per answer whether to trust the context or the model.",
    "power": "Power: one fixed exponent, from the answer without context (0) to CAD (above 1).",
}


@dataclass(frozen=True)
class CAD:
    """CAD. The paper takes 0.5 for summaries and 1 for NQ-Swap, IRCAN takes 0.5."""

    alpha: float = 0.5
    """Strength: logits are (1 + alpha) times those with context minus alpha times those without. 0 changes nothing."""


class Decoding:
    """One rule as a method."""

    Record = ContextRecord
    needs_records = False

    def __init__(
        self, name: str, config: type[Any], source: str, rule: Callable[[Any], Rule] = lambda cfg: cfg
    ) -> None:
        self.name, self.Config, self.rule = name, config, rule
        self.__doc__ = f"{ENTRIES[name]}\n\nSource: {source}"

    def fit(
        self, lm: LM, records: Sequence[ContextRecord], cfg: Any, *, progress: Progress | None = None
    ) -> DecodePatch:
        """Pack the rule.

        Args:
            records: kept as what the rule is meant for; nothing is learned from them.
        Raises:
            BadInput: a number out of the rule's range.
        Source: the paper that the method's own text names.
        """
        return DecodePatch.make(lm, self.rule(cfg), method=self.name, config=cfg, edits=brief(records))

    def example(self, lm: LM) -> tuple[list[ContextRecord], Any]:
        """Records, and settings that move a tiny model's answers."""
        return examples(), self.Config()


METHODS = {
    method.name: method
    for method in (
        Decoding("adacad", AdaCAD, "Wang et al. 2024 (arXiv:2409.07394), sec. 3."),
        Decoding("arr", Arr, "arXiv:2606.10298, first version."),
        Decoding("cad", CAD, "Shi et al. 2023 (arXiv:2305.14739), eq. 2.", lambda cfg: Power(1 + cfg.alpha)),
        Decoding("coiecd", Coiecd, "Yuan et al. 2024 (arXiv:2402.11893), sec. 3."),
        Decoding("grd", Grd, "arXiv:2606.10298, keith-Jiang/conflict-aware-decoding."),
        Decoding("power", Power, "arXiv:2606.10298, sec. 3."),
    )
}


def entry(name: str) -> Decoding:
    """The method of that name."""
    return METHODS[name]
