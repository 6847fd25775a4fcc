"""The algebra of changes: additions sum, scales multiply, so the order does not matter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import CannotMerge, WrongModel
from .delta import Addition, Delta, Dense, LowRank, Rows, Scale, Sparse, join


def combine(name: str, deltas: Sequence[Delta]) -> Delta:
    """The changes of one weight as one.

    Raises:
        CannotMerge: a scale and an addition.
    """
    first = deltas[0]
    if len(deltas) == 1:
        return first
    shapes = {d.shape for d in deltas}
    if len(shapes) > 1:
        raise WrongModel(f"the changes of {name} have different shapes: {sorted(shapes)}.")
    additions = [d for d in deltas if isinstance(d, Addition)]
    if 0 < len(additions) < len(deltas):
        raise CannotMerge(
            f"one patch scales {name} and another adds to it: (s W) + D is neither a scale nor an addition. "
            "Apply them one after the other instead."
        )
    if isinstance(first, Scale):
        return _scales([d for d in deltas if isinstance(d, Scale)])
    low = [d for d in additions if isinstance(d, LowRank)]
    sparse = [d for d in additions if isinstance(d, Sparse)]
    rows = [d for d in additions if isinstance(d, Rows)]
    if len(low) == len(deltas):
        return _low_rank(low)
    if len(sparse) == len(deltas):
        return Sparse(*_summed([(d.index, d.value) for d in sparse]), first.shape)
    if len(rows) == len(deltas):
        return Rows(*_summed([(d.index, d.value) for d in rows]), first.shape[0])
    whole = additions[0].dense()
    for addition in additions[1:]:
        addition.to(whole.device, whole.dtype).add_to(whole)
    return Dense(whole)


def _low_rank(deltas: Sequence[LowRank]) -> LowRank | Dense:
    """Ranks side by side; where factors are shared, the other factor is summed and the rank stays."""
    b, a = deltas[0].b, deltas[0].a
    if all(_same(d.a, a) for d in deltas):
        return LowRank(torch.stack([d.b for d in deltas]).sum(0), a)
    if all(_same(d.b, b) for d in deltas):
        return LowRank(b, torch.stack([d.a for d in deltas]).sum(0))
    joined = join(deltas)
    out, width = joined.shape
    if joined.rank * (out + width) > out * width:
        joined = joined.compact()
    return joined if joined.rank * (out + width) <= out * width else Dense(joined.dense())


def _scales(deltas: Sequence[Scale]) -> Scale:
    index = torch.unique(torch.cat([d.index for d in deltas]))
    factors = torch.stack([d.factors() for d in deltas]).prod(0)
    return Scale(index, factors[index], deltas[0].shape)


def _summed(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All indices, each once, and the sum of the values under it."""
    index, place = torch.unique(torch.cat([i for i, _ in pairs]), return_inverse=True)
    values = torch.cat([v for _, v in pairs])  # [n] or [n, in]
    return index, values.new_zeros(len(index), *values.shape[1:]).index_add(0, place, values)


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x, y)
