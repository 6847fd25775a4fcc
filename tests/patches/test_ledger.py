"""What the ledger refuses, notices and rolls back."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny import tiny_lm, tiny_model, tiny_tokenizer
from torch import nn

from lmpatch.errors import BadInput, CannotMount, Diverged, ForeignWrite, WrongModel
from lmpatch.models.load import wrap
from lmpatch.patches.ledger import applied, apply, suspended
from lmpatch.patches.weight.bake import Baked
from lmpatch.patches.weight.delta import Dense, LowRank, Rows, Scale
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.patches.weight.side import Side


def down(lm, layer: int = 1) -> str:
    return lm.layout.weight(lm.layout.downs[layer])


# --- the right model ---


def test_a_patch_for_other_weights_is_refused_and_says_which(random_patch, bits, mount) -> None:
    lm, other = tiny_lm("llama"), tiny_lm("llama", seed=1)
    other.name = "another"
    patch, was = random_patch(lm), bits(other)
    with pytest.raises(WrongModel, match=rf"tiny-llama \({lm.fingerprint()[:12]}\).*another.*{down(lm)}"):
        apply(other, patch, mount)
    assert bits(other) == was and applied(other) == ()
    with apply(other, patch, mount, strict=False):
        assert len(applied(other)) == 1
    assert bits(other) == was


def test_a_model_that_differs_elsewhere_is_refused_with_both_fingerprints(random_patch) -> None:
    lm, other = tiny_lm("llama"), tiny_lm("llama")
    with torch.no_grad():
        other.parameter(down(lm, 3)).mul_(2)
    with pytest.raises(WrongModel, match=rf"{lm.fingerprint()[:12]}.*{other.fingerprint()[:12]}"):
        apply(other, random_patch(lm))


def test_training_after_the_patch_was_made_is_noticed(random_patch) -> None:
    lm = tiny_lm("llama")
    patch = random_patch(lm)
    with torch.no_grad():
        lm.parameter(down(lm))[0, 0] += 1
    with pytest.raises(WrongModel, match=down(lm)):
        apply(lm, patch)


@pytest.mark.parametrize("strict", [True, False])
def test_another_shape_is_refused_however_lax(strict: bool, random_patch) -> None:
    with pytest.raises(WrongModel, match=r"64 x 128"):
        patch = random_patch(tiny_lm("llama"))
        patch.deltas[down(tiny_lm("llama"))] = Dense(torch.zeros(3, 4))
        apply(tiny_lm("llama"), patch, strict=strict)
    with pytest.raises(WrongModel, match="no parameter"):
        apply(tiny_lm("gpt2"), random_patch(tiny_lm("llama")), strict=strict)


def test_fp32_and_bf16_copies_of_one_model_take_the_same_patch(random_patch) -> None:
    wide, narrow = tiny_lm("llama"), tiny_lm("llama", torch.bfloat16)
    with apply(narrow, random_patch(wide)), apply(wide, random_patch(narrow)):
        assert len(applied(wide)) == len(applied(narrow)) == 1


def test_what_cannot_be_a_patch_is_refused_when_it_is_made() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(BadInput, match="no parameter nowhere"):
        WeightPatch.make(lm, {"nowhere": Dense(torch.zeros(2, 2))}, method="m")
    with pytest.raises(BadInput, match="64 x 128"):
        WeightPatch.make(lm, {down(lm): Dense(torch.zeros(128, 64))}, method="m")
    with pytest.raises(Diverged, match="finite"):
        WeightPatch.make(lm, {down(lm): Dense(torch.full((64, 128), torch.nan))}, method="m")
    with pytest.raises(BadInput, match="bake, side and run"):
        apply(lm, WeightPatch.make(lm, {}, method="m"), "glue")  # type: ignore[arg-type]


def test_a_patch_keeps_its_own_copy_of_the_tensors(random_patch) -> None:
    lm = tiny_lm("llama")
    value = torch.ones(64, 128)
    patch = WeightPatch.make(lm, {down(lm): Dense(value)}, method="m", extras={"keys": value})
    value.zero_()
    assert patch.deltas[down(lm)].norm() > 0 and patch.extras["keys"].sum() > 0


# --- tied weights ---


def embedding_patch(lm, name: str, value: float = 0.5) -> WeightPatch:
    rows = Rows(torch.tensor([5, 9]), torch.full((2, 64), value), lm.layout.vocab)
    return WeightPatch.make(lm, {name: rows}, method="rows")


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_a_tied_weight_is_changed_in_both_uses_and_restored(family: str, bits, logits) -> None:
    lm = tiny_lm(family)
    was, before = bits(lm), logits(lm)
    names = [lm.layout.weight(lm.layout.embed), lm.layout.weight(lm.layout.head)]
    patches = [embedding_patch(lm, names[0]), embedding_patch(lm, names[1], -2.0)]
    assert [list(p.deltas) for p in patches] == [[names[0]]] * 2
    with apply(lm, patches[0]) as first:
        assert set(lm.model._lmpatch_ledger.originals) == set(names)
        with apply(lm, patches[1]):
            head, embed = lm.parameter(names[1]), lm.parameter(names[0])
            assert head.data_ptr() == embed.data_ptr()
            torch.testing.assert_close(head[5], lm.model._lmpatch_ledger.originals[names[1]][5] - 1.5)
            first.remove()
            torch.testing.assert_close(head[5], lm.model._lmpatch_ledger.originals[names[1]][5] - 2.0)
            assert not torch.equal(logits(lm), before)
    assert bits(lm) == was


def test_one_weight_under_two_names_is_refused() -> None:
    lm = tiny_lm("gemma3")
    names = [lm.layout.weight(lm.layout.embed), lm.layout.weight(lm.layout.head)]
    both = {name: embedding_patch(lm, name).deltas[names[0]] for name in names}
    with pytest.raises(BadInput, match="one weight"):
        WeightPatch.make(lm, both, method="m")


def test_a_tied_weight_and_an_embedding_have_no_side_mount() -> None:
    tied, untied = tiny_lm("gemma3"), tiny_lm("llama")
    with pytest.raises(CannotMount, match=r"one weight.*mount='bake'"):
        apply(tied, embedding_patch(tied, tied.layout.weight(tied.layout.head)), "side")
    with pytest.raises(CannotMount, match=r"Embedding.*mount='bake'"):
        apply(untied, embedding_patch(untied, untied.layout.weight(untied.layout.embed)), "side")
    with apply(untied, embedding_patch(untied, untied.layout.weight(untied.layout.head)), "side"):
        assert len(applied(untied)) == 1


# --- foreign writes ---


@pytest.mark.parametrize("row", [0, 17, 63])
def test_a_foreign_write_of_one_number_stops_remove_and_the_next_apply(row: int, dtype, random_patch, bits) -> None:
    lm = tiny_lm("gpt2", dtype)
    was, handle = bits(lm), apply(lm, random_patch(lm))
    weight = lm.parameter(down(lm))
    with torch.no_grad():
        weight[row, 3] += 0.5
    now = bits(lm)
    with pytest.raises(ForeignWrite, match=down(lm)):
        handle.remove()
    with pytest.raises(ForeignWrite, match=r"remove\(force=True\)"):
        apply(lm, random_patch(lm, seed=3))
    assert bits(lm) == now and applied(lm) == (handle,)
    handle.remove(force=True)
    assert bits(lm) == was and applied(lm) == ()


def test_two_swapped_rows_and_two_swapped_numbers_are_noticed(random_patch) -> None:
    for swapped in (lambda w: w[[1, 0]], lambda w: w[:, [1, 0]]):
        lm = tiny_lm("llama")
        handle = apply(lm, random_patch(lm))
        weight = lm.parameter(down(lm))
        with torch.no_grad():
            weight[:2, :2] = swapped(weight[:2, :2].clone())
        with pytest.raises(ForeignWrite):
            handle.remove()


def test_converting_or_replacing_a_baked_weight_is_noticed(random_patch) -> None:
    lm = tiny_lm("llama")
    handle = apply(lm, random_patch(lm))
    lm.model.half()
    with pytest.raises(ForeignWrite):
        handle.remove()
    lm = tiny_lm("llama")
    handle = apply(lm, random_patch(lm))
    lm.module(lm.layout.downs[1]).weight = nn.Parameter(torch.zeros(64, 128))
    with pytest.raises(ForeignWrite):
        handle.remove()


# --- all or nothing ---


class Injected(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("fails_at", [0, 1, 2])
@pytest.mark.parametrize("halfway", [True, False])
def test_a_failure_in_the_middle_leaves_no_trace(
    fails_at: int, halfway: bool, mount, random_patch, bits, logits, monkeypatch
) -> None:
    lm = tiny_lm("gpt2", torch.bfloat16)
    was, before = bits(lm), logits(lm)
    first, second = random_patch(lm, seed=1, layers=(0, 1, 2)), random_patch(lm, seed=2, layers=(0, 2, 3))
    kind = Baked if mount == "bake" else Side
    write, count = kind.write, [0]

    def failing(self, changes):
        count[0] += 1
        if count[0] - 1 == fails_at:
            if halfway:
                write(self, changes)
            raise Injected
        write(self, changes)

    def fail(act) -> None:
        count[0] = 0
        monkeypatch.setattr(kind, "write", failing)
        with pytest.raises(Injected):
            act()
        monkeypatch.setattr(kind, "write", write)

    fail(lambda: apply(lm, second, mount))
    assert bits(lm) == was and torch.equal(logits(lm), before)
    assert not [name for name in vars(lm.model) if "lmpatch" in name]
    handle = apply(lm, first, mount)
    one = bits(lm), logits(lm)
    fail(lambda: apply(lm, second, mount))
    assert applied(lm) == (handle,) and bits(lm) == one[0] and torch.equal(logits(lm), one[1])
    other = apply(lm, second, mount)
    two = bits(lm), logits(lm)
    fail(handle.remove)
    assert applied(lm) == (handle, other) and bits(lm) == two[0] and torch.equal(logits(lm), two[1])
    handle.remove()
    other.remove()
    assert bits(lm) == was


def test_a_write_cut_short_is_undone(random_patch, bits, monkeypatch) -> None:
    lm = tiny_lm("llama")
    was, patch = bits(lm), random_patch(lm)
    target = lm.parameter(down(lm, 2))
    copy = torch.Tensor.copy_

    def torn(self, value):
        if self.data_ptr() == target.data_ptr() and not torch.equal(value, original):
            copy(self[:10], value[:10])
            raise KeyboardInterrupt
        return copy(self, value)

    original = target.detach().clone()
    monkeypatch.setattr(torch.Tensor, "copy_", torn)
    with pytest.raises(KeyboardInterrupt):
        apply(lm, patch)
    monkeypatch.undo()
    assert bits(lm) == was and applied(lm) == ()


def test_an_interrupt_after_the_last_write_is_undone_too(mount, random_patch, bits) -> None:
    class Interrupted(list):  # type: ignore[type-arg]
        def append(self, one: object) -> None:
            super().append(one)
            raise KeyboardInterrupt

    lm = tiny_lm("llama")
    first = apply(lm, random_patch(lm, seed=1), mount)
    one = bits(lm)
    lm.model._lmpatch_ledger.applied = Interrupted([first])
    with pytest.raises(KeyboardInterrupt):
        apply(lm, random_patch(lm), mount)
    assert applied(lm) == (first,) and bits(lm) == one


def test_nothing_is_touched_when_a_later_weight_refuses(random_patch, bits) -> None:
    lm = tiny_lm("llama")
    patch = random_patch(lm, layers=(0, 1, 2))
    lm.module(lm.layout.downs[2]).weight = nn.Parameter(torch.zeros(64, 128, dtype=torch.int8), requires_grad=False)
    was = bits(lm)
    with pytest.raises(CannotMount, match=rf"{down(lm, 2)}.*torch.int8.*mount='side'"):
        apply(lm, patch, strict=False)
    assert bits(lm) == was and applied(lm) == ()


# --- weights that cannot be baked ---


class Packed(torch.Tensor):
    """Stands for a quantiser's own tensor class."""


