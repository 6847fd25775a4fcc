"""``export``: a patch in a form that other libraries load without lmpatch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from ..errors import BadInput, CannotMount
from ..files import new_folder
from ..models.lm import LM
from .ledger import applied, apply, check
from .patch import Patch
from .weight import side
from .weight.delta import Addition, Delta, Dense, LowRank, Rows, Scale, Sparse
from .weight.patch import Target, WeightPatch


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    ranks: dict[str, int] = field(default_factory=dict)
    """PEFT: weight -> rank of its adapter. A change that is zero has none."""
    discarded: dict[str, float] = field(default_factory=dict)
    """PEFT: weight -> share of ‖ΔW‖² that ``rank`` cut off; 0 for an exact adapter."""


def export(
    lm: LM, patch: Patch, to: Literal["peft", "checkpoint"], out: str | Path, *, rank: int | None = None
) -> Exported:
    """Write a patch as a LoRA adapter (``peft``) or a whole patched model (``checkpoint``).

    The adapter's rank differs from weight to weight and alpha is the rank, so that the adapter is the change itself.
    The checkpoint is what ``save_pretrained`` writes with the patch baked in, tokenizer included; ``lm`` is as before
    afterwards.

    Args:
        out: a folder that does not exist yet or is empty.
        rank: PEFT: cut every change to this rank at most, by its singular values. None: exact, or an error
            where an exact adapter would be larger than the weight.
    Raises:
        BadInput: ``out`` holds something, other patches are on the model, or an exact adapter would be too large.
        CannotMount: the change cannot be an adapter, or cannot be baked.
        WrongModel: the patch was made for another model.
    """
    if not isinstance(patch, WeightPatch):
        raise BadInput(f"cannot export {type(patch).__name__}. Give a WeightPatch.")
    if to not in ("peft", "checkpoint"):
        raise BadInput(f"cannot export to {to!r}. There are peft and checkpoint.")
    if rank is not None and to == "checkpoint":
        raise BadInput("a rank was given, but a checkpoint has none. Leave rank out, or export to='peft'.")
    if applied(lm):
        raise BadInput(f"{len(applied(lm))} patches are on {lm.name}. Take them off, or merge them with this one.")
    return _peft(lm, patch, Path(out), rank) if to == "peft" else _checkpoint(lm, patch, Path(out))


def _checkpoint(lm: LM, patch: WeightPatch, out: Path) -> Exported:
    with new_folder(out) as folder, apply(lm, patch, "bake"):
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    return Exported(out)


def _peft(lm: LM, patch: WeightPatch, out: Path, rank: int | None) -> Exported:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    discarded: dict[str, float] = {}
    transposed = set()
    for name, target in check(lm, patch).items():
        _refuse(target)
        factors, discarded[name] = _factors(name, patch.deltas[name], target, rank)
        if not factors.rank:
            continue
        module = name.removesuffix(".weight")
        ranks[module] = factors.rank
        transposed.add(target.transposed)
        tensors[f"base_model.model.{module}.lora_A.weight"] = factors.a.contiguous()  # [r, in]
        tensors[f"base_model.model.{module}.lora_B.weight"] = factors.b.contiguous()  # [out, r]
    if not tensors:
        raise BadInput("the patch changes nothing, so there is no adapter to write.")
    if len(transposed) > 1:
        raise CannotMount("the patch changes both Conv1D and Linear weights. Export it to='checkpoint'.")
    with new_folder(out) as folder:
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = _config(lm, ranks, transposed.pop())
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Exported(out, {f"{module}.weight": r for module, r in ranks.items()}, discarded)


def _config(lm: LM, ranks: Mapping[str, int], transposed: bool) -> dict[str, Any]:
    largest = max(ranks.values())
    odd = {module: r for module, r in ranks.items() if r != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(lm.model.config, "_name_or_path", "") or lm.name,
        "r": largest,
        "lora_alpha": largest,  # alpha / r = 1: the adapter is the change itself
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _refuse(target: Target) -> None:
    if target.vector:
        raise CannotMount(f"{target.name} is a vector, and adapters are for matrices. Export it to='checkpoint'.")
    try:
        side.refuse(target)  # an adapter is a side mount
    except CannotMount as error:
        raise CannotMount(f"{str(error).partition('Pass mount')[0]}Export it to='checkpoint'.") from None


def _factors(name: str, delta: Delta, target: Target, rank: int | None) -> tuple[LowRank, float]:
    """The change as low-rank factors in fp32, and the share of its energy that was cut off."""
    delta = delta.to("cpu", torch.float32)
    out, width = delta.shape
    exact = _exact(delta, target)
    if rank is None:
        if isinstance(exact, Dense) or exact.rank * (out + width) > out * width:
            found = f"rank {exact.rank}" if isinstance(exact, LowRank) else "full rank"
            raise BadInput(f"the change of {name} has {found}: an exact adapter outgrows the weight. Pass rank=...")
        return exact, 0.0
    if rank < 1:
        raise BadInput(f"rank is {rank}, it must be at least 1.")
    if isinstance(exact, LowRank) and exact.rank <= rank:
        return exact, 0.0
    u, s, vt = torch.linalg.svd(exact.dense().double(), full_matrices=False)
    energy = s.square()
    root = s[:rank].sqrt()
    cut = LowRank((u[:, :rank] * root).float(), (root[:, None] * vt[:rank]).float())
    return cut, float(energy[rank:].sum() / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny))


def _exact(delta: Delta, target: Target) -> LowRank | Dense:
    """The same change as factors where its form gives them away."""
    if isinstance(delta, Sparse):
        delta = delta.to_rows()
    if isinstance(delta, Rows):
        return LowRank(_one_hot(delta.index, delta.shape[0]).T, delta.value)
    if isinstance(delta, Scale):
        columns = target.oriented(target.parameter.detach())[:, delta.index.to(target.parameter.device)]
        return LowRank(columns.cpu().float() * (delta.factor - 1), _one_hot(delta.index, delta.shape[1]))
    assert isinstance(delta, Addition)
    return delta if isinstance(delta, LowRank) else Dense(delta.dense())


def _one_hot(index: Tensor, size: int) -> Tensor:
    return torch.nn.functional.one_hot(index, size).float()  # [n, size]
