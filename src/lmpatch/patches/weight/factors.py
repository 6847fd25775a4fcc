"""Changes of weights as the factors of an adapter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ...errors import BadInput, CannotMount
from ..lora import Lora
from . import side
from .delta import Addition, Delta, Dense, LowRank, Rows, Scale, Sparse
from .target import Target


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
