"""Processes that train together: each has its part of every batch, and all end with the same weights.

``accelerate launch`` or ``torchrun`` starts them. Alone, every function here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .errors import MissingExtra

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def part(self, items: Sequence[T]) -> list[T]:
        """Every ``size``-th item, from this process's own place on."""
        return list(items[self.rank :: self.size])

    def gathered(self, own: Tensor, n: int) -> Tensor:
        """What all processes made of their parts, in the order of the items. Differentiable.

        Every process then computes the same loss of all items; ``mean`` of the gradients is that loss's gradient.

        Args:
            own: [items of this process, ...].
            n: items of all processes.
        """
        if self.size == 1:
            return own
        out: Tensor = _Gather.apply(own, n, self)  # type: ignore[no-untyped-call]
        return out

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up over the processes, in place."""
        for t in tensors if self.size > 1 else ():
            dist.all_reduce(t)

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """As ``sum``, divided by the processes."""
        self.sum(tensors)
        for t in tensors:
            t.div_(self.size)


SINGLE = World()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, n: int, world: World) -> Tensor:
        ctx.own, ctx.world = len(own), world
        most = -(-n // world.size)
        padded = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
        parts = [torch.empty_like(padded) for _ in range(world.size)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, 1).flatten(0, 1)[:n]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.world.size * grad[ctx.world.rank :: ctx.world.size], None, None


def world() -> World:
    """The processes of the process group, if the program has started one."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else SINGLE


def join() -> str | None:
    """Start the process group, where the program was launched as one of several.

    Returns:
        this process's device; None for a program on its own.
    Raises:
        MissingExtra: accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    try:
        from accelerate import PartialState
    except ImportError:
        raise MissingExtra("accelerate is not installed: pip install 'lmpatch[processes]'") from None
    return str(PartialState().device)