def test_a_tensor_of_another_class_is_not_baked(random_patch) -> None:
    lm = tiny_lm("llama")
    patch = random_patch(lm)
    module = lm.module(lm.layout.downs[1])
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Packed), requires_grad=False)
    with pytest.raises(CannotMount, match=rf"{down(lm)}.*stored as Packed.*mount='side'"):
        apply(lm, patch, strict=False)
    with pytest.raises(WrongModel, match="cannot be compared"):
        apply(lm, patch)


class Int8Linear(nn.Linear):
    """Stands for a quantised layer: whole numbers, packed flat, and a scale."""

    def pack(self) -> Int8Linear:
        self.step = self.weight.detach().abs().max() / 127
        whole = (self.weight.detach() / self.step).round().to(torch.int8)
        self.weight = nn.Parameter(whole.reshape(-1, 1), requires_grad=False)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.reshape(self.out_features, -1).to(x.dtype) * self.step, self.bias)


def test_a_quantised_layer_takes_the_side_mount_only(random_patch, logits, bits) -> None:
    lm = tiny_lm("llama")
    patch = random_patch(lm, layers=(1,))
    module = Int8Linear(128, 64, bias=False)
    module.weight = lm.parameter(down(lm))
    lm.model.set_submodule(lm.layout.downs[1], module.pack())
    before, was = logits(lm), bits(lm)
    with pytest.raises(CannotMount, match=r"int8.*mount='side'"):
        apply(lm, patch, strict=False)
    x, (delta,) = torch.randn(3, 128), patch.deltas.values()
    plain = module(x)
    with apply(lm, patch, "side", strict=False):
        torch.testing.assert_close(module(x), plain + delta.times(x))  # type: ignore[attr-defined]
        assert not torch.equal(logits(lm), before)
    assert torch.equal(logits(lm), before) and bits(lm) == was


