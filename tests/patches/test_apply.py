"""What a patch does to a model and that nothing of it stays, for every kind of change and both mounts."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from tiny import CORE, tiny_lm

from lmpatch.models.lm import LM
from lmpatch.patches.ledger import applied, apply
from lmpatch.patches.merge import merge
from lmpatch.patches.weight.delta import Dense, LowRank, Scale
from lmpatch.patches.weight.patch import WeightPatch


@pytest.mark.parametrize("family", CORE)
def test_apply_changes_the_logits_and_remove_restores_every_bit(
    family, dtype, kind, mount, random_patch, logits, bits
) -> None:
    lm = tiny_lm(family, dtype)
    before, was = logits(lm), bits(lm)
    patch = random_patch(lm, kind)
    assert bits(lm) == was
    with apply(lm, patch, mount) as on:
        assert applied(lm) == (on,)
        assert (logits(lm) - before).abs().max() > 0.1
        assert (bits(lm) == was) == (mount == "side")
    assert bits(lm) == was
    assert torch.equal(logits(lm), before)
    assert applied(lm) == () and not [name for name in vars(lm.model) if "lmpatch" in name]


@pytest.mark.parametrize("family", CORE)
def test_both_mounts_agree(family, dtype, kind, random_patch, logits) -> None:
    """To 1e-5 of the largest logit in fp32. In bf16 to 5 %: each mount rounds in other places, four blocks deep."""
    lm = tiny_lm(family, dtype)
    patch = random_patch(lm, kind)
    with apply(lm, patch, "bake"):
        baked = logits(lm)
    with apply(lm, patch, "side"):
        aside = logits(lm)
    assert (baked - aside).abs().max() < (1e-5 if dtype == torch.float32 else 0.05) * baked.abs().max()


@pytest.mark.slow
def test_the_side_mount_adds_on_the_input_before_it_is_scaled(lm: LM, random_patch, logits) -> None:
    kinds = ("scale", "low_rank", "rows", "scale", "dense", "low_rank", "sparse")
    patches = [random_patch(lm, kind, seed=10 * i) for i, kind in enumerate(kinds)]
    out = {}
    for mount in ("bake", "side"):
        handles = [apply(lm, patch, mount) for patch in patches]
        out[mount] = logits(lm)
        for handle in handles:
            handle.remove()
    assert (out["bake"] - out["side"]).abs().max() < 2e-5 * out["bake"].abs().max()


def test_a_muted_neuron_is_exactly_silent(lm: LM, mount) -> None:
    name = lm.layout.weight(lm.layout.downs[1])
    shape = (lm.layout.d_model, lm.layout.d_ff)
    mute = WeightPatch.make(lm, {name: Scale(torch.arange(shape[1]), torch.zeros(shape[1]), shape)}, method="mute")
    down, seen = lm.module(lm.layout.downs[1]), []
    with apply(lm, mute, mount):
        handle = down.register_forward_hook(lambda module, args, output: seen.append(output))
        lm.model(input_ids=torch.arange(3, 9)[None])
        handle.remove()
    bias = down.bias if getattr(down, "bias", None) is not None else torch.zeros(())
    assert torch.equal(seen[0], bias.expand_as(seen[0]))


def test_an_empty_patch_does_nothing_to_the_bit(lm: LM, mount, logits, bits) -> None:
    before, was = logits(lm), bits(lm)
    with apply(lm, WeightPatch.make(lm, {}, method="nothing"), mount) as on:
        assert torch.equal(logits(lm), before) and bits(lm) == was and on.rounding_error == 0


@pytest.mark.slow
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_patches_come_off_in_any_order(order, mount, random_patch, logits, bits) -> None:
    lm = tiny_lm("gpt2", torch.bfloat16)
    was = bits(lm)
    patches = [
        random_patch(lm, "low_rank", 1),
        random_patch(lm, "scale", 2, layers=(2, 3)),
        random_patch(lm, "dense", 3, layers=(1,)),
        random_patch(lm, "rows", 4, layers=(0, 1)),
    ]
    handles = [apply(lm, patch, mount) for patch in patches]
    left = list(range(4))
    for i in order:
        handles[i].remove()
        left.remove(i)
        assert [a.patch for a in applied(lm)] == [patches[j] for j in left]
        now = bits(lm), logits(lm)
        again = tiny_lm("gpt2", torch.bfloat16)
        for j in left:
            apply(again, patches[j], mount)
        assert now[0] == bits(again) and torch.equal(now[1], logits(again))
    assert bits(lm) == was


@pytest.mark.slow
def test_a_patch_and_its_opposite_are_nothing(dtype, random_patch, bits) -> None:
    lm = tiny_lm("llama", dtype)
    was = bits(lm)
    for kind in ("low_rank", "dense", "sparse", "rows"):
        patch = random_patch(lm, kind)
        with apply(lm, patch), apply(lm, patch.scaled(-1)):
            assert bits(lm) == was


def test_a_patch_applied_twice_acts_twice(lm: LM, mount, random_patch, logits) -> None:
    patch = random_patch(lm)
    with apply(lm, patch, mount), apply(lm, patch, mount):
        twice = logits(lm)
    with apply(lm, patch.scaled(2), mount):
        torch.testing.assert_close(logits(lm), twice, atol=1e-4, rtol=1e-4)


def test_stacked_patches_do_what_their_merge_does(lm: LM, kind, mount, random_patch, logits) -> None:
    a, b = random_patch(lm, kind, 1), random_patch(lm, kind, 7, layers=(0, 1))
    with apply(lm, a, mount), apply(lm, b, mount):
        stacked = logits(lm)
    with apply(lm, merge(a, b), mount):
        torch.testing.assert_close(logits(lm), stacked, atol=1e-4, rtol=1e-4)


def test_strength_goes_from_nothing_to_the_patch(lm: LM, kind, random_patch, logits) -> None:
    before, patch = logits(lm), random_patch(lm, kind)
    with apply(lm, patch.scaled(0.0)):
        assert torch.equal(logits(lm), before)
    with apply(lm, patch):
        full = logits(lm)
    with apply(lm, patch.scaled(1.0)):
        assert torch.equal(logits(lm), full)
    with apply(lm, patch.scaled(0.5)):
        half = logits(lm)
    assert not torch.equal(half, full) and not torch.equal(half, before)


def test_an_error_inside_with_still_removes(lm: LM, mount, random_patch, bits, logits) -> None:
    was, before = bits(lm), logits(lm)
    with pytest.raises(KeyError), apply(lm, random_patch(lm), mount), apply(lm, random_patch(lm, "scale"), mount):
        raise KeyError
    assert bits(lm) == was and torch.equal(logits(lm), before)


def test_a_second_remove_does_nothing(lm: LM, mount, random_patch, bits) -> None:
    patch, other = random_patch(lm), random_patch(lm, seed=5)
    handle = apply(lm, patch, mount)
    kept = apply(lm, other, mount)
    handle.remove()
    with_other = bits(lm)
    handle.remove()
    assert bits(lm) == with_other and applied(lm) == (kept,)


@pytest.mark.slow
def test_the_fingerprint_is_of_the_model_without_patches(lm: LM, random_patch) -> None:
    plain, patch = lm.fingerprint(), random_patch(lm)
    with apply(lm, patch):
        fresh = replace(lm, _fingerprint=None)
        assert fresh.fingerprint() == plain
        assert random_patch(fresh).base == patch.base
        with apply(fresh, patch):
            assert len(applied(lm)) == 2
    changed = replace(tiny_lm("llama", seed=1), _fingerprint=None)
    assert changed.fingerprint() != plain


def test_applied_under_inference_mode_it_comes_off_outside(lm: LM, mount, random_patch, bits) -> None:
    was, patch = bits(lm), random_patch(lm)
    with torch.inference_mode():
        handle = apply(lm, patch, mount)
        lm.model(input_ids=torch.arange(3, 9)[None])
    handle.remove()
    assert bits(lm) == was


def test_gradients_pass_through_a_side_mount_first_used_in_inference_mode(lm: LM, kind, random_patch) -> None:
    embedded = lm.module(lm.layout.embed)(torch.arange(3, 9)[None]).detach().requires_grad_()
    with apply(lm, random_patch(lm, kind), "side"):
        with torch.inference_mode():
            lm.model(input_ids=torch.arange(3, 9)[None])
        lm.model(inputs_embeds=embedded).logits.square().mean().backward()
    assert embedded.grad is not None and embedded.grad.abs().max() > 0


def rank_one(weight: torch.Tensor, relative: float) -> LowRank:
    """A random rank-one change whose norm is ``relative`` times the weight's."""
    g = torch.Generator().manual_seed(0)
    b, a = torch.randn(weight.shape[0], 1, generator=g), torch.randn(1, weight.shape[1], generator=g)
    return LowRank(b * relative * weight.float().norm() / (b @ a).norm(), a)


