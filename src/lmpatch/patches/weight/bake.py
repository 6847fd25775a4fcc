"""The bake mount: changes written into a weight, always computed anew from its original.

Undoing by subtraction leaves other bits than before. Here a weight with changes is

    W = cast(original.float() * prod(scales) + sum(additions))

and the original itself comes back when the last change leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...errors import CannotMount, ForeignWrite
from ..base import is_plain
from .delta import FLOATS, Addition, Changes, Delta, Scale
from .target import Target

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Baked:
    """The changes written into one weight. It keeps the original, on the weight's device."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.original = target.parameter.detach().clone()
        self.changes: Changes = {}
        self._checksum = checksum(self.original)

    def add(self, delta: Delta, changes: Changes) -> Tensor:
        """Have exactly these changes, ``delta`` among them.

        Returns:
            [2] on the CPU: ‖(W_now - W_before) - ΔW‖² and ‖ΔW‖².
        """
        before = self._wide(self.target.parameter)
        wanted = self._wanted(delta)
        self.write(changes)
        missed = self._wide(self.target.parameter).sub_(before).sub_(wanted)
        return torch.stack([missed.square().sum(), wanted.square().sum()]).cpu()

    def write(self, changes: Changes) -> None:
        """Make the weight the original with exactly these changes."""
        self.changes = changes
        value = self._rebuilt([*changes.values()]) if changes else self.target.oriented(self.original)
        now = self.target.parameter.detach()  # no no_grad block: a Ctrl-C at its end would leave it on
        self.target.oriented(now).copy_(value)
        self._checksum = checksum(self.target.parameter)

    def check(self) -> None:
        """Raise ``ForeignWrite`` unless the weight is as it was left here."""
        now, left = self.target.parameter, self.original
        same = now.shape == left.shape and now.dtype == left.dtype
        if not same or not torch.equal(checksum(now), self._checksum.to(now.device)):
            raise ForeignWrite(
                f"{self.target.name} was written by someone else while a patch is baked into it. Take patches off "
                "before you train or convert the model. remove(force=True) restores the original and drops that write."
            )

    def _wide(self, stored: Tensor) -> Tensor:
        """A copy as [out, in], fp32 or wider, where the weight is."""
        wide = torch.promote_types(self.original.dtype, torch.float32)
        return self.target.oriented(stored.detach().to(self.target.parameter.device, wide, copy=True))

    def _rebuilt(self, deltas: Sequence[Delta]) -> Tensor:
        """The original with these changes, [out, in], fp32 or wider."""
        w = self._wide(self.original)  # [out, in]
        if any(isinstance(d, Scale) for d in deltas):
            factors = _factors(deltas, w)
            w *= factors
            if self.target.offset:  # s (w + o) - o, in a form that leaves every bit where s is 1
                w += self.target.offset * (factors - 1)
        additions = [d for d in deltas if isinstance(d, Addition)]
        total = torch.zeros_like(w) if len(additions) > 1 else w  # summed apart, a change and its opposite are nothing
        for addition in additions:
            addition.to(w.device, w.dtype).add_to(total)
        if total is not w:
            w += total
        return w

    def _wanted(self, delta: Delta) -> Tensor:
        """ΔW on top of the present changes, [out, in]."""
        w = self._wide(self.original)
        if isinstance(delta, Addition):
            delta.to(w.device, w.dtype).add_to(w.zero_())
            return w
        before = [*self.changes.values()]
        return (w + self.target.offset) * (_factors([*before, delta], w) - _factors(before, w))


def refuse(target: Target) -> None:
    """Raise ``CannotMount`` unless changes can be written into the weight."""
    parameter, hook = target.parameter, getattr(target.module, "_hf_hook", None)
    # accelerate brings an offloaded weight in for each call and throws it away after
    if parameter.is_meta or any(getattr(h, "offload", False) for h in getattr(hook, "hooks", (hook,))):
        reason = "it is offloaded, and what is written would be lost"
    elif not is_plain(parameter):
        reason = f"it is stored as {type(parameter if type(parameter.data) is Tensor else parameter.data).__name__}"
    elif parameter.dtype not in FLOATS:
        reason = f"it is stored as {parameter.dtype}"
    else:
        return
    raise CannotMount(
        f"cannot bake into {target.name}: {reason}. Pass mount='side' to add the change to the layer's output instead."
    )


def checksum(stored: Tensor) -> Tensor:
    """Sums of the bits along every row and column: any single changed number shows. In pieces, to save memory."""
    bits = stored.detach().view(BITS[stored.element_size()])
    bits = bits.reshape(len(bits), -1)  # a vector is a column
    pieces = torch.split(bits, max(1, 2**22 // max(1, bits.shape[1])))
    columns = torch.stack([p.sum(0) for p in pieces]).sum(0)
    return torch.cat([columns, *[p.sum(1) for p in pieces]])


def _factors(deltas: Iterable[Delta], like: Tensor) -> Tensor:
    """The product of all scales, [in]."""
    product = like.new_ones(like.shape[1])
    for delta in deltas:
        if isinstance(delta, Scale):
            product *= delta.to(like.device, like.dtype).factors()
    return product
