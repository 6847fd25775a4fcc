"""``merge``: several patches as one. Additions sum, scales multiply, so the order does not matter; decode rules keep
theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CannotMerge, WrongModel
from ..provenance import now, versions
from .decode.patch import DecodePatch
from .hook.patch import SteerPatch, summed
from .memory.patch import MemoryPatch
from .patch import Base, Patch
from .weight.delta import Addition, Delta, Dense, LowRank, Rows, Scale, Sparse
from .weight.patch import WeightPatch
from .weight.side import join


def merge(first: Patch, *others: Patch) -> Patch:
    """One patch that does what all of them do together: changes of weights add up, memories hold the facts of all,
    decode rules act one after the other.

    Args:
        first, others: patches of one kind for one model. Edits are kept in this order; extras of one name are
            joined along their first axis.
    Returns:
        a new patch whose method names theirs, ``rome+memit``. Low-rank changes stay low-rank while that is smaller.
    Raises:
        WrongModel: they were made for different models.
        CannotMerge: different kinds, a scale meets an addition on one weight, or extras do not fit together.
    """
    patches = (first, *others)
    kinds = sorted({p.kind for p in patches})
    if len(kinds) > 1:
        raise CannotMerge(f"cannot merge patches of kind {' and '.join(kinds)}. Apply both instead.")
    prints = {p.base.fingerprint: p.base.name for p in patches}
    if len(prints) > 1:
        models = " and ".join(f"{name} ({print[:12]})" for print, name in prints.items())
        raise WrongModel(f"cannot merge patches for different models: {models}. Fit them on one model.")
    memories = [p for p in patches if isinstance(p, MemoryPatch)]
    if memories:
        return memories[0].unite(*memories[1:])
    decodes = [p for p in patches if isinstance(p, DecodePatch)]
    if decodes:
        return DecodePatch(**_common(decodes), rules=tuple(rule for p in decodes for rule in p.rules))
    steers = [p for p in patches if isinstance(p, SteerPatch)]
    if steers:
        return SteerPatch(**_common(steers), **summed(steers))
    return _weights([p for p in patches if isinstance(p, WeightPatch)])


def _common(patches: Sequence[Patch]) -> dict[str, Any]:
    """The fields of ``Patch``."""
    return {
        "method": "+".join(dict.fromkeys(m for p in patches for m in p.method.split("+"))),
        "config": {"merged": [{"method": p.method, "config": p.config, "hash": p.hash()} for p in patches]},
        "base": Base(
            patches[0].base.fingerprint,
            patches[0].base.name,
            {name: digest for p in patches for name, digest in p.base.touched.items()},
        ),
        "edits": tuple(edit for p in patches for edit in p.edits),
        "made": _made(patches),
        "extras": _extras(patches),
    }


def _weights(patches: Sequence[WeightPatch]) -> WeightPatch:
    names = sorted({name for p in patches for name in p.deltas})
    return WeightPatch(
        **_common(patches),
        deltas={name: combine(name, [p.deltas[name] for p in patches if name in p.deltas]) for name in names},
    )


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


def _made(patches: Sequence[Patch]) -> dict[str, Any]:
    norms = {name: norm for p in patches for name, norm in p.made.get("weight_norms", {}).items()}
    seconds = sum(p.made.get("seconds", 0.0) for p in patches)
    return {"finished": now(), "versions": versions(), "seconds": seconds, "weight_norms": norms}


def _extras(patches: Sequence[Patch]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for p in patches:
        for name, t in p.extras.items():
            found.setdefault(name, []).append(t)
    try:
        return {name: torch.cat(ts) if len(ts) > 1 else ts[0] for name, ts in found.items()}
    except RuntimeError as error:
        raise CannotMerge(f"extras of one name do not fit together ({error}). Merge without them.") from None
