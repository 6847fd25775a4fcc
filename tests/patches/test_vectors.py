"""Vectors, biases and norms' weights, are changed like matrices with one column."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_lm

from lmpatch.errors import CannotMount
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM
from lmpatch.patches.export import export
from lmpatch.patches.file import load_patch
from lmpatch.patches.ledger import apply
from lmpatch.patches.merge import merge
from lmpatch.patches.weight.delta import Delta, Dense, Scale
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.patches.weight.target import find_targets

IDS = torch.arange(3, 27).reshape(2, 12)
PLACES = {  # family -> (vector, the module that uses it)
    "gemma3": ("model.layers.1.post_feedforward_layernorm.weight", "model.layers.1.post_feedforward_layernorm"),
    "llama": ("model.layers.1.input_layernorm.weight", "model.layers.1.input_layernorm"),
    "gpt2": ("transformer.h.1.mlp.c_proj.bias", "transformer.h.1.mlp.c_proj"),
}
places = pytest.mark.parametrize("family", PLACES)


def times(factor: float, lm: LM, name: str) -> WeightPatch:
    shape = (len(lm.parameter(name)), 1)
    return WeightPatch.make(lm, {name: Scale(torch.tensor([0]), torch.tensor([factor]), shape)}, method="scale")


@torch.no_grad()
def logits(lm: LM) -> torch.Tensor:
    out: torch.Tensor = lm.model(IDS).logits
    return out


@places
@pytest.mark.parametrize("mount", ["bake", "side"])
@pytest.mark.parametrize("factor", [0.0, 0.3, -2.0])
def test_a_scaled_vector_acts_times_that_factor_and_comes_back_to_the_bit(
    family: str, mount: Any, factor: float
) -> None:
    lm = tiny_lm(family)
    name, module = PLACES[family]
    clean, vector = logits(lm), lm.parameter(name).clone()

    def by_hand(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        return output + (factor - 1) * vector if name.endswith("bias") else output * factor

    with hooked(Hook(lm.module(module), by_hand)):
        want = logits(lm)
    with apply(lm, times(factor, lm, name), mount=mount):
        torch.testing.assert_close(logits(lm), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(lm), clean)
    assert torch.equal(lm.parameter(name), vector)
    assert not lm.module(module)._forward_hooks


@pytest.mark.slow
@places
@pytest.mark.parametrize("mount", ["bake", "side"])
def test_scales_of_a_vector_multiply_and_muting_twice_is_muting_once(family: str, mount: Any) -> None:
    lm = tiny_lm(family)
    name, _ = PLACES[family]
    with apply(lm, times(0.3 * 0.5, lm, name), mount=mount):
        want = logits(lm)
    with apply(lm, times(0.3, lm, name), mount=mount), apply(lm, times(0.5, lm, name), mount=mount):
        torch.testing.assert_close(logits(lm), want, atol=1e-5, rtol=1e-5)
    with apply(lm, merge(times(0.3, lm, name), times(0.5, lm, name)), mount=mount):
        torch.testing.assert_close(logits(lm), want, atol=1e-5, rtol=1e-5)
    mute = times(0.0, lm, name)
    with apply(lm, mute, mount=mount):
        once = logits(lm)
        with apply(lm, mute, mount=mount):
            assert torch.equal(logits(lm), once)


@pytest.mark.parametrize(("family", "offset"), [("gemma3", 1.0), ("llama", 0.0), ("gpt2", 0.0)])
def test_what_a_norm_adds_to_its_weight_is_told_by_running_it(family: str, offset: float) -> None:
    lm = tiny_lm(family)
    name = f"{lm.layout.final_norm}.weight"
    (target,) = find_targets(lm.model, {name: (lm.layout.d_model, 1)}).values()
    assert target.offset == offset
    lm.module(lm.layout.final_norm or "").register_forward_hook(lambda m, a, o: 0 * o)
    (target,) = find_targets(lm.model, {name: (lm.layout.d_model, 1)}).values()
    assert target.offset == offset


@places
@pytest.mark.parametrize("mount", ["bake", "side"])
def test_a_factor_of_one_changes_no_bit(family: str, mount: Any) -> None:
    lm = tiny_lm(family)
    clean = logits(lm)
    with apply(lm, times(1.0, lm, PLACES[family][0]), mount=mount):
        assert torch.equal(logits(lm), clean)


def test_a_vector_saved_and_loaded_does_the_same(tmp_path: Any) -> None:
    lm = tiny_lm("gemma3")
    patch = times(0.3, lm, PLACES["gemma3"][0])
    patch.save(tmp_path / "patch")
    with apply(lm, patch):
        want = logits(lm)
    with apply(lm, load_patch(tmp_path / "patch")):
        assert torch.equal(logits(lm), want)


def test_what_hooks_cannot_do_to_a_vector_is_refused_and_baking_does_it() -> None:
    lm = tiny_lm("gpt2")
    bias, norm = PLACES["gpt2"][0], "transformer.h.1.ln_2.weight"
    ones: dict[str, Delta] = {bias: Dense(torch.ones(lm.layout.d_model, 1))}
    add = WeightPatch.make(lm, ones, method="add")
    before = lm.parameter(bias).clone()
    with apply(lm, add):
        torch.testing.assert_close(lm.parameter(bias), before + 1)
    for patch in (add, times(0.5, lm, norm)):  # an addition; a norm that has a bias too
        with pytest.raises(CannotMount, match="mount='bake'"):
            apply(lm, patch, mount="side")
    assert torch.equal(lm.parameter(bias), before)


def test_a_vector_is_no_adapter(tmp_path: Any) -> None:
    lm = tiny_lm("gemma3")
    with pytest.raises(CannotMount, match="is a vector.*checkpoint"):
        export(lm, times(0.3, lm, PLACES["gemma3"][0]), "peft", tmp_path / "adapter")
