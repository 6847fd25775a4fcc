"""The side mount: hooks on a module that act as if its weight were changed. The weight is not touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import CannotMount
from ...models.hooks import Hook, Hooks
from ..handle import forget_compiled
from .delta import Addition, Changes, Delta, LowRank, Scale, Sparse, join
from .target import Target


class Side:
    """All side changes of one weight: y = W (s * x) + sum(ΔW) x, in the dtype of x.

    Two hooks stay on while there are changes: the first scales the input, the second adds to the output. The
    additions act on the input as it came; the scaled input carries it along as an attribute, which stays right
    when several threads run the model. A vector (a bias, a norm's weight) can be scaled only, by one hook.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.changes: Changes = {}
        if target.vector:
            self._hooks = Hooks(Hook(target.module, self._scale_vector))
        else:
            self._hooks = Hooks(Hook(target.module, self._scale, before=True), Hook(target.module, self._add))
        self._ready: tuple[Any, Tensor | None, list[Addition]] = (None, None, [])

    def add(self, delta: Delta, changes: Changes) -> Tensor:
        """Have exactly these changes, ``delta`` among them. Nothing is rounded, so nothing is lost: zeros [2]."""
        self.write(changes)
        return torch.zeros(2)

    def write(self, changes: Changes) -> None:
        """Have exactly these changes; without any the hooks go off."""
        self.changes = changes
        self._ready = (None, None, [])
        if changes:
            self._hooks.put()
        else:
            self._hooks.remove()
        forget_compiled()

    def check(self) -> None:
        """Nothing can be written behind a hook's back."""

    def _scale(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        scale, additions = self._prepared(args[0])
        if scale is None:
            return None
        scaled = args[0] * scale  # [..., in]
        if additions:
            scaled._lmpatch_raw = args[0]
        return (scaled, *args[1:])

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = getattr(args[0], "_lmpatch_raw", args[0])  # [..., in]
        for addition in self._prepared(x)[1]:
            output = output + addition.times(x).to(output)  # [..., out]
        return output

    def _scale_vector(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        scale, _ = self._prepared(output)
        assert scale is not None
        if self.target.attribute == "weight":  # of a norm without bias, whose output it multiplies
            return output * scale
        return output + (scale - 1) * self.target.parameter.to(output.dtype)

    def _prepared(self, x: Tensor) -> tuple[Tensor | None, list[Addition]]:
        """The product of all scales, [in] or None, and the additions, where ``x`` is and in its dtype."""
        key = (x.device, x.dtype)
        ready = self._ready
        if ready[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # made in inference mode it could serve no backward
                self._ready = ready = (key, *_prepare([*self.changes.values()], x))
        return ready[1], ready[2]


def _prepare(deltas: Sequence[Delta], x: Tensor) -> tuple[Tensor | None, list[Addition]]:
    scales = [d.to(x.device, torch.float32).factors() for d in deltas if isinstance(d, Scale)]
    scale = torch.stack(scales).prod(0).to(x.dtype) if scales else None
    low = [d for d in deltas if isinstance(d, LowRank)]
    rest = [d for d in deltas if isinstance(d, Addition) and not isinstance(d, LowRank)]
    additions = [*([join(low)] if low else []), *(d.to_rows() if isinstance(d, Sparse) else d for d in rest)]
    return scale, [d.to(x.device, x.dtype, copy=True) for d in additions]


def refuse(target: Target, delta: Delta) -> None:
    """Raise ``CannotMount`` unless hooks on the module do what the changed weight would."""
    linear = isinstance(target.module, (nn.Linear, Conv1D))
    if linear:
        scalable = target.attribute == "bias"
    else:  # the only parameter of a norm
        scalable = target.attribute == "weight" and len(list(target.module.parameters())) == 1
    if len(target.names) > 1:
        reason = f"{' and '.join(target.names)} are one weight, and a hook would change one of its uses only"
    elif target.vector and scalable:
        if isinstance(delta, Scale):
            return
        reason = f"{target.name} is a vector, which hooks can scale but not add to"
    elif not linear or target.attribute != "weight":
        reason = f"{target.name} belongs to a {type(target.module).__name__}, and hooks are for linear layers"
    else:
        return
    raise CannotMount(f"cannot mount on the side: {reason}. Pass mount='bake' to write the weight instead.")
