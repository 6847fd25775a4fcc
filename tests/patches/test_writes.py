"""Weights that someone else writes: the fingerprint follows, and no write under a patch is overlooked or in the way."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_lm, tiny_model, tiny_tokenizer
from torch import nn

from lmpatch.errors import BadInput, ForeignWrite, WrongModel
from lmpatch.models import checksum as checksum_module
from lmpatch.models.checksum import checksum, checksums
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap
from lmpatch.patches.ledger import applied, apply
from lmpatch.patches.weight.delta import Rows
from lmpatch.patches.weight.patch import WeightPatch

OTHER = "model.layers.3.mlp.up_proj.weight"


def optimiser_step(lm: LM) -> None:
    weight = lm.parameter(OTHER)
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.grad = None


def by_state_dict(lm: LM) -> None:
    state = {name: t.clone() for name, t in lm.model.state_dict().items()}
    state[OTHER] *= 2
    lm.model.load_state_dict(state)


def in_place(lm: LM) -> None:
    with torch.no_grad():
        lm.parameter(OTHER).mul_(2)


def by_data(lm: LM) -> None:
    lm.parameter(OTHER).data[7, 5] += 0.5


def new_data(lm: LM) -> None:
    lm.parameter(OTHER).data = lm.parameter(OTHER).data * 2


def by_numpy(lm: LM) -> None:
    lm.parameter(OTHER).detach().numpy()[3] *= 2


def columns_swapped(lm: LM) -> None:
    weight = lm.parameter(OTHER).data
    weight[:, [4, 9]] = weight[:, [9, 4]]


def turned(lm: LM) -> None:
    weight = lm.parameter("model.layers.3.self_attn.o_proj.weight").data
    weight.copy_(weight.T.clone())


def block(lm: LM, name: str = OTHER) -> None:
    """The sums of the bits of all rows and columns stay."""
    weight = lm.parameter(name).data
    whole = weight.view({2: torch.int16, 4: torch.int32}[weight.element_size()])
    step = {2: 1, 4: 1 << 18}[whole.element_size()]  # large enough for the fingerprint, which is rounded to bf16
    whole[3:5, 6:8] += step * torch.tensor([[1, -1], [-1, 1]], dtype=whole.dtype)


def new_parameter(lm: LM) -> None:
    lm.module(OTHER.removesuffix(".weight")).weight = nn.Parameter(torch.zeros(128, 64))


def new_layer(lm: LM) -> None:
    lm.model.set_submodule(OTHER.removesuffix(".weight"), nn.Linear(64, 128, bias=False))


WRITES = [
    optimiser_step, by_state_dict, in_place, by_data, new_data, by_numpy, columns_swapped, turned, block,
    new_parameter, new_layer,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITES)
def test_after_any_write_old_patches_are_refused_and_new_ones_fit(write: Callable[[LM], None], random_patch) -> None:
    lm = tiny_lm("llama")
    old, plain = random_patch(lm), lm.plain
    apply(lm, old).remove()
    write(lm)
    for one in (lm, plain, lm.plain):
        with pytest.raises(WrongModel, match="weights it does not change differ"):
            apply(one, old)
    new = random_patch(lm)
    for one in (lm, wrap(lm.model, lm.tokenizer)):
        apply(one, new).remove()
    with pytest.raises(WrongModel):
        apply(tiny_lm("llama"), new)


def test_a_write_that_is_taken_back_leaves_the_fingerprint_and_so_does_a_patch(random_patch) -> None:
    lm = tiny_lm("llama")
    patch, before = random_patch(lm), lm.fingerprint()
    in_place(lm)
    assert lm.fingerprint() != before
    with torch.no_grad():
        lm.parameter(OTHER).mul_(0.5)
    with apply(lm, patch):
        assert lm.fingerprint() == before
    assert lm.fingerprint() == before


def test_an_unwritten_model_is_hashed_once(random_patch, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    patch = random_patch(lm)
    monkeypatch.setattr("lmpatch.models.lm.hash_tensors", lambda *_: pytest.fail("hashed again"))
    for mount in ("bake", "side"):
        with apply(lm, patch, mount), apply(lm, patch, mount):
            lm.fingerprint()


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]), st.data())
def test_a_checksum_tells_any_two_tensors_apart(dtype: torch.dtype, data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    before = (100 * torch.randn(rows, width)).to(dtype)
    after = before.clone()
    i, k = (data.draw(st.integers(0, rows - 1)) for _ in range(2))
    j, m = (data.draw(st.integers(0, width - 1)) for _ in range(2))
    after[i, j], after[k, m] = before[k, m], before[i, j]
    after[i, m], after[k, j] = before[k, j], before[i, m]
    assert (checksum(before) == checksum(after)) == torch.equal(before, after)
    assert checksum(before.T.contiguous().T) == checksum(before)
    assert checksum(before.T) == checksum(before.T.contiguous())


def test_pieces_and_threads_leave_a_checksum_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"matrix": torch.randn(50, 36), "odd": torch.randn(7, 3).bfloat16(), "vector": torch.randn(90)}
    whole = {name: checksum(tensor) for name, tensor in tensors.items()}
    monkeypatch.setattr(checksum_module, "PIECE", 64)
    assert checksums(tensors) == whole == {name: checksum(tensor) for name, tensor in tensors.items()}


# --- under a patch ---


def down(lm: LM, layer: int = 1) -> str:
    return lm.layout.weight(lm.layout.downs[layer])


def test_a_write_that_keeps_the_sums_of_all_rows_and_columns_is_noticed(dtype, random_patch, bits) -> None:
    lm = tiny_lm("llama", dtype)
    was, handle = bits(lm), apply(lm, random_patch(lm))
    block(lm, down(lm))
    with pytest.raises(ForeignWrite, match=down(lm)):
        handle.remove()
    handle.remove(force=True)
    assert bits(lm) == was


@pytest.mark.parametrize("same", [True, False])
def test_a_replaced_layer_is_noticed_and_gets_the_original_back(same: bool, mount, random_patch) -> None:
    lm = tiny_lm("llama")
    original = lm.parameter(down(lm)).detach().clone()
    handle = apply(lm, random_patch(lm, layers=(1,)), mount)
    new = copy.deepcopy(lm.module(lm.layout.downs[1])) if same else nn.Linear(128, 64, bias=False)
    new._forward_hooks.clear(), new._forward_pre_hooks.clear()
    lm.model.set_submodule(lm.layout.downs[1], new)
    with pytest.raises(ForeignWrite, match=f"{down(lm)}.*replaced"):
        handle.remove()
    with pytest.raises(ForeignWrite):
        apply(lm, random_patch(lm), mount, strict=False)
    assert applied(lm) == (handle,)
    handle.remove(force=True)
    assert applied(lm) == ()
    if mount == "bake":
        assert torch.equal(lm.parameter(down(lm)), original)


def rows(lm: LM, name: str) -> WeightPatch:
    change = Rows(torch.tensor([5, 9]), torch.ones(2, 64), lm.layout.vocab)
    return WeightPatch.make(lm, {name: change}, method="rows")


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_an_untied_head_is_noticed_and_both_get_the_original_back(family: str) -> None:
    lm = tiny_lm(family)
    embed, head = (lm.layout.weight(name) for name in (lm.layout.embed, lm.layout.head))
    original = lm.parameter(embed).detach().clone()
    handle = apply(lm, rows(lm, embed))
    lm.module(lm.layout.head).weight = nn.Parameter(lm.parameter(embed).detach().clone())
    with pytest.raises(ForeignWrite, match=embed):
        handle.remove()
    handle.remove(force=True)
    assert torch.equal(lm.parameter(embed), original) and torch.equal(lm.parameter(head), original)


@pytest.mark.parametrize("family", ["gemma3", "llama"])
@pytest.mark.parametrize("size", [320, 200])
def test_force_after_an_embedding_was_resized_restores_the_rows_it_still_has(family: str, size: int) -> None:
    lm = tiny_lm(family)
    embed = lm.layout.weight(lm.layout.embed)
    original = lm.parameter(embed).detach().clone()
    handles = [apply(lm, rows(lm, embed)) for _ in range(2)]
    lm.model.resize_token_embeddings(size)
    for handle in handles:
        with pytest.raises(ForeignWrite, match=r"remove\(force=True\)"):
            handle.remove()
        handle.remove(force=True)
    now = lm.parameter(embed)
    assert len(now) == size and torch.equal(now[: min(size, 304)], original[: min(size, 304)])
    assert applied(lm) == () and not [name for name in vars(lm.model) if "lmpatch" in name]
    lm.model(input_ids=torch.arange(3, 9)[None])


def test_a_layer_that_is_packed_under_a_patch_is_noticed(random_patch) -> None:
    lm = tiny_lm("llama")
    handle = apply(lm, random_patch(lm, layers=(1,)))
    module = lm.module(lm.layout.downs[1])
    module.weight = nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ForeignWrite):
        handle.remove()
    handle.remove(force=True)
    assert applied(lm) == ()


# --- one Applied, several blocks ---


def test_a_second_block_of_one_applied_has_the_patch_on_again(mount, random_patch, bits, logits) -> None:
    lm = tiny_lm("llama")
    was, clean, on = bits(lm), logits(lm), apply(lm, random_patch(lm), mount)
    with on:
        patched = logits(lm)
    for _ in range(2):
        with on as again:
            assert again is on and applied(lm) == (on,) and torch.equal(logits(lm), patched)
        assert bits(lm) == was and torch.equal(logits(lm), clean)


def test_a_second_block_is_as_strict_as_the_first(random_patch) -> None:
    lm = tiny_lm("llama")
    patch = random_patch(lm)
    strict, lax = apply(lm, patch), apply(lm, patch, strict=False)
    strict.remove()
    lax.remove()
    in_place(lm)
    with pytest.raises(WrongModel), strict:
        pass
    with lax:
        assert applied(lm) == (lax,)
    assert applied(lm) == ()


def test_one_applied_in_two_open_blocks_is_refused(random_patch) -> None:
    lm = wrap(tiny_model("llama"), tiny_tokenizer())
    with apply(lm, random_patch(lm)) as on:
        with pytest.raises(BadInput, match="with block already"), on:
            pass
        assert applied(lm) == (on,)
    assert applied(lm) == ()
