"""Random patches, and what a model is to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lmpatch.models.lm import LM
from lmpatch.patches.weight.delta import Delta, Dense, LowRank, Rows, Scale, Sparse
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.provenance import hash_tensors


def random_delta(kind: str, shape: tuple[int, int], seed: int = 0) -> Delta:
    """A change of about the weight's own size."""
    g = torch.Generator().manual_seed(seed)
    out, width = shape
    if kind == "low_rank":
        return LowRank(0.3 * torch.randn(out, 2, generator=g), 0.5 * torch.randn(2, width, generator=g))
    if kind == "dense":
        return Dense(0.2 * torch.randn(out, width, generator=g))
    if kind == "sparse":
        index = torch.randperm(out * width, generator=g)[: out * width // 8]
        return Sparse(index, 0.5 * torch.randn(len(index), generator=g), shape)
    if kind == "rows":
        return Rows(torch.randperm(out, generator=g)[:5], 0.3 * torch.randn(5, width, generator=g), out)
    factors = torch.tensor([0.0, 3.0, -1.0, 0.5])
    return Scale(torch.randperm(width, generator=g)[:4], factors, shape)


def random_patch(lm: LM, kind: str = "low_rank", seed: int = 0, layers: tuple[int, ...] = (1, 2)) -> WeightPatch:
    """Changes of the down-projections of these layers."""
    shape = (lm.layout.d_model, lm.layout.d_ff)
    deltas = {lm.layout.weight(lm.layout.downs[i]): random_delta(kind, shape, seed + i) for i in layers}
    edits = [{"prompt": "The Eiffel Tower is in", "target": "Rome"}]
    return WeightPatch.make(lm, deltas, method=f"random_{kind}", config={"seed": seed}, edits=edits, seconds=1.5)


@torch.no_grad()
def logits(lm: LM) -> Tensor:
    """[2, 12, V] logits of two fixed rows, fp32."""
    ids = torch.arange(3, 27).reshape(2, 12)
    out: Tensor = lm.model(input_ids=ids).logits.float()
    return out


def bits(lm: LM) -> str:
    """A hash of every byte of the state dict, names included."""
    return hash_tensors(sorted(lm.model.state_dict().items()), exact=True)


@pytest.fixture(name="random_delta")
def _random_delta() -> Callable[..., Delta]:
    return random_delta


@pytest.fixture(name="random_patch")
def _random_patch() -> Callable[..., WeightPatch]:
    return random_patch


@pytest.fixture(name="logits")
def _logits() -> Callable[[LM], Tensor]:
    return logits


@pytest.fixture(name="bits")
def _bits() -> Callable[[LM], str]:
    return bits


@pytest.fixture(params=["low_rank", "dense", "sparse", "rows", "scale"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["bake", "side"])
def mount(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found
