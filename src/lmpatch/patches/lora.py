"""``Lora``: a patch as low-rank factors, and the folder that PEFT reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
from huggingface_hub.constants import HF_HUB_CACHE
from torch import Tensor, nn
from torch.nn.functional import pad

from ..files import cache_dir
from ..models.hooks import Hook
from ..models.lm import LM


@dataclass(frozen=True)
class Lora:
    """Changes of the weights of projections, as factors."""

    factors: dict[str, tuple[Tensor, Tensor]]
    """Module name -> B [out, r] and A [r, in], fp32: ΔW = B A."""
    discarded: dict[str, float]
    """Weight -> share of ‖ΔW‖² that is missing; 0 for an exact adapter."""
    transposed: bool
    """The modules store their weights as (in, out)."""

    @property
    def ranks(self) -> dict[str, int]:
        """Module name -> rank."""
        return {module: len(a) for module, (_, a) in self.factors.items()}

    def write(self, lm: LM, folder: Path) -> None:
        """Write the adapter of ``lm`` into a folder.

        Zeros fill every module up to the largest rank, and alpha is that rank: some loaders read one of each, and a
        rank of its own for a module would scale that module's change.
        """
        rank, tensors = max(self.ranks.values()), {}
        for module, (b, a) in self.factors.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = pad(a, (0, 0, 0, rank - len(a))).contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = pad(b, (0, rank - len(a))).contiguous()
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        source = str(getattr(lm.model.config, "_name_or_path", ""))
        cached = any(Path(source).is_relative_to(cache) for cache in (cache_dir(), HF_HUB_CACHE))
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": lm.name if cached or not source else source,
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted(self.factors),
            "fan_in_fan_out": self.transposed,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Lora:
        """What a loader that knows one rank and one alpha makes of the folder."""
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        found = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        scale, factors = config["lora_alpha"] / config["r"], {}
        for name in config["target_modules"]:
            a, b = (found[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            factors[name] = scale * b, a
        return cls(factors, {}, config["fan_in_fan_out"])

    def hooks(self, lm: LM) -> list[Hook]:
        """What adds the change to the outputs of the model's modules."""

        def add(factors: tuple[Tensor, Tensor], _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            b, a = (t.to(output) for t in factors)
            return output + args[0] @ a.T @ b.T

        return [Hook(lm.module(name), partial(add, factors)) for name, factors in self.factors.items()]
