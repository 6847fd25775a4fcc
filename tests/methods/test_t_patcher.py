"""T-Patcher: a neuron for each mistaken token, which answers its query and keeps quiet elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_lm
from torch import Tensor
from torch.nn import functional as F
from toy_facts import toy

from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput
from lmpatch.inference.score import score
from lmpatch.inference.tokens import encode
from lmpatch.methods import t_patcher
from lmpatch.models.lm import LM
from lmpatch.patches.hook.operations.neurons import Neurons, output_of
from lmpatch.patches.hook.patch import HookPatch
from lmpatch.patches.ledger import apply

EDITS = [Edit("The Eiffel Tower is in", target="Rome"), Edit("Steve Jobs founded", target="Paris")]
CFG = t_patcher.Config(neurons=2, steps=4, unrelated=60)


def neurons(patch: HookPatch) -> Neurons:
    (operation,) = patch.operations
    assert isinstance(operation, Neurons)
    return operation


def edit_task(lm: LM, cfg: t_patcher.Config = CFG) -> t_patcher._Edit:
    """The first edit's neurons as they start."""
    run = t_patcher._Run(lm, EDITS, cfg, None, None)
    return t_patcher._Edit(run, run.rows[0], run.others, torch.Generator().manual_seed(0))


def test_at_first_a_neuron_gives_one_at_its_query(lm: LM) -> None:
    task = edit_task(lm)
    for keys in task.values["keys"]:
        assert (task.queries * keys).sum(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


@pytest.mark.slow
def test_queries_are_what_the_mlp_reads_at_the_first_mistaken_tokens(lm: LM) -> None:
    task, row, seen = edit_task(lm), encode(lm, EDITS[0].prompt, EDITS[0].target), list[Tensor]()
    handle = lm.module(lm.layout.ups[-1][0]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        best = lm.model(torch.tensor([row.ids])).logits[0].argmax(-1)
    handle.remove()
    wrong = [t - 1 for t in range(row.target, len(row.ids)) if best[t - 1] != row.ids[t]][:2]
    want = seen[0].reshape(len(row.ids), -1)[wrong]
    assert (task.queries - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("keys", [1, 2])
def test_the_gradient_of_a_neuron_is_that_of_finite_differences(keys: int) -> None:
    source = torch.Generator().manual_seed(0)
    shapes = ((5, 6), (keys, 3, 6), (keys, 3), (3, 4))
    tensors = [torch.randn(*shape, generator=source, dtype=torch.float64, requires_grad=True) for shape in shapes]
    for name in ("gelu", "silu", "gelu_pytorch_tanh"):
        assert torch.autograd.gradcheck(lambda *t, name=name: output_of(name, *t), tuple(tensors))


@pytest.mark.slow
def test_a_wider_mlp_by_hand_says_the_same() -> None:
    """The neurons as rows of the projections and columns of the down-projection, without biases."""
    lm = tiny_lm("llama")
    added = neurons(t_patcher.fit(lm, EDITS, replace(CFG, activation="own")))
    added = replace(added, biases=torch.zeros_like(added.biases))
    patch = HookPatch.make(lm, {}, [added], method="t_patcher")
    ids = torch.tensor([encode(lm, "Danielle Darrieux speaks").ids])
    with apply(lm, patch), torch.no_grad():
        got = lm.model(ids).logits
    mlp: Any = lm.module("model.layers.3.mlp")
    for name, extra, dim in (
        ("gate_proj", added.keys[0], 0),
        ("up_proj", added.keys[1], 0),
        ("down_proj", added.values.T, 1),
    ):
        layer = getattr(mlp, name)
        layer.weight = torch.nn.Parameter(torch.cat([layer.weight, extra], dim))
    with torch.no_grad():
        want = lm.model(ids).logits
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.slow
def test_later_edits_leave_earlier_neurons_as_they_were(lm: LM) -> None:
    one, two = (neurons(t_patcher.fit(lm, edits, CFG)) for edits in (EDITS[:1], EDITS))
    assert 0 < one.count < two.count
    assert torch.equal(two.keys[:, : one.count], one.keys) and torch.equal(two.values[: one.count], one.values)
    assert torch.equal(two.biases[:, : one.count], one.biases)


@pytest.mark.slow
def test_losses_of_activations_are_those_written_out(lm: LM) -> None:
    task = edit_task(lm, replace(CFG, top=7))
    with torch.no_grad():
        task.values["biases"] += 0.3
        active, quiet = task.on_activations()
        own, first, second = [], [], []
        for i in range(len(task.queries)):
            key, bias = task.values["keys"][0, i], task.values["biases"][0, i]
            a = float(task.queries[i] @ key + bias)
            worst = sorted((float(h @ key + bias) for h in task.quiet), reverse=True)[:7]
            own.append(torch.tensor(-a).exp())
            first += [torch.tensor(x + 3).exp() for x in worst]
            second += [torch.tensor(x - a + 3).exp() for x in worst]
    assert float(active) == pytest.approx(float(torch.stack(own).mean()), rel=1e-4)
    assert float(quiet) == pytest.approx(float(torch.stack(first).mean() + torch.stack(second).mean()), rel=1e-4)


@pytest.mark.slow
def test_from_zero_the_target_gives_no_gradient(lm: LM) -> None:
    for zero in (False, True):
        task = edit_task(lm, replace(CFG, zero=zero))
        with torch.enable_grad():
            hooks = t_patcher.beside(lm, task.run.reads, task.run.module, task.added)
            z = F.cross_entropy(lm.module(lm.layout.head)(task.part.states(hooks)), task.part.label)
            gradients = torch.autograd.grad(z, list(task.values.values()), allow_unused=True)
        moves = any(g is not None and bool(g.abs().max() > 0) for g in gradients)
        assert moves != zero


@pytest.mark.slow
def test_an_edit_that_the_model_says_gets_no_neuron() -> None:
    lm = tiny_lm("llama")
    known = []
    for end in range(4, 40):  # not every token that it says survives being written out
        prompt = "The Eiffel Tower is in Paris, the capital"[:end].strip()
        said = score(lm, [prompt], ["x"])[0].argmax[0]
        text = lm.tokenizer.decode([said])
        if text.strip() and score(lm, [prompt], [text])[0].accuracy == 1:
            known.append(Edit(prompt, target=text))
    patch = t_patcher.fit(lm, [known[0], EDITS[1]], CFG)
    assert patch.notes["neurons"] == [0, 2] and patch.notes["learned"][0]


@pytest.mark.slow
def test_fitted_each_alone_an_edit_has_the_neurons_of_a_fit_of_its_own(lm: LM) -> None:
    for edit, patch in zip(EDITS, t_patcher.fit_each(lm, EDITS, CFG), strict=True):
        alone = neurons(t_patcher.fit(lm, [edit], CFG))
        assert torch.allclose(neurons(patch).values, alone.values, atol=1e-4)
        assert torch.allclose(neurons(patch).keys, alone.keys, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neurons": 0}, "neurons is 0"),
        ({"limit": 3}, "edit 2 would be neuron 4"),
        ({"smoothing": 1.0}, "smoothing 1.0"),
        ({"gain": 0.0}, "gain 0.0"),
        ({"top": 0}, "top 0"),
        ({"margin": -1.0}, "margin -1.0"),
        ({"unrelated": 1}, "2 unrelated tokens"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        t_patcher.fit(tiny_lm("llama"), EDITS, replace(CFG, **change))


@pytest.mark.slow
@pytest.mark.xdist_group("toy")
def test_neurons_answer_their_edits_and_keep_quiet_where_unrelated_text_says_so() -> None:
    known = toy(0)
    edits, text = known.edits(3), known.unrelated(answers=True)
    patch = t_patcher.fit(known.lm, edits, t_patcher.Config(), text=text)
    with apply(known.lm, patch):
        shares = known.shares(edits)
    assert shares.exact == 1 and shares.others > 0.85, shares
    run = t_patcher._Run(known.lm, edits, t_patcher.Config(), text, None)
    own = neurons(patch)
    quiet = (run.others @ own.keys[0].T + own.biases[0]).amax(0)  # [p] the loudest on unrelated text
    task = [t_patcher._Edit(run, row, run.others, torch.Generator()) for row in run.rows]
    loud = torch.cat([(one.queries * own.keys[0, i : i + 1]).sum(1) for i, one in enumerate(task)]) + own.biases[0]
    assert (loud > quiet).all()
