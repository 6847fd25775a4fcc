"""A trainable change of weights, as hooks: LoRA factors or whole matrices beside projections that are not written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.hooks import Hook
from ..models.lm import LM
from ..patches.weight.delta import Delta, Dense, LowRank

Modules = Literal["attention", "mlp", "all"]
Factors = Mapping[str, Tensor]
"""Of one projection: ``a`` [r, in] and ``b`` [out, r] for ΔW = scale · B A, or ``w`` [out, in]. Each may have one more
dimension in front: a change of its own for each row of the batch."""


def projections(lm: LM, modules: Modules = "all") -> list[list[str]]:
    """The linear projections of each block, those of attention first."""
    layout, blocks = lm.layout, []
    for layer in range(layout.n_layers):
        attention = [*layout.attn_ins[layer], layout.attn_outs[layer]]
        mlp = [*layout.ups[layer], layout.downs[layer]]
        blocks.append({"attention": attention, "mlp": mlp, "all": attention + mlp}[modules])
    return blocks


def shape(lm: LM, module: str) -> tuple[int, int]:
    """(out, in) of a projection, however the model stores its weight."""
    size = lm.parameter(lm.layout.weight(module)).shape
    out, width = size[::-1] if lm.layout.transposed else size
    return int(out), int(width)


def drawn(rank: int, width: int, generator: torch.Generator) -> Tensor:
    """A of a LoRA as it starts, [rank, width] with spread 1/√width; B starts at zero."""
    start: Tensor = torch.randn(rank, width, generator=generator) / width**0.5
    return start


def low_rank(lm: LM, modules: Iterable[str], rank: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """Factors of a LoRA on these projections as they start, fp32 leaves of autograd on the model's device."""
    generator, factors = torch.Generator().manual_seed(seed), {}
    for module in modules:
        out, width = shape(lm, module)
        pair = {"b": torch.zeros(out, rank), "a": drawn(rank, width, generator)}
        factors[module] = {key: value.to(lm.device).requires_grad_() for key, value in pair.items()}
    return factors


def hooks(lm: LM, factors: Mapping[str, Factors], scale: float = 1.0) -> list[Hook]:
    """Hooks that add the change to each projection's output, in the dtype of its input."""

    def adder(own: Factors) -> Callable[..., Tensor]:
        def add(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0]
            if "w" in own:
                return output + _times(x, own["w"])
            return output + scale * _times(_times(x, own["a"]), own["b"])

        return add

    return [Hook(lm.module(module), adder(own)) for module, own in factors.items()]


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """W x for inputs x [..., in]; of a weight [n, out, in] the part of each of the n rows of the batch."""
    if weight.ndim == 2:
        return F.linear(x, weight.to(x.dtype))
    rows = x.reshape(len(weight), -1, x.shape[-1])  # some models flatten rows and tokens
    return (rows @ weight.to(x.dtype).mT).reshape(*x.shape[:-1], -1)


def deltas(lm: LM, factors: Mapping[str, Factors], scale: float = 1.0) -> dict[str, Delta]:
    """The change by parameter name."""
    return {
        lm.layout.weight(module): Dense(own["w"].detach())
        if "w" in own
        else LowRank(own["b"].detach() * scale, own["a"].detach())
        for module, own in factors.items()
    }
