"""The algebra of changes: additions sum, scales multiply, so the order does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...errors import CannotMerge, WrongModel
from .delta import Addition, Delta, Dense, LowRank, Rows, Scale, Sparse, join


def combine(name: str, deltas: Sequence[Delta]) -> Delta:
    """The changes of one weight as one.

    Raises:
        WrongModel: they have different shapes.
        CannotMerge: a scale and an addition.
    """
    first = deltas[0]
    if len(deltas) == 1:
        return first
    shapes = {d.shape for d in deltas}
    if len(shapes) > 1:
        raise WrongModel(f"the changes of {name} have different shapes: {sorted(shapes)}.")
    scales = [d for d in deltas if isinstance(d, Scale)]
    additions = [d for d in deltas if isinstance(d, Addition)]
    if scales and additions:
        raise CannotMerge(
            f"one patch scales {name} and another adds to it: (s W) + D is neither a scale nor an addition. "
            "Apply them one after the other instead."
        )
    if scales:
        index = torch.unique(torch.cat([d.index for d in scales]))
        factors = torch.stack([d.factors() for d in scales]).prod(0)
        return Scale(index, factors[index], first.shape)
    low = [d for d in additions if isinstance(d, LowRank)]
    if len(low) == len(additions):
        return _low_rank(low)
    listed = [d for d in additions if isinstance(d, (Sparse, Rows)) and type(d) is type(first)]
    if len(listed) == len(additions):
        index, place = torch.unique(torch.cat([d.index for d in listed]), return_inverse=True)
        values = torch.cat([d.value for d in listed])  # [n] or [n, in]
        total = values.new_zeros(len(index), *values.shape[1:]).index_add(0, place, values)
        return replace(listed[0], index=index, value=total)
    whole = additions[0].dense()
    for addition in additions[1:]:
        addition.to(whole.device, whole.dtype).add_to(whole)
    return Dense(whole)


def _low_rank(deltas: Sequence[LowRank]) -> LowRank | Dense:
    """Ranks side by side; where factors are shared, the other factor is summed and the rank stays."""
    b, a = deltas[0].b, deltas[0].a
    if all(torch.equal(d.a, a) for d in deltas):
        return LowRank(torch.stack([d.b for d in deltas]).sum(0), a)
    if all(torch.equal(d.b, b) for d in deltas):
        return LowRank(b, torch.stack([d.a for d in deltas]).sum(0))
    joined = join(deltas)
    out, width = joined.shape
    if joined.rank * (out + width) > out * width:
        joined = joined.compact()
    return joined if joined.rank * (out + width) <= out * width else Dense(joined.dense())
