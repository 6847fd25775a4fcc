"""Several changes as one, in any order: additions sum, scales multiply. And changes as the factors of an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ...errors import BadInput, CannotMerge, CannotMount, WrongModel
from ...resources import require_memory
from ..lora import Lora
from . import side
from .delta import Addition, Delta, Dense, LowRank, Rows, Scale, Sparse, join
from .target import Target


def combine(name: str, deltas: Sequence[Delta]) -> Delta:
    """The changes of one weight as one.

    Raises:
        WrongModel: they have different shapes.
        CannotMerge: a scale and an addition, or one acts always and another only in a context.
        NotEnoughMemory: together they are a matrix that is too large.
    """
    first = deltas[0]
    if len(deltas) == 1:
        return first
    shapes = {d.shape for d in deltas}
    if len(shapes) > 1:
        raise WrongModel(f"the changes of {name} have different shapes: {sorted(shapes)}.")
    if any(d.when != first.when for d in deltas):
        raise CannotMerge(
            f"one patch changes {name} always and another only where a prompt carries a context. Apply both instead."
        )
    return replace(_combined(name, deltas), when=first.when)


def _combined(name: str, deltas: Sequence[Delta]) -> Delta:
    first = deltas[0]
    scales = [d for d in deltas if isinstance(d, Scale)]
    additions = [d for d in deltas if isinstance(d, Addition)]
    if scales and additions:
        raise CannotMerge(
            f"one patch scales {name} and another adds to it: (s W) + D is neither a scale nor an addition. "
            "Apply them one after the other instead."
        )
    if scales:
        require_memory(8 * (len(scales) + 1) * first.shape[1], torch.device("cpu"), f"the merged change of {name}")
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
    require_memory(8 * first.shape[0] * first.shape[1], torch.device("cpu"), f"the merged change of {name}")
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


def as_lora(changes: Mapping[Target, Delta], rank: int | None) -> Lora:
    """The changes as an adapter. See ``Patch.lora``."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    discarded: dict[str, float] = {}
    transposed = set()
    for target, delta in changes.items():
        if target.vector:
            raise CannotMount(f"{target.name} is a vector, and adapters are for matrices. Export it to='checkpoint'.")
        try:
            side.refuse(target, delta)  # an adapter is a side mount
        except CannotMount as error:
            raise CannotMount(f"{str(error).partition('Pass mount')[0]}Export it to='checkpoint'.") from None
        low, discarded[target.name] = _factors(target, delta, rank)
        if low.rank:
            factors[target.name.removesuffix(".weight")] = low.b, low.a
            transposed.add(target.transposed)
    if not factors:
        raise BadInput("the patch changes nothing, so there is no adapter to write.")
    if len(transposed) > 1:
        raise CannotMount("the patch changes both Conv1D and Linear weights. Export it to='checkpoint'.")
    return Lora(factors, discarded, transposed.pop())


def _factors(target: Target, delta: Delta, rank: int | None) -> tuple[LowRank, float]:
    """The change as low-rank factors in fp32, and the share of its energy that was cut off."""
    exact = _exact(delta.to("cpu", torch.float32), target)
    out, width = delta.shape
    if rank is None:
        if isinstance(exact, Dense) or exact.rank * (out + width) > out * width:
            size = f"rank {exact.rank}" if isinstance(exact, LowRank) else "full rank"
            raise BadInput(
                f"the change of {target.name} has {size}: an exact adapter outgrows the weight. Pass rank=... (--rank)."
            )
        return exact, 0.0
    if rank < 1:
        raise BadInput(f"rank is {rank}, it must be at least 1.")
    if isinstance(exact, LowRank) and exact.rank <= rank:
        return exact, 0.0
    u, s, vt = torch.linalg.svd(exact.dense().double(), full_matrices=False)
    energy, root = s.square(), s[:rank].sqrt()
    cut = LowRank((u[:, :rank] * root).float(), (root[:, None] * vt[:rank]).float())
    return cut, float(energy[rank:].sum() / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny))


def _exact(delta: Delta, target: Target) -> LowRank | Dense:
    """The same change as factors where its form gives them away."""
    if isinstance(delta, Sparse):
        delta = delta.to_rows()
    if isinstance(delta, Rows):
        return LowRank(one_hot(delta.index, delta.out).float().T, delta.value)
    if isinstance(delta, Scale):
        columns = target.oriented(target.parameter.detach())[:, delta.index.to(target.parameter.device)]
        return LowRank(columns.cpu().float() * (delta.factor - 1), one_hot(delta.index, delta.shape[1]).float())
    assert isinstance(delta, Addition)
    return delta if isinstance(delta, LowRank) else Dense(delta.dense())
