"""MEND: its network starts as the normalised gradient, learns from factors alone, and edits a model of known facts."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_lm, tiny_model, tiny_tokenizer
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from toy_facts import NAMES, TOWNS, WORDINGS, Toy, toy

import lmpatch as lp
from lmpatch.data.edits import Ask, Edit
from lmpatch.errors import BadInput, BadPatch, WrongModel
from lmpatch.inference.forward import frozen
from lmpatch.inference.score import score
from lmpatch.inference.states import hidden, next_kl
from lmpatch.inference.tokens import encode
from lmpatch.locate.gradients import Gradients, read_gradients
from lmpatch.methods import finetune, mend
from lmpatch.methods.hypernetwork import editing
from lmpatch.methods.hypernetwork.network import Hypernetwork, joined, normalised
from lmpatch.methods.hypernetwork.task import Meta
from lmpatch.methods.mend import Config, Mend, TrainingData
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap
from lmpatch.patches.editor import Editor, load_editor
from lmpatch.training.cached import Cached
from lmpatch.training.facts import Sample, Split

EDITS, _ = mend.example(tiny_lm("llama"))
CITIES = ("Rome", "Paris", "Tokyo", "Seattle", "Lima", "Oslo")
FACTS = [
    Edit(
        f"The {thing} of {i} is in", town, rephrases=[f"You find the {thing} of {i} in"],
        locality={"other": [Ask(f"The bridge of {i} is in", ("Italy",))]},
    )
    for i, town in enumerate(CITIES) for thing in ("tower", "opera")
]  # fmt: skip
QUICK: dict[str, Any] = {"layers": 2, "rank": 8, "batch": 3, "steps": 6, "validate": 2, "lr": 1e-3, "strength": 1e-2}
QUICK |= {"validate_every": 3, "save_every": 2}


def weight(lm: LM, name: str) -> torch.Tensor:
    """A projection's weight as (out, in)."""
    found = lm.parameter(lm.layout.weight(name))
    return found.T if lm.layout.transposed else found


def read(lm: LM, net: Mend, edits: Sequence[Edit]) -> dict[str, Gradients]:
    with frozen(lm):
        return editing.read(lm, net, [encode(lm, e.prompt, e.target) for e in edits])


def plain_loss(lm: LM, edit: Edit) -> torch.Tensor:
    """Mean over target tokens of -log p, by a plain forward."""
    row = encode(lm, edit.prompt, edit.target)
    z = lm.model(torch.tensor([row.ids])).logits[0].float()
    return F.cross_entropy(z[row.target - 1 : -1], torch.tensor(row.ids[row.target :]))