@pytest.mark.slow
def test_offloaded_weights_take_the_side_mount_only(random_patch, logits) -> None:
    accelerate = pytest.importorskip("accelerate")
    lm = tiny_lm("llama")
    patch, before = random_patch(lm), logits(lm)
    with apply(lm, patch, "side"):
        want = logits(lm)
    accelerate.cpu_offload(lm.model, execution_device=torch.device("cpu"))
    assert torch.equal(logits(lm), before)
    with pytest.raises(CannotMount, match=r"offloaded.*mount='side'"):
        apply(lm, patch, strict=False)
    with pytest.raises(WrongModel, match="strict=False"):
        apply(lm, patch, "side")
    with apply(lm, patch, "side", strict=False):
        torch.testing.assert_close(logits(lm), want)
    assert torch.equal(logits(lm), before)


def test_a_patch_can_be_made_on_an_offloaded_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    lm = tiny_lm("llama")
    accelerate.cpu_offload(lm.model, execution_device=torch.device("cpu"))
    patch = WeightPatch.make(lm, {down(lm): Dense(torch.ones(64, 128))}, method="m")
    assert patch.base.fingerprint == "" and patch.base.touched == {down(lm): ""}
    with pytest.raises(WrongModel, match="for certain"):
        apply(tiny_lm("llama"), patch)


