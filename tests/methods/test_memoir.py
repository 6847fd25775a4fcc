"""MEMOIR: an edit stays in its own columns, a prompt that is like none uses none, and masks keep edits apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_lm
from torch import Tensor
from toy_facts import toy

from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput
from lmpatch.inference.tokens import encode
from lmpatch.methods import memoir
from lmpatch.models.lm import LM
from lmpatch.patches.hook.operations.masked import Masked, unpacked
from lmpatch.patches.hook.patch import HookPatch
from lmpatch.patches.ledger import apply

EDITS = [Edit("The Eiffel Tower is in", target="Rome"), Edit("Steve Jobs founded", target="Paris")]
CFG = memoir.Config(layer=1, steps=4, unrelated=8, short_prefixes=1, long_prefixes=0)


def masked(patch: HookPatch) -> Masked:
    (operation,) = patch.operations
    assert isinstance(operation, Masked)
    return operation


def key_inputs(lm: LM, text: str) -> Tensor:
    """[T, f] what block 1's down-projection reads."""
    seen: list[Tensor] = []
    module = lm.module(lm.layout.downs[1])
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        lm.model(torch.tensor([encode(lm, text).ids]))
    handle.remove()
    return seen[0]


@pytest.mark.slow
def test_a_mask_is_of_the_largest_entries_of_the_mean_input_less_that_of_unrelated_prompts(lm: LM) -> None:
    texts = ["The Colosseum", "What is it?", "He lives in Paris.", "In other news"]
    own = masked(memoir.fit(lm, EDITS, replace(CFG, k=20), text=texts))
    centre = torch.stack([key_inputs(lm, text)[1:].mean(0) for text in texts[:2]]).mean(0)
    assert torch.allclose(own.centre, centre, atol=1e-5)
    for edit, mask in zip(EDITS, unpacked(own.masks, len(centre)), strict=True):
        feature = key_inputs(lm, edit.prompt)[1:].mean(0) - centre
        places = own.order[feature.abs().argsort(descending=True)[:20]]
        assert sorted(places.tolist()) == mask.nonzero()[:, 0].tolist()


@pytest.mark.slow
def test_columns_outside_an_edits_mask_keep_their_bits(lm: LM) -> None:
    one, two = masked(memoir.fit(lm, EDITS[:1], CFG)), masked(memoir.fit(lm, EDITS, CFG))
    width = len(one.centre)
    first, second = unpacked(two.masks, width)
    assert one.matrices[0][:, ~first].abs().max() == 0 and one.matrices[0][:, first].abs().max() > 0
    assert torch.equal(two.matrices[0][:, ~second], one.matrices[0][:, ~second])
    assert not torch.equal(two.matrices[0][:, second], one.matrices[0][:, second])


@pytest.mark.slow
def test_steps_are_those_of_plain_gradient_descent_on_the_whole_matrix(lm: LM) -> None:
    """With the mask, clipped to length 1, through the plain model."""
    edit, cfg = EDITS[0], replace(CFG, short_prefixes=0, steps=3, lr=0.5)
    own = masked(memoir.fit(lm, [edit], cfg))
    mask = unpacked(own.masks, len(own.centre))[0].float()
    row = encode(lm, edit.prompt, edit.target)
    matrix = torch.zeros_like(own.matrices[0]).requires_grad_()

    def run(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (args[0] * mask) @ matrix.T

    handle = lm.module(lm.layout.downs[1]).register_forward_hook(run)
    for _ in range(3):
        z = lm.model(torch.tensor([row.ids[:-1]])).logits[0, row.target - 1 :].log_softmax(-1)
        loss = -z[range(len(z)), list(row.ids[row.target :])].mean()
        (gradient,) = torch.autograd.grad(loss, matrix)
        with torch.no_grad():
            matrix -= 0.5 * gradient / max(1.0, float(gradient.norm()) + 1e-6)
    handle.remove()
    assert (own.matrices[0] - matrix).abs().max() < 1e-4 * matrix.abs().max()


@pytest.mark.slow
def test_edits_of_disjoint_masks_do_not_meet() -> None:
    """What the first says with both on is what it says alone, to the bit: its columns are untouched."""
    lm = tiny_lm("llama")
    for k in (6, 5, 4, 3, 2, 1):
        both = masked(memoir.fit(lm, EDITS, replace(CFG, k=k)))
        masks = unpacked(both.masks, len(both.centre))
        if not (masks[0] & masks[1]).any():
            break
    assert not (masks[0] & masks[1]).any()
    alone = masked(memoir.fit(lm, EDITS[:1], replace(CFG, k=k)))
    x = torch.randn(5, len(both.centre), generator=torch.Generator().manual_seed(0))
    assert torch.equal((x * masks[0]) @ both.matrices[0].T, (x * masks[0]) @ alone.matrices[0].T)


@pytest.mark.slow
def test_a_threshold_lets_no_more_unrelated_prompts_fire_than_asked() -> None:
    lm = tiny_lm("llama")
    run = memoir._Run(lm, EDITS, replace(CFG, unrelated=80), None, None)
    masks = memoir.packed(run.masks)
    counts = (run.unrelated.int() @ run.masks.int().T).amax(1)  # of each prompt with its nearest edit
    for share in (0.0, 0.1, 0.5):
        run.cfg = replace(run.cfg, false_fires=share)
        least = run._least(masks)
        assert int((counts >= least).sum()) <= share * len(counts)
        assert least == run.k or int((counts >= least - 1).sum()) > share * len(counts)
    run.cfg = replace(run.cfg, tau=0.5)
    assert run._least(masks) == -(-run.k // 2)


@pytest.mark.slow
def test_fitted_each_alone_an_edit_has_the_matrix_of_a_fit_of_its_own(lm: LM) -> None:
    for edit, patch in zip(EDITS, memoir.fit_each(lm, EDITS, CFG), strict=True):
        alone = masked(memoir.fit(lm, [edit], CFG))
        assert torch.equal(masked(patch).masks, alone.masks) and torch.equal(masked(patch).least, alone.least)
        assert torch.allclose(masked(patch).matrices, alone.matrices, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0, and the down-projection reads 128"),
        ({"k": 129}, "k is 129"),
        ({"tau": 1.5}, "tau is 1.5"),
        ({"tau": float("nan")}, "tau is nan"),
        ({"false_fires": 1.0}, "false_fires is 1.0"),
        ({"lr": 0.0}, "lr 0.0"),
        ({"limit": 1}, "a matrix of 1 edits was given 2"),
        ({"unrelated": 1}, "2 unrelated prompts"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        memoir.fit(tiny_lm("llama"), EDITS, replace(CFG, **change))


@pytest.mark.slow
@pytest.mark.xdist_group("toy")
def test_masks_keep_edits_apart_and_other_questions_as_they_were() -> None:
    """The same matrix without masks, which every prompt uses, forgets the first edits and all else."""
    known = toy(0)
    edits, bare = known.edits(20), memoir.Config(layer=0, short_prefixes=0, long_prefixes=0)
    shares = []
    for cfg in (bare, replace(bare, k=192)):
        with apply(known.lm, memoir.fit(known.lm, edits, cfg, text=known.unrelated(1))):
            shares.append(known.shares(edits))
    masks, none = shares
    assert masks.exact > 0.7 and masks.exact > none.exact + 0.3, shares
    assert masks.others >= 0.98 and none.others < 0.1, shares
