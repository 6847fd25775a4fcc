"""``DecodePatch``: a rule that weighs what a model says with a context against what it says without."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from ...errors import BadPatch
from ...inference.interventions import Intervention, Rule
from ...models.hooks import Hook
from ...models.lm import LM
from ..merge import merged_fields
from ..patch import RunPatch, fields_for, plain
from .rules import AdaCAD, Arr, Coiecd, Grd, Power

log = logging.getLogger(__name__)
RULES: dict[str, Any] = {"power": Power, "adacad": AdaCAD, "arr": Arr, "grd": Grd, "coiecd": Coiecd}
"""The rules by their names in a file; each is a dataclass of numbers."""
NAMES = {rule: name for name, rule in RULES.items()}


@dataclass(eq=False)
class DecodePatch(RunPatch):
    """One rule, or several in the order they act. It holds numbers and no tensor.

    It acts in lmpatch's ``generate``, ``stream``, ``score`` and ``next_logits``, which read every prompt twice, with
    its context and without (``InContext``). A plain ``model.generate`` reads one prompt and does not see it: the first
    such call is logged as a warning.
    """

    kind: ClassVar[str] = "decode"
    needs_context: ClassVar[bool] = True
    rules: tuple[Rule, ...] = field(kw_only=True)

    @classmethod
    def make(
        cls, lm: LM, rule: Rule, *, method: str, config: Any = None, edits: Sequence[Any] = (), seconds: float = 0.0
    ) -> DecodePatch:
        """A patch of one rule; ``edits`` are the records it was made for, if any. The rest: see ``fields_for``."""
        return cls(**fields_for(lm, method, config, edits, seconds), rules=(rule,))

    def parts(self) -> dict[str, Any]:
        return {"rules": [{"rule": NAMES[type(rule)], **plain(rule)} for rule in self.rules]}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], tensors: Mapping[str, Tensor], **common: Any) -> DecodePatch:
        try:
            listed = [dict(one) for one in parts["rules"]]
            rules = tuple(RULES[one.pop("rule")](**one) for one in listed)
        except (KeyError, TypeError, ValueError) as error:  # BadInput is a ValueError
            raise BadPatch(f"it is no decode patch ({error}).") from None
        if any(set(one) != {f.name for f in fields(rule)} for rule, one in zip(rules, listed, strict=True)):
            raise BadPatch(f"a rule lacks one of its numbers: {listed}.")
        if tensors or not rules or set(parts) != {"rules"}:
            raise BadPatch(f"a decode patch holds rules and no tensors, found {sorted(parts)} and {sorted(tensors)}.")
        return cls(**common, rules=rules)

    def describe(self) -> list[str]:
        texts = [", ".join(f"{name}={value}" for name, value in plain(rule).items()) for rule in self.rules]
        return [f"  {NAMES[type(rule)]}: {text}".rstrip(": ") for rule, text in zip(self.rules, texts, strict=True)]

    def intervention(self, lm: LM) -> Combine:
        return Combine(self.rules, Hook(lm.model, _missed(self.method)))

    def merged(self, others: Sequence[DecodePatch]) -> DecodePatch:
        patches = (self, *others)
        return DecodePatch(**merged_fields(patches), rules=tuple(rule for p in patches for rule in p.rules))


class Combine(Intervention):
    """A decode patch at work."""

    def __init__(self, rules: tuple[Rule, ...], *hooks: Hook) -> None:
        self.rules, self.hooks = rules, hooks


def _missed(method: str) -> Any:
    """A hook that says once that the patch is passed by. Our own calls stop at the last block, before it."""

    @cache
    def say() -> None:
        log.warning(
            "this call of the model does not see the %s patch that is on it: the patch acts in lmpatch's generate, "
            "stream, score and next_logits.",
            method,
        )

    return lambda *_: say()
