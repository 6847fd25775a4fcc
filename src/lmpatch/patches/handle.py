"""``Handle``: what one patch does to one model, known before any of it is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..inference.interventions import Intervention


@dataclass(frozen=True, eq=False)
class Hook:
    """A hook that a patch puts on a module. It is found again by its function, so a Ctrl-C cannot lose it."""

    module: nn.Module
    function: Callable[..., Any]
    before: bool = False
    """It sees what the module reads, not what it returns."""
    first: bool = False
    """It runs before the hooks that are there."""

    def enable(self) -> None:
        """Put it on, if it is off."""
        if not any(function is self.function for function in self._table.values()):
            module = self.module
            register: Any = module.register_forward_pre_hook if self.before else module.register_forward_hook
            register(self.function, prepend=self.first)

    def disable(self) -> None:
        """Take it off, if it is on."""
        for key in [key for key, function in self._table.items() if function is self.function]:
            del self._table[key]

    @property
    def _table(self) -> dict[int, Callable[..., Any]]:
        return self.module._forward_pre_hooks if self.before else self.module._forward_hooks


class Handle:
    """What a patch does to a model: hooks, interventions in lmpatch's own calls, or what a kind's own class adds.

    The ledger calls ``disable`` where ``enable`` did not come to its end, and ``enable`` where ``disable`` did not.
    So each goes on from whatever the other left, and a second call changes nothing.
    """

    rounding_error: float = 0.0
    """See ``Applied.rounding_error``."""

    def __init__(self, *, hooks: Sequence[Hook] = (), interventions: Sequence[Intervention] = ()) -> None:
        self.hooks, self.interventions = tuple(hooks), tuple(interventions)

    def enable(self) -> None:
        """Write and hook."""
        for hook in self.hooks:
            hook.enable()
        if self.hooks:
            forget_compiled()

    def disable(self) -> None:
        """Undo all that ``enable`` did, however far it came."""
        for hook in self.hooks:
            hook.disable()
        if self.hooks:
            forget_compiled()

    def check(self) -> None:
        """Raise ``ForeignWrite`` if someone else wrote a weight that ``disable`` would restore."""

    def originals(self) -> Mapping[str, Tensor]:
        """Parameter name -> the tensor as it was before any patch, for every weight that was written."""
        return {}


def forget_compiled() -> None:
    """Code compiled before would go on as if no hook had come or gone."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
