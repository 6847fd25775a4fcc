"""GRACE: balls grow, shrink and go as edits come and go; exact questions stay, reworded ones are lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_lm
from torch import Tensor
from toy_facts import toy

from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput, Contradiction
from lmpatch.inference.forward import nll
from lmpatch.inference.generate import generate
from lmpatch.inference.tokens import encode
from lmpatch.methods import finetune, grace
from lmpatch.models.lm import LM
from lmpatch.patches.hook.operations.codebook import GAP, Codebook, balls
from lmpatch.patches.hook.patch import HookPatch
from lmpatch.patches.ledger import apply
from lmpatch.patches.merge import merge

EDITS = [
    Edit("The Eiffel Tower is in", target="Rome"),
    Edit("Steve Jobs founded", target="Paris"),
    Edit("The Space Needle is in", target="Rome"),
]
CFG = grace.Config(layer=1, steps=10, unrelated=8)


def book_of(patch: HookPatch) -> Codebook:
    (book,) = patch.operations
    assert isinstance(book, Codebook)
    return book


def line(*places: float, labels: list[list[int]], known: list[bool] | None = None, radius: float = 1.0) -> Any:
    """ε of the balls of queries on a line."""
    return balls(
        torch.tensor(places)[:, None] + 100, torch.tensor(labels, dtype=torch.int32),
        torch.full((len(places),), radius), torch.tensor(known or [False] * len(places)),
    )  # fmt: skip


def slow(queries: Tensor, labels: list[tuple[int, ...]], radius: float) -> list[tuple[Tensor, float, tuple[int, ...]]]:
    """The paper's algorithm 1, edit after edit: keys, ε, labels."""
    book: list[list[Any]] = []
    for query, label in zip(queries, labels, strict=True):
        near = min(book, key=lambda ball: float((ball[0] - query).norm()), default=None)
        distance = float((near[0] - query).norm()) if near else 0.0
        if near is None or distance > radius + near[1]:
            book.append([query, radius, label])
        elif near[2] == label:
            near[1] = max(near[1], distance)
        else:
            near[1] = min(near[1], distance / 2 - GAP)
            book.append([query, distance / 2, label])
    return [tuple(ball) for ball in book]  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(3))