# --- two mounts on one weight ---


def test_a_scale_on_the_side_and_a_baked_addition_are_refused_in_either_order(lm, random_patch, bits) -> None:
    was = bits(lm)
    scale, addition = random_patch(lm, "scale"), random_patch(lm)
    with apply(lm, scale, "side"), pytest.raises(CannotMount, match="mount='side' here"):
        apply(lm, addition, "bake")
    with apply(lm, addition, "bake"), pytest.raises(CannotMount, match="mount='bake' here"):
        apply(lm, scale, "side")
    assert bits(lm) == was


def test_a_baked_scale_and_an_addition_on_the_side_keep_to_the_algebra(lm, random_patch, logits) -> None:
    scale, addition = random_patch(lm, "scale"), random_patch(lm)
    with apply(lm, scale, "bake"), apply(lm, addition, "bake"):
        want = logits(lm)
    with apply(lm, scale, "bake"), apply(lm, addition, "side"):
        torch.testing.assert_close(logits(lm), want, atol=1e-4, rtol=1e-4)


def test_hooks_go_off_with_the_last_side_patch(lm, random_patch) -> None:
    module = lm.module(lm.layout.downs[1])
    one, two = apply(lm, random_patch(lm), "side"), apply(lm, random_patch(lm, "scale"), "side")
    assert len(module._forward_hooks) == len(module._forward_pre_hooks) == 1
    one.remove()
    two.remove()
    assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.slow
