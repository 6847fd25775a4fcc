"""IRCAN scales the neurons that most records name, and its search tells what each edit would do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from snapshot import Lines, changed, name, state
from tiny import TEXT, tiny_lm
from torch import Tensor

from lmpatch.benches import kre
from lmpatch.benches.kre import choose
from lmpatch.benches.memotrap import complete, cut
from lmpatch.data.context import ContextRecord, InContext
from lmpatch.errors import BadInput
from lmpatch.inference.generate import generate
from lmpatch.inference.interventions import Rule
from lmpatch.inference.plain_text import perplexity
from lmpatch.inference.replay import Recording, record
from lmpatch.inference.states import hidden
from lmpatch.inference.tokens import encode, encode_all
from lmpatch.locate.neurons import drawn, ranked, scaling
from lmpatch.methods import param_mute, scone
from lmpatch.methods.ircan import grid as _ircan_grid
from lmpatch.methods.ircan import method as ircan
from lmpatch.methods.ircan.grid import accuracies, foreign, own_answers, scaled_states
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM
from lmpatch.models.units import Neuron
from lmpatch.patches.decode.patch import DecodePatch
from lmpatch.patches.decode.rules import AdaCAD, Grd, Power
from lmpatch.patches.ledger import Applied, applied, apply
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.probes.integrated_gradients import probe as integrated_gradients
from lmpatch.probes.integrated_gradients.scores import Credit

RECORDS, CFG = ircan.example(tiny_lm("llama"))
NEURONS = [Neuron(1 + i % 3, 3 * i) for i in range(40)]
FACTORS = [0.0, 20.0, -50.0]
SETTINGS = [(0, 1.0), (1, 0.0), (20, 2.0), (20, 0.0), (40, 1.5)]


def columns(patch: WeightPatch) -> dict[str, dict[int, float]]:
    """Parameter → column → factor."""
    return {
        name: dict(zip(d.index.tolist(), d.factor.tolist(), strict=True))  # type: ignore[attr-defined]
        for name, d in patch.deltas.items()
    }


@pytest.fixture(params=["llama", "gpt2"])
def talker(request: pytest.FixtureRequest) -> Iterator[LM]:
    """A random model that says letters, and periods in place of some, so that its answers end."""
    with talking(request.param, ".") as lm:
        yield lm


@contextmanager
def talking(family: str, mark: str) -> Iterator[LM]:
    """A random model that says letters, and the mark in place of some."""
    lm = tiny_lm(family)
    (period,) = lm.tokenizer(mark, add_special_tokens=False)["input_ids"]
    ids = torch.arange(lm.layout.vocab)
    silent = torch.tensor([not text.isalpha() for text in lm.tokenizer.batch_decode(ids[:, None])])

    def say(_: Any, __: Any, z: Tensor) -> Tensor:
        z = z.masked_fill(silent, -1e4)
        ends = z.argmax(-1, keepdim=True) % 4 == 0
        return torch.where(ends & (ids == period), z.amax(-1, keepdim=True) + 1, z)

    with hooked(Hook(lm.module(lm.layout.head), say)):
        yield lm


def told(lm: LM, end: str = "\n") -> list[ContextRecord]:
    """Records some of which the model answers as wanted: the answers are what it says anyway, or half of that. Each
    character of an answer is a token, so that no other tokens say the same."""
    words = " ".join(TEXT).split()
    made = []
    pairs = [
        InContext(*(" ".join(words[k : i + 4]) + end for k in (i, i + 2))) for i in range(40)
    ]  # no blank behind \n
    for pair, said in zip(pairs, generate(lm, pairs, max_new_tokens=9, stop=()), strict=True):
        text, prompt, without_context = cut(said, line=":" in end), pair.prompt, pair.without_context
        for answer in (text, text[: len(text) // 2]):
            row = encode(lm, prompt, answer or "x")
            if answer.isascii() and len(row.ids) - row.target == len(answer):
                made.append(ContextRecord("c", "q", answer, prompt=prompt, without_context=without_context))
    return made


def lettered() -> list[ContextRecord]:
    made = []
    for i, thing in enumerate(["sky", "tower", "capital of Japan"]):
        question, options = f"What colour is the {thing}?", ("blue", "green", "red")
        made.append(ContextRecord(f"The {thing} is old.", question, "ABC"[i % 3], "ABC"[i % 2], options=options))
    return made + [replace(r, prompt=f"{r.prompt}\n", without_context=f"{r.without_context}\n") for r in made]


def test_the_columns_of_the_most_named_neurons_are_scaled(lm: LM) -> None:
    patch = ircan.fit(lm, RECORDS, CFG)
    found = integrated_gradients.run(lm, RECORDS, CFG)
    want = ranked(credit.neurons for credit in found.records)[: CFG.neurons]
    scaled = {(name, i): f for name, by_column in columns(patch).items() for i, f in by_column.items()}
    assert scaled == {(lm.layout.weight(lm.layout.downs[n.layer]), n.index): CFG.factor for n, _ in want}
    assert patch.notes["neurons"] == [[n.layer, n.index, count] for n, count in want]


def test_neurons_are_ordered_by_count_then_score_then_address() -> None:
    named = [[(1, 4, 0.9), (0, 3, 0.2)], [(0, 3, 0.2), (2, 2, 0.3)], [(2, 2, 0.1), (1, 4, 0.1)], [(3, 3, 9.0)]]
    assert ranked(named) == [(Neuron(1, 4), 2), (Neuron(0, 3), 2), (Neuron(2, 2), 2), (Neuron(3, 3), 1)]
    assert [n for n, _ in ranked(named, "first_seen")] == [Neuron(1, 4), Neuron(0, 3), Neuron(2, 2), Neuron(3, 3)]
    late = [[(2, 2, 0.1)], [(1, 1, 0.5)]]
    assert [n for n, _ in ranked(late)] == [Neuron(1, 1), Neuron(2, 2)]
    assert [n for n, _ in ranked(late, "first_seen")] == [Neuron(2, 2), Neuron(1, 1)]


@pytest.mark.slow
def test_neurons_are_found_on_the_first_examples_only(lm: LM) -> None:
    one = ircan.fit(lm, RECORDS, replace(CFG, examples=1))
    assert one.notes == ircan.fit(lm, RECORDS[:1], CFG).notes
    assert one.notes != ircan.fit(lm, RECORDS[1:], CFG).notes


@pytest.mark.slow
def test_scores_that_are_there_already_give_the_same_patch(lm: LM) -> None:
    scores = integrated_gradients.run(lm, RECORDS, CFG)
    assert ircan.fit(lm, RECORDS, CFG, scores=scores).hash() == ircan.fit(lm, RECORDS, CFG).hash()
    ircan.fit(lm, RECORDS, replace(CFG, neurons=2, factor=9.0, budget=3), scores=scores)  # these move no score
    with pytest.raises(BadInput, match="another run: records differ"):
        ircan.fit(lm, RECORDS[::-1], CFG, scores=scores)
    with pytest.raises(BadInput, match="another run: config differ"):
        ircan.fit(lm, RECORDS, replace(CFG, grid="left"), scores=scores)
    with pytest.raises(BadInput, match="another run: model differ"):
        ircan.fit(tiny_lm(lm.name.removeprefix("tiny-"), seed=1), RECORDS, CFG, scores=scores)


def test_the_random_control_draws_as_many_neurons_each_once(lm: LM) -> None:
    everything = lm.layout.n_layers * lm.layout.d_ff
    assert len(set(drawn(lm, everything, 0))) == everything
    controls = [ircan.fit(lm, RECORDS, replace(CFG, control_seed=seed)) for seed in (0, 0, 1)]
    assert controls[0].hash() == controls[1].hash()
    assert columns(controls[0]) != columns(controls[2])
    assert [sum(map(len, columns(c).values())) for c in controls] == [CFG.neurons] * 3


@pytest.mark.slow
def test_factors_on_rows_give_the_states_of_the_edited_weights(any_lm: LM) -> None:
    lm = any_lm
    rows = [row.ids for row in encode_all(lm, [r.prompt for r in RECORDS])]
    recording = record(lm, rows, [0, 0], lowest=1)
    for count in (0, 1, 20, 40):
        found = scaled_states(recording, NEURONS[:count], FACTORS)
        for factor, states in zip(FACTORS, found, strict=True):
            with edited(lm, count, factor):
                want = record(lm, rows, [0, 0]).hidden[lm.layout.n_layers]
            assert (states - want).abs().max() <= 1e-5 * want.abs().max()


def edited(lm: LM, count: int, factor: float) -> Applied:
    return apply(lm, scaling(lm, NEURONS[: max(count, 1)], factor if count else 1.0, method="edit"))


def asked(lm: LM, records: list[ContextRecord]) -> float:
    """Share of right records, by the benches."""
    free, choices = ([r for r in records if bool(r.options) is o] for o in (False, True))
    said = complete(lm, free, [[r.answer] for r in free], limit=20, batch_size=64) if free else []
    said += choose(lm, choices, batch_size=64)
    return sum(one.text == r.answer for one, r in zip(said, free + choices, strict=True)) / len(records)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "tokens"), [(None, 40), (None, 4096), (Power(1.5), 4096), (AdaCAD(0.0), 40), (Grd(0.75), 4096)], ids=repr
)
def test_the_table_of_a_search_is_what_the_bench_says_of_each_edit(
    talker: LM, rule: Rule | None, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ircan_grid, "TOKENS", tokens)  # everything in one forward, and one setting at a time
    lm = talker
    with apply(lm, DecodePatch.make(lm, rule, method="cad")) if rule else nullcontext():
        records = told(lm)
        table = accuracies(lm, records, NEURONS, SETTINGS)
        for (count, factor), found in zip(SETTINGS, table.tolist(), strict=True):
            with edited(lm, count, factor):
                assert found == pytest.approx(asked(lm, records))
    assert len(set(table.tolist())) > 1 and table[0] > 0


@pytest.mark.slow
def test_answers_to_questions_end_with_their_line_in_a_search_too() -> None:
    with talking("llama", "\n") as lm:
        records = told(lm, ":\n")
        table = accuracies(lm, records, NEURONS, SETTINGS)
        for (count, factor), found in zip(SETTINGS, table.tolist(), strict=True):
            with edited(lm, count, factor):
                assert found == pytest.approx(asked(lm, records))
        assert len(set(table.tolist())) > 1 and table[0] > 0
        texts = [
            replace(r, prompt=r.prompt.replace(":", " "), without_context=r.without_context.replace(":", " "))
            for r in records
        ]
        assert accuracies(lm, texts, [], [(0, 1.0)])[0] == 0  # a text to go on with does not end there


@pytest.mark.slow
def test_a_search_that_finds_nothing_right_says_so(lm: LM) -> None:
    with pytest.warns(UserWarning, match="no setting answers any of the"):
        ircan.fit(lm, RECORDS, replace(CFG, search_neurons=(2,), search_factors=(3.0,), objective="accuracy"))


def test_a_patch_keeps_no_contexts(lm: LM) -> None:
    patch = ircan.fit(lm, RECORDS, CFG)
    assert [(e["prompt"], e["target"]) for e in patch.edits] == [(r.question, r.answer) for r in RECORDS]
    assert not any(r.context in str(patch.edits) for r in RECORDS)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [None, Power(1.5), AdaCAD(0.0)], ids=repr)
def test_letters_are_chosen_as_the_bench_chooses(lm: LM, rule: Rule | None) -> None:
    with apply(lm, DecodePatch.make(lm, rule, method="cad")) if rule else nullcontext():
        table = accuracies(lm, lettered(), NEURONS, SETTINGS[:3])
        for (count, factor), found in zip(SETTINGS, table.tolist(), strict=False):
            with edited(lm, count, factor):
                assert found == pytest.approx(asked(lm, lettered()))


@pytest.mark.slow
@pytest.mark.parametrize("talker", ["llama"], indirect=True)
def test_an_answer_that_goes_on_is_not_right(talker: LM) -> None:
    """Its tokens are said, and more of the word behind them."""
    whole = [r for r in told(talker) if len(r.answer) > 1 and accuracies(talker, [r], [], [(0, 1.0)])[0] == 1]
    assert whole
    for record_ in whole:
        begun = replace(record_, answer=record_.answer[:-1])
        assert accuracies(talker, [begun], [], [(0, 1.0)])[0] == 0


def test_letters_need_no_full_head(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    monkeypatch.setattr(lm.module(lm.layout.head), "forward", lambda *_: pytest.fail("the whole head ran"))
    accuracies(lm, lettered(), NEURONS, SETTINGS)


def test_each_count_starts_at_its_own_lowest_block(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = Recording.forward

    def watch(self: Recording, hidden: Tensor, layer: int, **more: Any) -> Tensor:
        seen.append(layer)
        return forward(self, hidden, layer, **more)

    monkeypatch.setattr(Recording, "forward", watch)
    settings = [(0, 1.0), (1, 2.0), (1, 3.0), (2, 2.0), (3, 2.0)]
    accuracies(lm, RECORDS, [Neuron(3, 1), Neuron(2, 7), Neuron(2, 1)], settings)
    assert seen == [4, 3, 2, 2]


def test_a_record_beyond_the_window_is_refused(lm: LM) -> None:
    with pytest.raises(BadInput, match="reads 512. Shorten its context"):
        accuracies(lm, [replace(RECORDS[0], prompt="The capital of Japan. " * 200 + "It")], NEURONS, SETTINGS)


@pytest.mark.slow
def test_a_search_takes_the_best_setting_and_of_equal_ones_the_gentlest(talker: LM) -> None:
    lm, records = talker, told(talker)
    cfg = replace(
        CFG, search_neurons=(4, 1, 2), search_factors=(30.0, 2.0), examples=2, objective="accuracy", max_perplexity=1e9
    )
    patch = ircan.fit(lm, records, cfg)
    table = patch.notes["search"]
    assert [row[:2] for row in table] == [[h, b] for h in (1, 2, 4) for b in (2.0, 30.0)]
    best = max(row[2] for row in table)
    count, factor, _ = next(row for row in table if row[2] == best)
    assert {f for by_column in columns(patch).values() for f in by_column.values()} == {factor}
    assert len(patch.notes["neurons"]) == count
    with apply(lm, patch):
        assert patch.notes["accuracy"] == pytest.approx(asked(lm, records))
    assert patch.notes["accuracy_before"] == pytest.approx(asked(lm, records))


def test_the_winner_is_measured_with_its_weights_edited(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts: list[Any] = []

    def found(lm: LM, records: Any, neurons: Any, settings: Any, **_: Any) -> Tensor:
        mounts.append([on.mount for on in applied(lm)])
        return torch.ones(len(settings))

    monkeypatch.setattr(ircan, "accuracies", found)
    cfg = replace(CFG, search_neurons=(2,), search_factors=(3.0,), objective="accuracy", max_perplexity=1e9)
    ircan.fit(lm, RECORDS, cfg)
    ircan.fit(lm, RECORDS, replace(cfg, when="context"))
    assert mounts == [[], ["bake"], [], ["side"]]


@pytest.mark.slow
def test_records_that_name_no_neuron_are_counted_and_too_few_neurons_are_refused(lm: LM) -> None:
    scores = integrated_gradients.run(lm, RECORDS, CFG)
    assert ircan.fit(lm, RECORDS, CFG, scores=scores).notes["records_without_neurons"] == 0
    scores = replace(scores, records=(scores.records[0], Credit((), -0.1)))
    assert ircan.fit(lm, RECORDS, CFG, scores=scores).notes["records_without_neurons"] == 1
    with pytest.raises(BadInput, match="1 records name 5 neurons, and 6 are to be scaled"):
        ircan.fit(lm, RECORDS[:1], replace(CFG, top=5, threshold=0.0, neurons=6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neurons": 0}, "neurons is 0"),
        ({"factor": float("inf")}, "factor is inf"),
        ({"search_neurons": (1, 2)}, "both search_neurons and search_factors"),
        ({"search_neurons": (0,), "search_factors": (2.0,)}, "neurons is 0"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ircan.fit(tiny_lm("llama"), RECORDS, replace(CFG, **change))  # type: ignore[arg-type]


def test_contexts_that_change_nothing_are_said_to() -> None:
    same = ContextRecord("c", "q", "Rome", prompt="The Eiffel Tower is in", without_context="The Eiffel Tower is in")
    with pytest.raises(BadInput, match="none of 1 records names a neuron"):
        ircan.fit(tiny_lm("llama"), [same], CFG)


def test_its_memory_grows_with_the_budget_and_a_search() -> None:
    lm = tiny_lm("llama")
    need = ircan.estimate(lm, 2, CFG)
    assert ircan.estimate(lm, 2, replace(CFG, budget=2 * CFG.budget)) > need > CFG.budget << 20


@pytest.mark.slow
def test_an_interrupt_while_the_winner_is_measured_leaves_the_model_as_it_was() -> None:
    lm, cfg = tiny_lm("llama"), replace(CFG, search_neurons=(2,), search_factors=(30.0,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = integrated_gradients.run(lm, RECORDS, cfg)
        before, lines = state(lm), Lines(lambda: ircan.fit(lm, RECORDS, cfg, scores=scores))
        files = ("/methods/ircan/method", "/locate/trial", "/patches/ledger")
        own = [line for line in lines.times if name(line).startswith(files)]
        for line in own:
            for time in {1, lines.times[line]}:
                assert lines.interrupted(line, time)
                assert changed(before, state(lm)) == [], f"{name(line)}, time {time}"
    assert any("trial" in name(line) for line in own)


# Only in a context, and chosen by both shares


def stories() -> list[ContextRecord]:
    """Records whose contexts are unrelated and stand in their prompts; answers are what the model says, or half."""
    words = " ".join(TEXT).replace(".", "").replace("?", "").split()
    return [
        ContextRecord(f"{words[i]} {words[i + 1]} is.", f"{words[i + 2]} {words[i + 3]}", words[i + 4], prompt=prompt,
                      without_context=f"{words[i + 2]} {words[i + 3]}\n", id=str(i))
        for i in range(len(words) - 5)
        for prompt in [f"{words[i]} {words[i + 1]} is. {words[i + 2]} {words[i + 3]}\n"]
    ]  # fmt: skip


@pytest.mark.parametrize("module", [ircan, scone, param_mute])
def test_by_default_a_patch_of_neurons_leaves_plain_text_to_the_bit(module: Any) -> None:
    lm = tiny_lm("llama")
    records, cfg = module.example(lm)
    patch = module.fit(lm, records, replace(cfg, when=module.Config().when))
    assert patch.only_in_context and patch.mounts == ("side",)
    always = module.fit(lm, records, cfg)
    prompts: list[Any] = [r.asked for r in records]
    clean, before = hidden(lm, prompts), perplexity(lm)
    with apply(lm, always, mount="side"):
        moved = hidden(lm, prompts)
        assert perplexity(lm) != before
    with apply(lm, patch):
        assert perplexity(lm) == before
        assert torch.equal(hidden(lm, prompts), moved) and not torch.equal(moved, clean)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [None, Power(1.5)], ids=repr)
def test_the_table_of_a_search_in_a_context_is_what_the_bench_says_of_each_patch(talker: LM, rule: Rule | None) -> None:
    lm = talker
    with apply(lm, DecodePatch.make(lm, rule, method="cad")) if rule else nullcontext():
        records = told(lm)
        table = accuracies(lm, records, NEURONS, SETTINGS, when="context")
        for (count, factor), found in zip(SETTINGS, table.tolist(), strict=True):
            neurons = NEURONS[: max(count, 1)]
            patch = scaling(lm, neurons, factor if count else 1.0, when="context", method="edit")
            with apply(lm, patch):
                assert found == pytest.approx(asked(lm, records))
                assert found == pytest.approx(float(accuracies(lm, records, [], [(0, 1.0)])[0]))
    assert len(set(table.tolist())) > 1


@pytest.mark.slow
@pytest.mark.parametrize("mark", [".", " "])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_first_word_is_told_as_the_bench_tells_it(family: str, mark: str) -> None:
    """Half of the words are not whole, so what goes on behind them is no hit."""
    with talking(family, mark) as lm:
        made = []
        for record_ in stories():
            said = next(iter(generate(lm, record_.prompt, max_new_tokens=9, stop=()).partition(".")[0].split()), "")
            for text in (said, said[: len(said) // 2]):
                row = encode(lm, record_.prompt, text or "x")
                if text and len(row.ids) - row.target == len(text):  # a token a letter: no other tokens say the same
                    made.append((record_, text))
        records, words = zip(*made, strict=True)
        table = accuracies(lm, records, NEURONS, SETTINGS, words=words, when="context")
        for (count, factor), share in zip(SETTINGS, table.tolist(), strict=True):
            patch = scaling(lm, NEURONS[: max(count, 1)], factor if count else 1.0, when="context", method="edit")
            with apply(lm, patch):
                texts = generate(lm, [r.asked for r in records], max_new_tokens=20, stop=())
            # a blank ahead of the word is another token, which the bench alone overlooks
            firsts = ["" if text[:1].isspace() else next(iter(cut(text).split()), "") for text in texts]
            hits = [one == word for one, word in zip(firsts, words, strict=True)]
            assert share == pytest.approx(sum(hits) / len(hits))
        assert 0 < table[0] < 1 and len(set(table.tolist())) > 1


@pytest.mark.slow
def test_own_answers_are_those_of_the_unpatched_model_without_a_context(talker: LM) -> None:
    lm, records = talker, stories()
    asked_ = foreign(records)
    assert {r.context for r in asked_} <= {r.context for r in records} and len(asked_) > 40
    with apply(lm, scaling(lm, NEURONS, 20.0, method="edit")):
        words = own_answers(lm, asked_)
    texts = generate(lm, [r.without_context for r in asked_], max_new_tokens=10, stop=())
    assert words == [next(iter(cut(text).split()), "") for text in texts]


@pytest.mark.slow
def test_robustness_of_letters_is_what_the_bench_says(lm: LM) -> None:
    records = [
        ContextRecord(f"The {thing} is {colour}.", f"What colour is the {thing}?", "ABC"[i % 3], "ABC"[(i + 1) % 3],
                      options=("blue", "green", "red"))
        for i, (thing, colour) in enumerate([("sky", "old"), ("tower", "new"), ("sea", "wet"), ("hill", "far")])
    ]  # fmt: skip
    others_ = foreign(records)
    table = accuracies(lm, others_, NEURONS, SETTINGS, words=own_answers(lm, others_))
    for (count, factor), found in zip(SETTINGS, table.tolist(), strict=True):
        patch = scaling(lm, NEURONS[: max(count, 1)], factor if count else 1.0, method="edit")
        report = kre.run(lm, records, kre.Config(baselines=()), patch=patch)
        assert found == pytest.approx(report.run("edit").metrics()["robustness"].value)


@pytest.mark.slow
def test_a_search_is_by_the_mean_of_both_shares(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(lm: LM, records: Any, neurons: Any, settings: Any, words: Any = None, **_: Any) -> Tensor:
        """More of the largest factor answers as told, and nothing else leaves the rest as it was."""
        return torch.tensor([0.01 * x if words is None else 1.0 / x for _, x in settings])

    monkeypatch.setattr(ircan, "accuracies", found)
    cfg = replace(CFG, search_neurons=(2,), search_factors=(1.5, 4.0, 30.0), when="context")
    patch = ircan.fit(lm, RECORDS, cfg)
    for _, factor, bcu, accuracy, robustness in patch.notes["search"]:
        assert bcu == pytest.approx((accuracy + robustness) / 2, abs=1e-4)
        assert robustness == pytest.approx(1 / factor, abs=1e-4)
    assert {f for by in columns(patch).values() for f in by.values()} == {1.5}
    alone = ircan.fit(lm, RECORDS, replace(cfg, objective="accuracy"))
    assert {f for by in columns(alone).values() for f in by.values()} == {30.0}


def test_without_unrelated_contexts_the_search_says_what_to_do(lm: LM) -> None:
    cfg = replace(CFG, search_neurons=(2,), search_factors=(3.0,))
    with pytest.raises(BadInput, match="objective='accuracy'"):
        ircan.fit(lm, [RECORDS[0]] * 2, cfg)


@pytest.mark.slow
def test_a_setting_that_harms_plain_text_is_passed_over(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(lm: LM, records: Any, neurons: Any, settings: Any, **_: Any) -> Tensor:
        return torch.tensor([float(factor) for _, factor in settings]) / 1000  # the largest factor is the best

    monkeypatch.setattr(ircan, "accuracies", found)
    told = iter([10.0, 11.0, 10.4])  # without a patch, with the best one, with the next
    monkeypatch.setattr(ircan, "perplexity", lambda lm: next(told))
    cfg = replace(CFG, search_neurons=(4,), search_factors=(1.0, 2.0, 500.0), objective="accuracy", max_perplexity=1.05)
    chosen = {f for by in columns(ircan.fit(lm, RECORDS, cfg)).values() for f in by.values()}
    assert chosen == {2.0} and next(told, None) is None
    free = ircan.fit(lm, RECORDS, replace(cfg, when="context"))
    assert {f for by in columns(free).values() for f in by.values()} == {500.0}