@pytest.mark.parametrize(("relative", "lost"), [(0.1, 0.017), (0.01, 0.15), (0.001, 0.71)])
def test_baking_into_bf16_loses_this_share(relative: float, lost: float, mount) -> None:
    lm = tiny_lm("llama", torch.bfloat16)
    name = lm.layout.weight(lm.layout.downs[1])
    patch = WeightPatch.make(lm, {name: rank_one(lm.parameter(name), relative)}, method="rank_one")
    with apply(lm, patch, mount) as on:
        assert on.rounding_error == pytest.approx(lost if mount == "bake" else 0.0, rel=0.1)


def test_baking_into_fp32_loses_next_to_nothing(kind, random_patch) -> None:
    lm = tiny_lm("llama")
    below = random_patch(lm, "low_rank", 9), random_patch(lm, "scale")
    with apply(lm, below[0]), apply(lm, below[1]), apply(lm, random_patch(lm, kind)) as on:
        assert on.rounding_error < 1e-6


def test_a_change_too_small_for_bf16_is_lost_whole() -> None:
    lm = tiny_lm("llama", torch.bfloat16)
    name = lm.layout.weight(lm.layout.downs[1])
    patch = WeightPatch.make(lm, {name: Dense(lm.parameter(name).float() * 1e-4)}, method="tiny")
    with apply(lm, patch) as on:
        assert on.rounding_error == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("relative", "left"), [(1.0, 0.29), (0.1, 0.09)])
