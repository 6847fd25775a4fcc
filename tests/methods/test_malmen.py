"""MALMEN: its solve and the gradients through it are those of the whole regression, and one commit holds many facts."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.test_mend import FACTS, QUICK, costs, judged, known, moved, shares, trained
from tiny import tiny_lm

import lmpatch as lp
from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput, BadPatch
from lmpatch.inference.forward import frozen
from lmpatch.inference.tokens import encode
from lmpatch.locate.gradients import Gradients
from lmpatch.methods import malmen, mend
from lmpatch.methods.hypernetwork import editing
from lmpatch.methods.hypernetwork.task import Meta
from lmpatch.methods.malmen import Config, Malmen, dual, primal
from lmpatch.models.lm import LM
from lmpatch.patches.editor import Editor
from lmpatch.patches.weight.delta import Dense, LowRank
from lmpatch.training.facts import Split

EDITS, _ = malmen.example(tiny_lm("llama"))


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_the_dual_form_is_the_primal_one(tokens: int) -> None:
    keys, values, ridge = drawn(tokens, 12), drawn(tokens, 5, seed=1), torch.tensor(-0.5)
    whole = dual(keys, values, ridge).T @ keys
    torch.testing.assert_close(whole, primal(keys, values, ridge), rtol=1e-5, atol=1e-5)
    slow = torch.linalg.inv(keys.T @ keys + ridge.exp() * torch.eye(12)) @ keys.T @ values
    torch.testing.assert_close(whole.T, slow, rtol=1e-4, atol=1e-5)


def test_the_gradients_of_values_and_ridge_are_those_of_finite_differences() -> None:
    keys = drawn(6, 4).double()
    values, ridge = (
        drawn(6, 3, seed=1).double().requires_grad_(),
        torch.tensor(0.3, dtype=torch.float64).requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda v, r: dual(keys, v, r), (values, ridge))


def test_the_gradients_are_the_papers() -> None:
    """M = (UᵀU + e^r I)⁻¹ G, of values U M and of the ridge -e^r ⟨M, ΔWᵀ⟩, with G the gradient of the whole change."""
    keys, values = drawn(6, 4).double(), drawn(6, 3, seed=1).double().requires_grad_()
    ridge, gradient = torch.tensor(0.3, dtype=torch.float64).requires_grad_(), drawn(4, 3, seed=2).double()
    change = keys.T @ dual(keys, values, ridge)
    (change * gradient).sum().backward()
    m = torch.linalg.solve(keys.T @ keys + ridge.exp() * torch.eye(4, dtype=torch.float64), gradient)
    torch.testing.assert_close(values.grad, keys @ m)
    torch.testing.assert_close(ridge.grad, -ridge.exp() * (m * change).sum())


def test_the_keys_are_inputs_where_a_target_token_is_predicted(lm: LM) -> None:
    net = Malmen.new(lm, 2, 4, 1.0, 0)
    rows = [encode(lm, e.prompt, e.target) for e in EDITS]
    with frozen(lm):
        found = editing.read(lm, net, rows)
    for i, row in enumerate(rows):
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            lm.module(n).register_forward_hook(lambda _, a, o, n=n, seen=seen: seen.update({n: a[0].detach()}))
            for n in net.order
        ]
        with torch.no_grad():
            lm.model(torch.tensor([row.ids]))
        for hook in hooks:
            hook.remove()
        for name in net.order:
            keys = seen[name].reshape(len(row.ids), -1)[row.target - 1 : -1]
            torch.testing.assert_close(found[name].of([i]).inputs, keys, rtol=1e-4, atol=1e-5)


def test_the_shift_stands_outside_the_clamp() -> None:
    net = Malmen.new(tiny_lm("llama"), 1, 4, 1.0, 0)
    before, scale, shift = torch.tensor([-2.0, 2.0]), torch.tensor([3.0, 3.0]), torch.tensor([-1.0, -1.0])
    assert torch.equal(net.widened(before, scale, shift), torch.tensor([-1.0, 5.0]))
    inside = mend.Mend.new(tiny_lm("llama"), 1, 4, 1.0, 0).widened(before, scale, shift)
    assert torch.equal(inside, torch.tensor([0.0, 5.0]))


def test_the_ridge_starts_at_the_size_of_the_keys() -> None:
    lm = tiny_lm("llama")
    net = Malmen.new(lm, 1, 4, 1.0, 0)
    keys = drawn(5, 128)
    net.begin({net.order[0]: Gradients(torch.zeros(5, dtype=torch.int64), keys, drawn(5, 64))})
    assert float(net.ridge.detach().exp()) == pytest.approx(0.1 * float(keys.square().sum(1).median()), rel=1e-4)
    net.begin({net.order[0]: Gradients(torch.zeros(0, dtype=torch.int64), keys[:0], drawn(0, 64))})
    assert net.ridge.isfinite().all()


@pytest.mark.slow
def test_the_meta_gradient_is_that_of_a_slow_form(lm: LM) -> None:
    """The slow form writes the whole change into the weights and asks autograd, the inverse included."""
    net = moved(Malmen.new(lm, 2, 4, 1e-2, 0), 1)
    cfg = replace(malmen.Training(), **{**QUICK, "batch": 3})
    with frozen(lm):
        task = Meta(lm, net, Split(FACTS[:3], FACTS[3:5], ()), cfg)  # type: ignore[arg-type]
        net.begin(task.gradients(task.samples(0)))
        losses = task.learn(0)
    samples = task.samples(0)
    found, total = task.gradients(samples), torch.zeros(())
    named = {}
    for j, name in enumerate(net.order):
        own = found[name]
        eye = torch.eye(own.inputs.shape[1])
        values = net.values(name, own, task.read)
        whole = torch.linalg.inv(own.inputs.T @ own.inputs + net.ridge[j].exp() * eye) @ own.inputs.T @ values  # ΔWᵀ
        weight = lm.parameter(lm.layout.weight(name))
        named[lm.layout.weight(name)] = weight + (whole if lm.layout.transposed else whole.T)
    for s in samples:
        total = total + judged(lm, named, s) / len(samples)
    assert sum(losses.values()) == pytest.approx(float(total.detach()), abs=1e-4)
    grads = torch.autograd.grad(total, list(net.parameters()))
    for (name, p), wanted in zip(net.named_parameters(), grads, strict=True):
        assert p.grad is not None, name
        atol = 1e-4 * max(1e-3, float(wanted.abs().max()))
        torch.testing.assert_close(p.grad, wanted, rtol=5e-3, atol=atol)


def test_facts_that_are_no_whole_number_of_batches_are_all_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    edits = [
        Edit(f"The tower of {i} is in", target) for i, target in enumerate(("Rome", "Paris", "Lima", "Oslo", "Rome"))
    ]
    whole = malmen.fit(lm, edits, Config(), editor=malmen.example_editor(lm))
    monkeypatch.setattr(editing, "BATCH", 2)
    parts = malmen.fit(lm, edits, Config(), editor=malmen.example_editor(lm))
    for name, delta in whole.deltas.items():
        torch.testing.assert_close(parts.deltas[name].dense(), delta.dense(), rtol=1e-4, atol=1e-5)


def test_many_tokens_make_a_whole_matrix_and_few_make_factors() -> None:
    lm = tiny_lm("llama")
    editor = malmen.example_editor(lm)
    many = [Edit(f"The number of {i} is", f"one hundred and seven and {i} more") for i in range(12)]
    few, whole = (malmen.fit(lm, edits, Config(), editor=editor).deltas.values() for edits in (EDITS, many))
    assert all(isinstance(delta, LowRank) for delta in few) and all(isinstance(delta, Dense) for delta in whole)
    net = Malmen.of(editor, lm)
    with frozen(lm), torch.no_grad():
        found = editing.read(lm, net, editing.rows_of(lm, editor, many))
        for name, delta in zip(net.order, whole, strict=True):
            a, b = net.written(name, found[name])
            assert len(a) > a.shape[1]
            torch.testing.assert_close(delta.dense(), b.T @ a, rtol=1e-3, atol=1e-4)


def test_each_fact_alone_is_a_commit_of_its_own(lm: LM) -> None:
    editor = malmen.example_editor(lm)
    for edit, patch in zip(EDITS, malmen.fit_each(lm, EDITS, Config(), editor=editor), strict=True):
        alone = malmen.fit(lm, [edit], Config(), editor=editor)
        for name, delta in alone.deltas.items():
            torch.testing.assert_close(patch.deltas[name].dense(), delta.dense(), rtol=1e-4, atol=1e-5)


def test_a_second_commit_warns_and_reset_reads_the_model_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    lm = tiny_lm("llama")
    editor = malmen.example_editor(lm)
    alone = malmen.fit(lm, EDITS[1:], Config(), editor=editor)
    assert caplog.text == ""
    with lp.apply(lm, malmen.fit(lm, EDITS[:1], Config(), editor=editor)), caplog.at_level(logging.WARNING):
        reset = malmen.fit(lm, EDITS[1:], Config(), editor=editor)
        drifted = malmen.fit(lm, EDITS[1:], Config(reset_each=False), editor=editor)
    assert "malmen learned to edit" in caplog.text
    assert reset.hash() == alone.hash() != drifted.hash()


@pytest.mark.slow
def test_a_training_that_was_stopped_gives_the_same_editor(tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if what == "malmen" and done == 3:
            raise KeyboardInterrupt

    lm = tiny_lm("llama")
    whole = lp.train(lm, "malmen", FACTS, **QUICK)
    with pytest.raises(KeyboardInterrupt):
        lp.train(lm, "malmen", FACTS, out=tmp_path, progress=stop, **QUICK)
    assert lp.train(lm, "malmen", FACTS, out=tmp_path, **QUICK).hash() == whole.hash()
    assert len((tmp_path / "malmen.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_missing_or_foreign_editor_is_refused() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(BadInput, match=r"lmpatch train MODEL malmen FACTS .* 500 steps take about \d+ minutes"):
        lp.fit(lm, "malmen", EDITS)
    with pytest.raises(BadPatch, match="malmen was asked for"):
        lp.fit(lm, "malmen", EDITS, editor=mend.example_editor(lm))


@pytest.mark.slow
def test_an_edit_costs_at_most_one_and_a_half_times_a_forward_and_backward() -> None:
    assert 0.3 < costs(Malmen, 6, 26) <= 1.5  # as 256 is to Gemma's 640


@cache
def malmen_editor() -> Editor:
    model, learn, _ = known()
    settings: dict[str, Any] = {"layers": 3, "rank": 64, "steps": 300, "batch": 32, "lr": 1e-3, "clip": 10.0}
    settings |= {"strength": 1e-2, "strength_lr": 3e-3, "edit_weight": 5.0, "validate": 16}
    return lp.train(model.lm, "malmen", learn, **settings)


@pytest.mark.slow
@pytest.mark.xdist_group("toy_facts")
def test_one_commit_of_many_facts_holds_more_of_them_than_the_sum_of_their_mend_changes() -> None:
    (_, _, held), lm = known(), known()[0].lm
    with lp.apply(lm, malmen.fit(lm, held[:64], Config(), editor=malmen_editor())):
        together = shares(lm, held[:64])
    with lp.apply(lm, mend.fit(lm, held[:64], mend.Config(), editor=trained())):
        summed = shares(lm, held[:64])
    assert together[0] > summed[0] + 0.15 and together[1] > summed[1] + 0.15


@pytest.mark.slow
@pytest.mark.xdist_group("toy_facts")
@pytest.mark.parametrize("reset", [True, False])
def test_commits_one_after_the_other_degrade(reset: bool) -> None:
    """Documents the limit: after seven more commits of eight facts the first one is lost."""
    (_, _, held), lm = known(), known()[0].lm
    patches = []
    for start in range(0, 64, 8):
        patch = malmen.fit(lm, held[start : start + 8], Config(reset_each=reset), editor=malmen_editor())
        patches.append(lp.apply(lm, patch))
        if start == 0:
            first = shares(lm, held[:8])[0]
    last = shares(lm, held[:8])[0]
    lp.remove(lm)
    assert len(patches) == 8 and last < first - 0.3
