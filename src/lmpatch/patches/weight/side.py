"""The side mount: hooks on a module that act as if its weight were changed. The weight is not touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import CannotMount
from ...inference.forward import current_pass
from ...models.hooks import Hook, Hooks
from ..handle import forget_compiled
from .delta import Addition, Changes, Delta, LowRank, Scale, Sparse, When, join
from .target import Target

Group = tuple[When, Tensor | None, list[Addition]]
"""Changes that act at one time, see ``Side._acting``."""


class Side:
    """All side changes of one weight: y = W (s * x) + sum(ΔW) x, in the dtype of x.

    Two hooks stay on while there are changes: the first scales the input, the second adds to the output. The
    additions act on the input as it came; the scaled input carries it along as an attribute, which stays right
    when several threads run the model. A vector (a bias, a norm's weight) can be scaled only, by one hook.

    Changes that act only in a context leave the rows of a batch without one to the bit as they are. In a call of the
    model that is not lmpatch's, no row has one.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.changes: Changes = {}
        if target.vector:
            self._hooks = Hooks(Hook(target.module, self._scale_vector))
        else:
            self._hooks = Hooks(Hook(target.module, self._scale, before=True), Hook(target.module, self._add))
        self._ready: tuple[Any, list[Group]] = (None, [])

    def add(self, delta: Delta, changes: Changes) -> Tensor:
        """Have exactly these changes, ``delta`` among them. Nothing is rounded, so nothing is lost: zeros [2]."""
        self.write(changes)
        return torch.zeros(2)

    def write(self, changes: Changes) -> None:
        """Have exactly these changes; without any the hooks go off."""
        self.changes = changes
        self._ready = (None, [])
        if changes:
            self._hooks.put()
        else:
            self._hooks.remove()
        forget_compiled()

    def _scale(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        scaled = x = args[0]
        more = False
        for rows, scale, additions in self._acting(x):
            if scale is not None:
                scaled = _where(rows, scaled * scale, scaled)  # [..., in]
            more |= bool(additions)
        if scaled is x:
            return None
        if more:
            scaled._lmpatch_raw = x
        return (scaled, *args[1:])

    def _add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = getattr(args[0], "_lmpatch_raw", args[0])  # [..., in]
        for rows, _, additions in self._acting(x):
            for addition in additions:
                output = _where(rows, output + addition.times(x).to(output), output)  # [..., out]
        return output

    def _scale_vector(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for rows, scale, _ in self._acting(output):
            assert scale is not None
            if self.target.attribute == "weight":  # of a norm without bias, whose output it multiplies
                changed = output * scale
            else:
                changed = output + (scale - 1) * self.target.parameter.to(output.dtype)
            output = _where(rows, changed, output)
        return output

    def _acting(self, x: Tensor) -> Iterator[tuple[Tensor | None, Tensor | None, list[Addition]]]:
        """The changes that act now, those with the same ``when`` together: the rows of ``x`` where they act, [..., 1]
        bool or None for all; the product of all scales, [in] or None; and the additions, where ``x`` is and in its
        dtype."""
        key = (x.device, x.dtype)
        ready = self._ready
        if ready[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # made in inference mode it could serve no backward
                self._ready = ready = (key, _prepare([*self.changes.values()], x))
        for when, scale, additions in ready[1]:
            if when == "always":
                yield None, scale, additions
            elif (now := current_pass()) is not None and now.in_context is not None:
                rows = now.in_context[:, None].expand(-1, now.width)  # [n, t]; some models flatten rows and tokens
                yield rows.reshape(*x.shape[:-1], 1), scale, additions


def _where(rows: Tensor | None, changed: Tensor, as_it_was: Tensor) -> Tensor:
    return changed if rows is None else torch.where(rows, changed, as_it_was)


def _prepare(deltas: Sequence[Delta], x: Tensor) -> list[Group]:
    groups = ((when, [d for d in deltas if d.when == when]) for when in get_args(When))
    return [(when, *_joined(own, x)) for when, own in groups if own]


def _joined(deltas: Sequence[Delta], x: Tensor) -> tuple[Tensor | None, list[Addition]]:
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