def test_undo_by_subtraction_leaves_this_share_of_the_weight_changed(dtype, relative: float, left: float) -> None:
    """Why the ledger keeps originals."""
    weight = (0.02 * torch.randn(640, 2048, generator=torch.Generator().manual_seed(1))).to(dtype)
    change = rank_one(weight, relative).dense().to(dtype)
    back = weight + change - change
    assert float((back != weight).float().mean()) == pytest.approx(left, abs=0.015)


def test_a_patch_and_its_handle_are_shown_in_a_line_and_as_a_table(random_patch) -> None:
    lm = tiny_lm("llama", torch.bfloat16)
    patch = random_patch(lm)
    patch.edits = ({"prompt": "A <b> & C", "target": "D"}, *patch.edits * 5)
    line = rf"<WeightPatch random_low_rank: 6 edits for tiny-llama \({lm.fingerprint()[:12]}\), 3.0 KiB>"
    assert re.fullmatch(line, repr(patch))
    table = patch._repr_html_()
    assert table.count("<tr>") == 5 and "A &lt;b&gt; &amp; C -&gt; D<br>" in table and "<br>…" in table
    assert all(line.strip() in table for line in patch.describe())
    with apply(lm, patch) as on:
        assert re.fullmatch(r"<random_low_rank patch on tiny-llama, mount bake, \d\.\d% lost by rounding>", repr(on))
    assert repr(on).startswith("<random_low_rank patch off tiny-llama")
    with apply(lm, patch, "side") as on:
        assert repr(on) == "<random_low_rank patch on tiny-llama, mount side>"
