"""``Handle``: what one patch does to one model, known before any of it is done."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..inference.interventions import Intervention
from ..models.hooks import Hooks


class Handle:
    """What a patch does to a model: its interventions while inference runs, or what a kind's own class adds.

    The ledger calls ``disable`` where ``enable`` did not come to its end, and ``enable`` where ``disable`` did not.
    So each goes on from whatever the other left, and a second call changes nothing.
    """

    rounding_error: float = 0.0
    """See ``Applied.rounding_error``."""

    def __init__(self, interventions: Sequence[Intervention] = ()) -> None:
        self.interventions = tuple(interventions)
        self._hooks = Hooks(*(hook for one in self.interventions for hook in one.hooks))

    def enable(self) -> None:
        """Write and hook."""
        self._hooks.put()
        if self._hooks:
            forget_compiled()

    def disable(self) -> None:
        """Undo all that ``enable`` did, however far it came."""
        self._hooks.remove()
        if self._hooks:
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