def test_code_compiled_before_sees_the_side_mount_come_and_go(random_patch) -> None:
    lm = tiny_lm("llama")
    mlp = lm.module(lm.layout.downs[1].rpartition(".")[0])
    x = torch.randn(2, 3, 64)
    compiled = torch.compile(mlp, backend="eager")
    before = compiled(x)
    with apply(lm, random_patch(lm, "scale"), "side"), apply(lm, random_patch(lm), "side"):
        torch.testing.assert_close(compiled(x), mlp(x))
        assert not torch.equal(mlp(x), before)
    assert torch.equal(compiled(x), before)
    with apply(lm, random_patch(lm), "bake"):
        torch.testing.assert_close(compiled(x), mlp(x))
        assert not torch.equal(mlp(x), before)
    assert torch.equal(compiled(x), before)


def test_two_models_share_nothing(random_patch, bits) -> None:
    a, b = tiny_lm("llama"), wrap(tiny_model("llama"), tiny_tokenizer())
    was = bits(b)
    with apply(a, random_patch(a)):
        assert applied(b) == () and bits(b) == was


def test_a_copy_of_a_patched_model_has_patches_of_its_own(lm, random_patch, bits, logits) -> None:
    was = bits(lm)
    with apply(lm, random_patch(lm)), apply(lm, random_patch(lm, seed=4), "side"):
        patched, twin = logits(lm), replace(lm, model=copy.deepcopy(lm.model))
        assert torch.equal(logits(twin), patched)
        for one in applied(twin):
            one.remove()
        assert bits(twin) == was and torch.equal(logits(lm), patched)
    assert torch.equal(logits(twin), logits(lm))


def test_scales_of_two_mounts_multiply(lm, logits) -> None:
    shape = (lm.layout.d_model, lm.layout.d_ff)

    def scale(factor: float) -> WeightPatch:
        return WeightPatch.make(lm, {down(lm): Scale(torch.arange(9), torch.full((9,), factor), shape)}, method="s")

    with apply(lm, scale(6.0)):
        want = logits(lm)
    with apply(lm, scale(2.0), "bake"), apply(lm, scale(3.0), "side"):
        torch.testing.assert_close(logits(lm), want, atol=1e-4, rtol=1e-4)


def test_a_zero_change_counts_as_nothing_lost() -> None:
    lm = tiny_lm("llama")
    patch = WeightPatch.make(lm, {down(lm): LowRank(torch.zeros(64, 1), torch.zeros(1, 128))}, method="zero")
    with apply(lm, patch) as on:
        assert on.rounding_error == 0.0


@pytest.mark.slow
def test_suspended_patches_are_off_inside_and_on_again_after(lm, random_patch, bits, logits) -> None:
    was, before = bits(lm), logits(lm)
    with (
        apply(lm, random_patch(lm)) as a,
        apply(lm, random_patch(lm, "scale"), "bake"),
        apply(lm, random_patch(lm, seed=4, layers=(0,)), "side"),
    ):
        on, patched, held = applied(lm), bits(lm), logits(lm)
        with pytest.raises(KeyError), suspended(lm):
            assert bits(lm) == was and torch.equal(logits(lm), before) and applied(lm) == ()
            raise KeyError
        assert applied(lm) == on and bits(lm) == patched and torch.equal(logits(lm), held)
        with torch.no_grad():
            lm.parameter(down(lm))[0, 0] += 1
        with pytest.raises(ForeignWrite), suspended(lm):
            pass
        assert set(applied(lm)) == set(on)
        a.remove(force=True)
    assert bits(lm) == was