def test_balls_are_those_of_the_papers_algorithm_run_edit_by_edit(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    queries = torch.randn(60, 2, generator=source, dtype=torch.float32) * 2
    labels = torch.randint(2, (60, 2), generator=source, dtype=torch.int32)
    epsilon, _ = balls(queries, labels, torch.full((60,), 0.8), torch.zeros(60, dtype=torch.bool))
    want = slow(queries, [tuple(row) for row in labels.tolist()], 0.8)
    places = [i for i in range(60) if epsilon[i] >= 0]
    assert len(places) == len(want) < 60
    for i, (key, ball, label) in zip(places, want, strict=True):
        assert torch.equal(queries[i], key) and float(epsilon[i]) == pytest.approx(ball, abs=1e-4)
        assert tuple(labels[i].tolist()) == label


def test_a_split_leaves_two_balls_disjoint_and_none_larger() -> None:
    epsilon, owner = line(0, 1.2, labels=[[1], [2]])
    assert epsilon.tolist() == pytest.approx([0.6 - GAP, 0.6], abs=1e-4) and float(epsilon.sum()) < 1.2
    assert owner == [0, 1]
    epsilon, _ = line(0, 0.4, -1.1, labels=[[1], [2], [3]])  # the first ball is small by now
    assert float(epsilon[0]) == pytest.approx(0.2 - GAP, abs=1e-4)


def test_the_same_target_makes_a_ball_grow_and_targets_of_equal_mean_are_two() -> None:
    epsilon, owner = line(0, 1.5, labels=[[4, 6], [4, 6]])
    assert epsilon.tolist() == pytest.approx([1.5, -1]) and owner == [0, 0]
    epsilon, owner = line(0, 1.5, labels=[[4, 6], [5, 5]])
    assert owner == [0, 1] and float(epsilon[1]) == pytest.approx(0.75, abs=1e-4)


def test_an_edit_that_the_model_knows_gets_a_ball_only_inside_anothers() -> None:
    assert line(0, 5, labels=[[1], [2]], known=[True, False])[1] == [-1, 1]
    epsilon, owner = line(0, 0.5, labels=[[1], [2]], known=[False, True])
    assert owner == [0, 1] and float(epsilon[1]) == pytest.approx(0.25, abs=1e-4)


def test_of_two_edits_of_one_prompt_the_later_one_has_the_ball() -> None:
    epsilon, owner = line(0, 0, labels=[[1], [2]])
    assert epsilon.tolist() == [-1, 1] and owner == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("places", [[0], [1], [0, 2]])
def test_without_an_edit_the_codebook_is_the_one_of_the_others(places: list[int], lm: LM) -> None:
    cfg = replace(CFG, epsilon=20.0)  # balls meet: edits split and grow those of others
    kept = [edit for i, edit in enumerate(EDITS) if i not in places]
    left, fresh = grace.without(grace.fit(lm, EDITS, cfg), places), grace.fit(lm, kept, cfg)
    assert torch.equal(book_of(left).epsilon, book_of(fresh).epsilon) and left.edits == fresh.edits
    assert torch.allclose(book_of(left).queries, book_of(fresh).queries, atol=1e-4)
    assert torch.equal(book_of(left).owner >= 0, book_of(fresh).owner >= 0)


@pytest.mark.slow
def test_an_edit_that_is_taken_out_must_be_there() -> None:
    lm = tiny_lm("llama")
    patch = grace.fit(lm, EDITS, CFG)
    with pytest.raises(BadInput, match="no edit 3: the patch has 3"):
        grace.without(patch, [3])
    with pytest.raises(BadInput, match="as it was fitted"):
        grace.without(merge(patch, patch), [0])  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_merge_holds_each_edit_once_and_the_later_target_of_a_prompt() -> None:
    lm = tiny_lm("llama")
    one, two = grace.fit(lm, EDITS[:2], CFG), grace.fit(lm, [replace(EDITS[0], target="Seattle"), EDITS[2]], CFG)
    assert len(book_of(merge(one, one))) == 2  # type: ignore[arg-type]
    both = merge(one, two)
    with apply(lm, two):
        want = generate(lm, EDITS[0].prompt, max_new_tokens=4, stop=())
    with apply(lm, both):
        assert generate(lm, EDITS[0].prompt, max_new_tokens=4, stop=()) == want


@pytest.mark.slow
def test_values_searched_in_one_batch_are_those_of_a_slow_search(lm: LM) -> None:
    """Adam on the value of one edit, through the plain model."""
    edit, patch = EDITS[0], grace.fit(lm, EDITS[:2], replace(CFG, steps=4, lr=0.1))
    row = encode(lm, edit.prompt, edit.target)
    ids, module = torch.tensor([row.ids[:-1]]), lm.module(lm.layout.downs[1])
    value, clean = torch.zeros(0), torch.zeros(0)

    def run(_: Any, __: Any, output: Tensor) -> Tensor | None:
        nonlocal clean
        if not len(value):
            clean = output[0, row.target - 1].detach().clone()
            return None
        out = output.clone()
        out[0, row.target - 1] = value
        return out

    handle = module.register_forward_hook(run)
    lm.model(ids)
    moved = torch.zeros_like(clean).requires_grad_()
    optimiser, rms = torch.optim.Adam([moved], lr=0.1), clean.square().mean().sqrt()
    for _ in range(4):
        value = clean + rms * moved
        z = lm.model(ids).logits[0, row.target - 1 :].log_softmax(-1)
        (-z[range(len(z)), list(row.ids[row.target :])].mean()).backward()
        optimiser.step()
        optimiser.zero_grad()
    handle.remove()
    assert (book_of(patch).values[0] - (clean + rms * moved)).abs().max() < 1e-4 * float(rms)


@pytest.mark.slow
def test_fitted_each_alone_an_edit_has_the_value_of_a_fit_of_its_own(lm: LM) -> None:
    for edit, patch in zip(EDITS, grace.fit_each(lm, EDITS, CFG), strict=True):
        alone = grace.fit(lm, [edit], CFG)
        for name, tensor in book_of(alone).tensors().items():
            assert torch.allclose(book_of(patch).tensors()[name].float(), tensor.float(), atol=1e-3), name
        assert [e["target"] for e in patch.edits] == [edit.target]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": 2}, "a codebook of 2 edits was given 3"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"lr": -1.0}, "lr -1.0"),
        ({"steps": 0}, "steps is 0"),
        ({"unrelated": 1}, "2 unrelated prompts"),
        ({"replace": "first"}, "Give last, prompt, all"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        grace.fit(tiny_lm("llama"), EDITS, replace(CFG, **change))


@pytest.mark.slow
def test_text_of_one_prompt_and_two_targets_of_a_prompt_are_refused() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(BadInput, match="the text gives 1 prompts"):
        grace.fit(lm, EDITS, CFG, text=["A", "A", " "])
    with pytest.raises(Contradiction):
        grace.fit(lm, [EDITS[0], replace(EDITS[0], target="Paris")], CFG)


@pytest.mark.slow
@pytest.mark.xdist_group("toy")
def test_exact_questions_stay_and_reworded_ones_are_lost_while_a_weight_forgets() -> None:
    known = toy(0)
    shares = []
    for edits in (known.edits(10), known.edits(100)):
        with apply(known.lm, grace.fit(known.lm, edits, grace.Config(), text=known.unrelated())):
            shares.append(known.shares(edits))
    assert all(s.exact == 1 and s.reworded < 0.1 and s.others > 0.97 for s in shares), shares
    weights = []
    for edits in (known.edits(5), known.edits(60)):
        with apply(known.lm, finetune.fit(known.lm, edits, finetune.Config(lr=5e-3, epochs=50))):
            weights.append(known.shares(edits))
    few_shares, many_shares = weights
    assert few_shares.exact > 0.9 and few_shares.others > 0.6, weights
    assert many_shares.exact < 0.8 and many_shares.others < 0.3, weights


@pytest.mark.slow
def test_the_gradient_of_a_value_is_of_its_row_alone() -> None:
    """Several balls in one batch: the loss of one has no gradient in the value of another."""
    lm = tiny_lm("llama")
    search = grace._Search(lm, EDITS, CFG, None, None)
    task = grace._Values(search, [[row] for row in search.rows])
    with torch.enable_grad():
        states = task.part.states([task._hook(task._replaced)])
        each = nll(lm, states, task.part.label)
        (gradient,) = torch.autograd.grad(each[task.place == 1].sum(), task.moved)
    assert gradient[1].abs().max() > 0 and gradient[[0, 2]].abs().max() == 0