def test_the_factors_are_those_of_the_weights_gradient(lm: LM) -> None:
    """Their sum is autograd's gradient of the whole weight, but for the start token, whose input is left out."""
    net = Mend.new(lm, 2, 4, 1.0, 0)
    found = read(lm, net, EDITS)
    weights = [lm.parameter(lm.layout.weight(name)).requires_grad_() for name in net.order]
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def see(name: str, _: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        inputs[name], outputs[name] = args[0].detach(), output

    for i, edit in enumerate(EDITS):
        with hooked(*(Hook(lm.module(name), partial(see, name)) for name in net.order)):
            loss = plain_loss(lm, edit)
        each = torch.autograd.grad(loss, [*weights, *(outputs[name] for name in net.order)])
        for name, whole, at_outputs in zip(net.order, each, each[len(weights) :], strict=False):
            x, g = (t.reshape(-1, t.shape[-1])[0] for t in (inputs[name], at_outputs))
            own, wanted = found[name].of([i]), whole.T if lm.layout.transposed else whole
            torch.testing.assert_close(own.gradients.T @ own.inputs, wanted - torch.outer(g, x), rtol=1e-4, atol=1e-5)


def test_in_the_last_block_only_tokens_that_matter_are_read(lm: LM) -> None:
    net = Mend.new(lm, 1, 4, 1.0, 0)
    row = encode(lm, EDITS[0].prompt, EDITS[0].target)
    for own in read(lm, net, EDITS[:1]).values():
        assert len(own.row) == len(row.ids) - row.target


def test_a_batch_reads_what_each_row_alone_does(lm: LM) -> None:
    net = Mend.new(lm, 2, 4, 1.0, 0)
    both = read(lm, net, EDITS)
    for i, edit in enumerate(EDITS):
        for name, alone in read(lm, net, [edit]).items():
            own = both[name].of([i])
            torch.testing.assert_close(own.inputs, alone.inputs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own.gradients, alone.gradients, rtol=1e-4, atol=1e-5)


def test_from_cached_states_the_same_is_read(any_lm: LM) -> None:
    """Cut from the frame of the longest row, on every family, sliding windows and ALiBi-free rotary tables included."""
    lm, net = any_lm, Mend.new(any_lm, 2, 4, 1.0, 0)
    edits = [*EDITS, Edit("The capital of France, which is a country in the west of Europe, is", "Paris and no other")]
    rows = [encode(lm, e.prompt, e.target) for e in edits]
    with frozen(lm):
        cached = Cached(lm, rows, lm.layout.n_layers - 2)
        plain, again = (
            editing.read(lm, net, rows[:2]),
            read_gradients(lm, rows[:2], net.order, lambda: cached.states(rows[:2])),
        )
    for name in net.order:
        torch.testing.assert_close(again[name].inputs, plain[name].inputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again[name].gradients, plain[name].gradients, rtol=1e-4, atol=1e-5)


def test_a_fresh_network_gives_inputs_and_gradients_normalised(lm: LM) -> None:
    net = Mend.new(lm, 2, 4, 1.0, 0)
    found = read(lm, net, EDITS)
    net.keep(net.joined(found))
    for name, own in found.items():
        x, g = net(name, own)
        for made, raw in ((x, own.inputs), (g, own.gradients)):
            torch.testing.assert_close(made, (raw - raw.mean(0)) / raw.std(0), rtol=1e-3, atol=1e-3)


def test_statistics_that_grow_are_those_of_all_rows_at_once() -> None:
    rows = torch.randn(23, 5, generator=torch.Generator().manual_seed(0)) * 3 + 100
    state = (torch.zeros((), dtype=torch.float64), *(torch.zeros(5, dtype=torch.float64) for _ in range(2)))
    for part in rows.split([1, 7, 15]):
        state = joined(*state, part)
    assert float(state[0]) == 23
    torch.testing.assert_close(normalised(rows, *state), (rows - rows.mean(0)) / rows.std(0), rtol=1e-4, atol=1e-4)
    assert joined(*state, rows[:0]) == state


def test_one_token_alone_is_no_statistic_and_no_accident() -> None:
    rows = torch.tensor([[3.0, -4.0]])
    state = joined(torch.zeros((), dtype=torch.float64), *(torch.zeros(2, dtype=torch.float64) for _ in range(2)), rows)
    assert torch.equal(normalised(rows, *state), torch.zeros(1, 2))


def test_a_fresh_network_can_learn() -> None:
    """It stands at the border of the clamp: a relu's gradient would be 0 there, and all would stay as it is."""
    lm = tiny_lm("llama")
    net = Mend.new(lm, 1, 4, 1.0, 0)
    own = read(lm, net, EDITS)[net.order[0]]
    x, g = net(net.order[0], own)
    (x.square().sum() + g.square().sum()).backward()
    assert net.outer[0].grad is not None and net.outer[0].grad[-1].abs().max() > 0


def meta(lm: LM, net: Mend, **settings: Any) -> Meta:
    cfg = replace(mend.Training(), **{**QUICK, **settings})
    return Meta(lm, net, Split(FACTS[:3], FACTS[3:5], ()), cfg)


def moved(net: Mend, seed: int) -> Mend:
    """The network away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in [*net.outer, *net.bias, *net.shift]:
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return net


def judged(lm: LM, named: Mapping[str, torch.Tensor], s: Sample) -> torch.Tensor:
    """The losses that judge a change, with whole weights in place of these: another wording, and another answer."""
    total = torch.zeros(())
    for prompt, answer, keep in ((s.again, s.answer, False), (s.other, s.other_answer, True)):
        row = encode(lm, prompt, answer)
        ids, at = torch.tensor([row.ids]), slice(row.target - 1, len(row.ids) - 1)
        now = torch.func.functional_call(lm.model, named, ids, tie_weights=False).logits[0, at].log_softmax(-1)
        if keep:
            before = lm.model(ids).logits[0, at].log_softmax(-1)
            each = (before.exp() * (before - now)).sum(-1)
        else:
            each = 0.1 * F.nll_loss(now, torch.tensor(row.ids[row.target :]), reduction="none")
        total = total + each.mean()
    return total


@pytest.mark.slow
def test_the_meta_gradient_is_that_of_finite_differences_and_of_a_slow_form(lm: LM) -> None:
    """The slow form writes each fact's change into whole weights, one fact after the other, by plain autograd."""
    net = moved(Mend.new(lm, 2, 4, -1e-2, 0), 1)
    with frozen(lm):
        task = meta(lm, net)
        losses = task.learn(0)
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    assert set(grads) == {name for name, _ in net.named_parameters()}
    samples = task.samples(0)
    found = task.gradients(samples)

    def slow() -> torch.Tensor:
        total = torch.zeros(())
        for i, s in enumerate(samples):
            named = {}
            for name in net.order:
                own = found[name].of([i])
                x, g = net(name, own, task.read)
                change = net.strength[net.order.index(name)] * (g.T @ x)
                named[lm.layout.weight(name)] = (
                    (weight(lm, name) + change).T if lm.layout.transposed else weight(lm, name) + change
                )
            total = total + judged(lm, named, s) / len(samples)
        return total

    value = slow()
    assert sum(losses.values()) == pytest.approx(float(value.detach()), abs=1e-5)
    for (name, _), wanted in zip(
        net.named_parameters(), torch.autograd.grad(value, list(net.parameters())), strict=True
    ):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(grads[name], wanted, rtol=1e-3, atol=1e-5 * max(1.0, scale))
    direction = {name: torch.sign(g) for name, g in grads.items()}
    steps = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in net.named_parameters():
                p += sign * 1e-4 * direction[name]
            steps.append(float(slow()))
            for name, p in net.named_parameters():
                p -= sign * 1e-4 * direction[name]
    slope = sum(float(g.abs().sum()) for g in grads.values())
    assert (steps[0] - steps[1]) / 2e-4 == pytest.approx(slope, rel=0.05)


def test_statistics_grow_with_steps_of_training_alone() -> None:
    lm = tiny_lm("llama")
    net = Mend.new(lm, 2, 4, -1e-2, 0)
    with frozen(lm):
        task = meta(lm, net)
        task.learn(0)
        assert float(net.count0) == 0  # the step is not made yet: one that is made again counts once
        task.updated()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        assert before["count0"] > 0
        task.validate(1)
    editor = Editor("mend", {}, mend.example_editor(lm).base, net.parts(), net.tensors(), {})
    mend.fit(lm, EDITS, Config(), editor=editor)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.slow
def test_a_training_that_was_stopped_gives_the_same_editor(tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if what == "mend" and done == 3:
            raise KeyboardInterrupt

    lm = tiny_lm("llama")
    before = lm.fingerprint()
    whole = lp.train(tiny_lm("llama"), "mend", FACTS, **QUICK)
    with pytest.raises(KeyboardInterrupt):
        lp.train(lm, "mend", FACTS, out=tmp_path, progress=stop, **QUICK)
    resumed = lp.train(lm, "mend", FACTS, out=tmp_path, **QUICK)
    assert resumed.hash() == whole.hash() != lp.train(lm, "mend", FACTS, **{**QUICK, "steps": 5}).hash()
    assert len((tmp_path / "mend.jsonl").read_text().splitlines()) == 2
    assert lm.fingerprint() == before and resumed.made["steps"] == 6
    with pytest.raises(BadInput, match="another run"):
        lp.train(lm, "mend", FACTS, out=tmp_path, **{**QUICK, "lr": 1e-4})


@pytest.mark.slow
def test_an_editor_is_saved_and_loaded_and_fits_its_model_alone(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    editor = lp.train(
        lm, "mend", TrainingData(FACTS).edits, unrelated=[Ask("Who founded Apple?", ("Steve Jobs",))], **QUICK
    )
    editor.save(tmp_path / "mend.safetensors")
    loaded = load_editor(tmp_path / "mend.safetensors")
    assert loaded.hash() == editor.hash()
    assert lp.fit(lm, "mend", EDITS, editor=loaded).hash() == lp.fit(lm, "mend", EDITS, editor=editor).hash()
    with pytest.raises(WrongModel, match="Train one for this model"):
        lp.fit(tiny_lm("gpt2"), "mend", EDITS, editor=loaded)


def test_a_commit_is_the_sum_of_its_facts(lm: LM) -> None:
    editor = mend.example_editor(lm)
    whole, each = mend.fit(lm, EDITS, Config(), editor=editor), mend.fit_each(lm, EDITS, Config(), editor=editor)
    twice = mend.fit(lm, EDITS, Config(strength=2.0), editor=editor)
    for name, delta in whole.deltas.items():
        torch.testing.assert_close(sum(p.deltas[name].dense() for p in each), delta.dense(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(twice.deltas[name].dense(), 2 * delta.dense())


def test_without_reset_the_second_fact_is_read_under_the_first(caplog: pytest.LogCaptureFixture) -> None:
    lm = tiny_lm("llama")
    editor = mend.example_editor(lm)
    with caplog.at_level(logging.WARNING):
        turn = mend.fit(lm, EDITS, Config(reset_each=False), editor=editor)
    assert "2 facts change it in turn" in caplog.text
    first = mend.fit(lm, EDITS[:1], Config(), editor=editor)
    with lp.apply(lm, first, mount="side"):
        second = mend.fit(lm, EDITS[1:], Config(reset_each=False), editor=editor)
    summed = {name: first.deltas[name].dense() + second.deltas[name].dense() for name in turn.deltas}
    for name, delta in turn.deltas.items():
        torch.testing.assert_close(delta.dense(), summed[name], rtol=1e-4, atol=1e-5)


def test_sequential_use_warns_and_reset_reads_the_model_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    lm = tiny_lm("llama")
    editor = mend.example_editor(lm)
    alone = mend.fit(lm, EDITS[1:], Config(), editor=editor)
    assert caplog.text == ""
    with lp.apply(lm, mend.fit(lm, EDITS[:1], Config(), editor=editor)), caplog.at_level(logging.WARNING):
        reset = mend.fit(lm, EDITS[1:], Config(), editor=editor)
        assert "1 patches change its weights" in caplog.text
        drifted = mend.fit(lm, EDITS[1:], Config(reset_each=False), editor=editor)
    assert reset.hash() == alone.hash() != drifted.hash()


@pytest.mark.slow
def test_a_missing_editor_says_how_one_is_trained_and_how_long_that_takes() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(BadInput, match=r"lmpatch train MODEL mend FACTS .* 2000 steps take about \d+ minutes"):
        lp.fit(lm, "mend", EDITS)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda e: e.parts.update(rank=9), BadPatch),
        (lambda e: e.parts.update(rank=10**9), BadPatch),
        (lambda e: e.parts.pop("sizes"), BadPatch),
        (lambda e: e.parts.update(sizes={"model.layers.9.mlp.down_proj": [128, 64]}), BadPatch),
        (lambda e: e.tensors.pop("strength"), BadPatch),
        (lambda e: e.tensors.update(strength=torch.zeros(2)), BadPatch),
    ],
)
def test_an_editor_that_is_none_is_refused(damage: Any, error: type[Exception]) -> None:
    lm = tiny_lm("llama")
    editor = mend.example_editor(lm)
    damage(editor)
    with pytest.raises(error):
        mend.fit(lm, EDITS, Config(), editor=editor)


@pytest.mark.parametrize(
    "wrong", [{"layers": 0}, {"rank": 0}, {"batch": 0}, {"lr": 0.0}, {"clip": -1.0}, {"answer_tokens": 0}]
)
def test_training_refuses_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        lp.train(tiny_lm("llama"), "mend", FACTS, **{**QUICK, **wrong})


def test_training_needs_facts_with_questions_to_leave_alone() -> None:
    with pytest.raises(BadInput, match="unrelated"):
        lp.train(tiny_lm("llama"), "mend", [Edit("a b", "c"), Edit("d e", "f")], **QUICK)
    with pytest.raises(BadInput, match="a batch has 40 facts"):
        lp.train(tiny_lm("llama"), "mend", FACTS, **{**QUICK, "batch": 40})


class Flops(TorchDispatchMode):
    """Counts those of products."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def costs(form: type[Hypernetwork], layers: int, rank: int) -> float:
    """Products of an edit, the network's and the solve's included, over those of a forward and backward of its row, on
    a model as deep as Gemma-3-270M."""
    lm = wrap(tiny_model("llama", num_hidden_layers=18), tiny_tokenizer())
    row, net = encode(lm, EDITS[0].prompt, EDITS[0].target), form.new(lm, layers, rank, 1.0, 0)

    def edit() -> None:
        with frozen(lm), torch.no_grad():
            found = editing.read(lm, net, [row])
            for name in net.order:
                net.written(name, found[name])

    def plain() -> None:
        lm.model.requires_grad_(True)
        plain_loss(lm, EDITS[0]).backward()

    counts = []
    for run in (edit, plain):
        with Flops() as counter:
            run()
        counts.append(counter.total)
    return counts[0] / counts[1]


@pytest.mark.slow
def test_an_edit_costs_at_most_one_and_a_half_times_a_forward_and_backward() -> None:
    """What is below the lowest block runs forward only, and no weight gets a gradient of its own size."""
    assert 0.3 < costs(Mend, 3, 51) <= 1.5  # as 512 is to Gemma's 640


# What it claims, on a model that knows where people live.


def facts(known: Toy, names: Sequence[str], seed: int) -> list[Edit]:
    """New towns, each asked for in one of the wordings; the others are rephrases. Other people's towns must stay."""
    draw, made = random.Random(seed), []
    for place, name in product(range(len(WORDINGS)), names):
        texts = [wording.format(name) for wording in (*WORDINGS[place:], *WORDINGS[:place])]
        near = [other for other in draw.sample(NAMES, 4) if other != name]
        asks = [Ask(draw.choice(WORDINGS).format(n), (known.homes[n].split()[0],)) for n in near]
        new = draw.choice([town for town in TOWNS if town != known.homes[name].split()[0]])
        made.append(Edit(texts[0], new, name, rephrases=texts[1:], locality={"other": asks}))
    return made


@cache
def known() -> tuple[Toy, list[Edit], list[Edit]]:
    """The toy model, facts about 160 names to learn editing from, and one about each of the other 80."""
    model = toy()
    return model, facts(model, NAMES[:160], 1), facts(model, NAMES[160:], 2)[:80]


@cache
def trained() -> Editor:
    model, learn, _ = known()
    return lp.train(
        model.lm, "mend", learn, layers=2, rank=64, steps=400, batch=16, lr=1e-3, strength=1e-2,
        strength_lr=1e-2, edit_weight=0.3, validate=16,
    )  # fmt: skip


def shares(lm: LM, edits: Sequence[Edit]) -> tuple[float, float]:
    """Facts stated, and reworded."""
    pairs = [[(e.prompt, e.target) for e in edits], [(e.rephrases[0], e.target) for e in edits]]
    return tuple(  # type: ignore[return-value]
        sum(s.accuracy for s in score(lm, [p for p, _ in own], [t for _, t in own])) / len(own) for own in pairs
    )


@pytest.mark.slow
@pytest.mark.xdist_group("toy_facts")
def test_one_fact_is_stated_in_other_words_and_moves_less_than_fine_tuning() -> None:
    (model, _, held), editor = known(), trained()
    lm, held = model.lm, held[:20]
    near = [wording.format(name) for name in NAMES[:30] for wording in WORDINGS]
    before = hidden(lm, near)
    tuned = [finetune.fit(lm, [edit], finetune.Config(lr=5e-3)) for edit in held]
    rows = []
    for patches in (mend.fit_each(lm, held, Config(), editor=editor), tuned):
        found = []
        for patch, edit in zip(patches, held, strict=True):
            with lp.apply(lm, patch):
                found.append([*shares(lm, [edit]), float(next_kl(lm, before, hidden(lm, near)).mean())])
        rows.append([sum(column) / len(found) for column in zip(*found, strict=True)])
    (stated, reworded, moved), (tuned_stated, _, tuned_moved) = rows
    assert stated >= 0.9 and reworded >= 0.9 and tuned_stated >= 0.9
    assert moved < tuned_moved and math.isfinite(moved)


@pytest.mark.slow
@pytest.mark.xdist_group("toy_facts")
def test_facts_in_turn_collapse_without_reset() -> None:
    """Documents the limit: single edits are right, and eighty in turn leave nothing of them nor of what was known."""
    (model, _, held), editor = known(), trained()
    lm = model.lm
    single = []
    for patch, edit in zip(mend.fit_each(lm, held, Config(), editor=editor), held, strict=True):
        with lp.apply(lm, patch):
            single.append(shares(lm, [edit])[0])
    others = [
        Edit(WORDINGS[0].format(n), model.homes[n].split()[0], rephrases=[WORDINGS[1].format(n)]) for n in NAMES[:40]
    ]
    assert sum(single) / len(single) >= 0.9 and shares(lm, others)[0] >= 0.9
    with lp.apply(lm, mend.fit(lm, held, Config(reset_each=False), editor=editor)):
        assert shares(lm, held)[0] <= 0.4
        assert shares(lm, others)[0] <= 0.4
