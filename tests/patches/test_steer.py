"""A hook patch adds what a bias would, at every token or those of the answer, and nothing once it is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_lm
from torch import Tensor

from lmpatch.errors import BadInput, BadPatch, CannotMount, Diverged, WrongModel
from lmpatch.inference.forward import blocks, positions
from lmpatch.models.lm import LM
from lmpatch.patches.file import load_patch
from lmpatch.patches.format import sealed
from lmpatch.patches.hook.patch import HookPatch, Site, SteerPatch
from lmpatch.patches.ledger import applied, apply
from lmpatch.patches.merge import merge
from lmpatch.patches.weight.delta import Scale
from lmpatch.patches.weight.patch import WeightPatch

IDS = torch.tensor([[1, 40, 50, 60, 70]])


def width(lm: LM, name: str) -> int:
    weight = lm.parameter(f"{name}.weight")
    return weight.shape[0] if lm.layout.transposed else weight.shape[1]


def patch_of(lm: LM, layers: tuple[int, ...] = (1, 3), newest: bool = False, seed: int = 0) -> HookPatch:
    source = torch.Generator().manual_seed(seed)
    names = [lm.layout.attn_outs[layer] for layer in layers]
    vectors = {name: torch.randn(width(lm, name), generator=source) for name in names}
    return HookPatch.make(lm, vectors, newest=newest, method="push")


@torch.no_grad()
def states(lm: LM) -> Tensor:
    mask = torch.ones_like(IDS)
    return blocks(lm, IDS, mask, position_ids=positions(mask))


@torch.no_grad()
def outputs(lm: LM, name: str) -> Tensor:
    """What a projection returns, [T, d]."""
    seen: list[Tensor] = []
    handle = lm.module(name).register_forward_hook(lambda _, __, out: seen.append(out))
    states(lm)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def test_a_vector_on_the_input_is_the_folded_bias_behind_it(any_lm: LM) -> None:
    lm = any_lm
    patch = patch_of(lm, (1,))
    ((name, vector),) = patch.tensors().items()
    weight = lm.parameter(f"{name}.weight").detach()
    bias = vector @ (weight if lm.layout.transposed else weight.T)
    want = outputs(lm, name) + bias
    with apply(lm, patch):
        got = outputs(lm, name)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_at_the_newest_token_alone_earlier_ones_keep_their_bits(lm: LM) -> None:
    clean = states(lm)
    with apply(lm, patch_of(lm, newest=True)):
        now = states(lm)
    assert torch.equal(now[:, :-1], clean[:, :-1]) and not torch.equal(now[:, -1], clean[:, -1])


@pytest.mark.slow
def test_taken_off_in_any_order_with_other_patches_every_bit_is_back(lm: LM) -> None:
    clean = states(lm)
    weight = lm.layout.weight(lm.layout.attn_outs[1])
    shape = (64, width(lm, lm.layout.attn_outs[1]))
    scale = WeightPatch.make(lm, {weight: Scale(torch.tensor([3]), torch.tensor([5.0]), shape)}, method="scale")
    for mount in ("side", "bake"):
        one, two, three = apply(lm, scale, mount=mount), apply(lm, patch_of(lm)), apply(lm, patch_of(lm, seed=1))
        two.remove()
        with apply(lm, patch_of(lm, seed=2)):
            pass
        one.remove()
        three.remove()
        assert torch.equal(states(lm), clean) and not applied(lm)
        assert not any(m._forward_pre_hooks for m in lm.model.modules())


def test_a_scale_acts_on_what_was_added_however_it_is_mounted(lm: LM) -> None:
    name = lm.layout.attn_outs[1]
    factors = torch.linspace(0.5, 2, width(lm, name))
    shape = (64, len(factors))
    scale = WeightPatch.make(
        lm, {lm.layout.weight(name): Scale(torch.arange(len(factors)), factors, shape)}, method="scale"
    )
    seen = []
    for mount, first in (("side", True), ("side", False), ("bake", True)):
        pair = [(scale, mount), (patch_of(lm, (1,)), None)]
        with apply(lm, *pair[0 if first else 1]), apply(lm, *pair[1 if first else 0]):
            seen.append(states(lm))
    assert all((other - seen[0]).abs().max() <= 1e-4 * seen[0].abs().max() for other in seen)


@pytest.mark.parametrize("newest", [False, True])
def test_merged_it_does_what_both_do_at_whichever_tokens(newest: bool, lm: LM, tmp_path: Path) -> None:
    one, two = patch_of(lm, (0, 1)), patch_of(lm, (1, 2), newest, seed=1)
    with apply(lm, one), apply(lm, two):
        want = states(lm)
    both = merge(one, two)
    both.save(tmp_path / "both")
    assert load_patch(tmp_path / "both").hash() == both.hash()
    with apply(lm, load_patch(tmp_path / "both")):
        assert (states(lm) - want).abs().max() <= 1e-4 * want.abs().max()


def test_at_an_output_it_is_what_is_added_there(lm: LM) -> None:
    name = lm.layout.downs[1]
    vector = torch.linspace(-1, 1, 64)
    want = outputs(lm, name) + vector
    with apply(lm, HookPatch.make(lm, {Site(name, "output"): vector}, method="push")):
        assert (outputs(lm, name) - want).abs().max() <= 1e-5 * want.abs().max()


def test_what_the_first_release_wrote_opens_with_its_hash_and_under_its_name() -> None:
    lm = tiny_lm("llama")
    patch = patch_of(lm, newest=True)
    parts = patch.parts()
    assert parts == {"newest": True, "widths": {name: 64 for name in patch.tensors()}}
    old = SteerPatch.from_parts(parts, patch.tensors(), method="push", config={}, base=patch.base)
    assert old.hash() == patch.hash() and patch.kind == "steer" and isinstance(old, HookPatch)
    assert {site.tokens for site in old.vectors} == {"answer"}


def test_it_is_refused_where_it_does_not_fit() -> None:
    lm = tiny_lm("llama")
    name = lm.layout.attn_outs[0]
    with pytest.raises(BadInput, match=r"reads vectors of 64, the patch has one of shape \(3,\)"):
        SteerPatch.make(lm, {name: torch.ones(3)}, method="push")
    with pytest.raises(BadInput, match="no module model.nothing"):
        SteerPatch.make(lm, {"model.nothing": torch.ones(3)}, method="push")
    with pytest.raises(BadInput, match="not a linear layer"):
        SteerPatch.make(lm, {"model.norm": torch.ones(64)}, method="push")
    with pytest.raises(Diverged, match="infinite"):
        SteerPatch.make(lm, {name: torch.full((64,), torch.inf)}, method="push")
    with pytest.raises(BadInput, match="returns vectors of 64"):
        SteerPatch.make(lm, {Site(name, "output"): torch.ones(3)}, method="push")
    with pytest.raises(BadInput, match="runs behind the blocks"):
        SteerPatch.make(lm, {Site("lm_head", "input", "answer"): torch.ones(64)}, method="push")
    with pytest.raises(CannotMount, match="cannot be mounted 'bake'"):
        apply(lm, patch_of(lm), mount="bake")
    with pytest.raises(WrongModel):
        apply(tiny_lm("llama", seed=1), patch_of(lm))
    with pytest.raises(WrongModel, match="no module"):
        apply(tiny_lm("gpt2"), patch_of(lm), strict=False)


@pytest.mark.parametrize("change", [{"widths": {}}, {"newest": 1}, {"more": 1}, {"add": []}])
def test_a_file_whose_parts_do_not_fit_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    import json

    lm = tiny_lm("llama")
    patch_of(lm, newest=True).save(tmp_path / "p")
    assert load_patch(tmp_path / "p").hash() == patch_of(lm, newest=True).hash()
    header = json.loads((tmp_path / "p" / "patch.json").read_text())
    (tmp_path / "p" / "patch.json").write_bytes(sealed(header | {"parts": header["parts"] | change}))
    with pytest.raises(BadPatch):
        load_patch(tmp_path / "p")


def test_a_patch_says_where_it_acts() -> None:
    lm = tiny_lm("llama")
    assert "at every token" in patch_of(lm).summary()
    assert "from the last prompt token on" in patch_of(lm, newest=True).summary()


SITES: dict[str, Any] = {
    "tokens": [["model.x", "input", "none", 2]],
    "width": [["model.x", "input", "all", 3]],
    "module": [["model.y", "input", "all", 2]],
    "no site": [1],
    "no list": 0,
}


@pytest.mark.parametrize("sites", SITES.values(), ids=SITES)
def test_a_list_of_sites_that_does_not_fit_is_refused(sites: Any, tmp_path: Path) -> None:
    import json

    lm = tiny_lm("llama")
    both = merge(patch_of(lm), patch_of(lm, newest=True))
    both.save(tmp_path / "p")
    header = json.loads((tmp_path / "p" / "patch.json").read_text())
    good = header["parts"]["add"]
    assert len(good) == 4
    for wrong in (sites, good[1:] + sites if isinstance(sites, list) else sites):
        (tmp_path / "p" / "patch.json").write_bytes(sealed(header | {"parts": {"add": wrong}}))
        with pytest.raises(BadPatch):
            load_patch(tmp_path / "p")
