"""``Lora``: a patch as low-rank factors, and the folder that PEFT reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

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
        """Write the adapter of ``lm`` into a folder. Alpha is the rank, so that the adapter is the change itself."""
        tensors = {}
        for module, (b, a) in self.factors.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(self._config(lm), indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")

    def _config(self, lm: LM) -> dict[str, Any]:
        largest = max(self.ranks.values())
        odd = {module: r for module, r in self.ranks.items() if r != largest}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": getattr(lm.model.config, "_name_or_path", "") or lm.name,
            "r": largest,
            "lora_alpha": largest,  # alpha / r = 1
            "rank_pattern": odd,
            "alpha_pattern": odd,
            "target_modules": sorted(self.ranks),
            "fan_in_fan_out": self.transposed,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }
