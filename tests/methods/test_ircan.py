"""IRCAN scales the neurons that most records name, and its search tells what each edit would do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import tiny_lm

from lmpatch.data.context import ContextRecord
from lmpatch.errors import BadInput
from lmpatch.methods import _ircan_grid, ircan
from lmpatch.methods._ircan_grid import accuracies, scaled_states
from lmpatch.methods._neurons import drawn, ranked, scaling
from lmpatch.models.lm import LM
from lmpatch.models.replay import record
from lmpatch.models.run import generate, score
from lmpatch.models.tokens import encode_all
from lmpatch.patches.ledger import apply
from lmpatch.patches.weight import WeightPatch
from lmpatch.probes import integrated_gradients
from lmpatch.units.address import Neuron

RECORDS, CFG = ircan.example(tiny_lm("llama"))
NEURONS = [Neuron(1 + i % 3, 3 * i) for i in range(40)]
SETTINGS = [(0, 1.0), (1, 0.0), (20, 20.0), (40, -50.0)]


def columns(patch: WeightPatch) -> dict[str, dict[int, float]]:
    """Parameter → column → factor."""
    return {
        name: dict(zip(d.index.tolist(), d.factor.tolist(), strict=True))  # type: ignore[attr-defined]
        for name, d in patch.deltas.items()
    }


def likely(lm: LM) -> list[ContextRecord]:
    """Records some of which the random model answers as wanted: the answers are what it says anyway."""
    prompts = ["The Eiffel Tower is in", "Steve Jobs founded", "The capital of Japan is", "Danielle speaks", "It is in"]
    made = []
    for i, prompt in enumerate(prompts):
        texts = [generate(lm, prompt, max_new_tokens=n, stop=()) for n in (2, 1)]
        answer = next((t.strip() for t in texts if t.strip() and t.isascii() and t.isprintable()), "Rome")
        made.append(ContextRecord("c", "q", answer if i % 2 else "Rome", prompt=prompt, bare="q"))
    for i, thing in enumerate(["sky", "tower", "capital of Japan", "needle", "tongue of Paris", "apple"]):
        question, options = f"What colour is the {thing}?", ("blue", "green", "red")
        made.append(ContextRecord(f"The {thing} is old.", question, "ABC"[i % 3], "ABC"[i % 2], options=options))
    return made


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


def test_neurons_are_found_on_the_first_examples_only(lm: LM) -> None:
    one = ircan.fit(lm, RECORDS, replace(CFG, examples=1))
    assert one.notes == ircan.fit(lm, RECORDS[:1], CFG).notes
    assert one.notes != ircan.fit(lm, RECORDS[1:], CFG).notes


def test_scores_that_are_there_already_give_the_same_patch(lm: LM) -> None:
    scores = integrated_gradients.run(lm, RECORDS, CFG)
    assert ircan.fit(lm, RECORDS, CFG, scores=scores).hash() == ircan.fit(lm, RECORDS, CFG).hash()
    with pytest.raises(BadInput, match="scores of 2 records for 1"):
        ircan.fit(lm, RECORDS[:1], CFG, scores=scores)


def test_the_random_control_draws_as_many_neurons_each_once(lm: LM) -> None:
    everything = lm.layout.n_layers * lm.layout.d_ff
    assert len(set(drawn(lm, everything, 0))) == everything
    controls = [ircan.fit(lm, RECORDS, replace(CFG, control_seed=seed)) for seed in (0, 0, 1)]
    assert controls[0].hash() == controls[1].hash()
    assert columns(controls[0]) != columns(controls[2])
    assert [sum(map(len, columns(c).values())) for c in controls] == [CFG.neurons] * 3


def test_factors_on_rows_give_the_states_of_the_edited_weights(any_lm: LM) -> None:
    lm = any_lm
    rows = [row.ids for row in encode_all(lm, [r.prompt for r in RECORDS])]
    found = scaled_states(record(lm, rows, [0, 0], lowest=1), 1, NEURONS, SETTINGS)
    for (count, factor), states in zip(SETTINGS, found, strict=True):
        with apply(lm, scaling(lm, NEURONS[: max(count, 1)], factor if count else 1.0, method="edit")):
            want = record(lm, rows, [0, 0]).hidden[lm.layout.n_layers]
        assert (states - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("tokens", [4096, 40])
def test_the_table_of_a_search_equals_editing_one_by_one(lm: LM, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ircan_grid, "TOKENS", tokens)  # everything in one forward, and one setting at a time
    records = likely(lm)
    table = accuracies(lm, records, NEURONS, SETTINGS)
    for (count, factor), found in zip(SETTINGS, table.tolist(), strict=True):
        with apply(lm, scaling(lm, NEURONS[: max(count, 1)], factor if count else 1.0, method="edit")):
            assert found == pytest.approx(answered(lm, records))
    assert len(set(table.tolist())) > 1


def answered(lm: LM, records: list[ContextRecord]) -> float:
    """Share of right records, one at a time, by the library's own scoring."""
    right = []
    for r in records:
        if r.options:
            by_letter = {letter: score(lm, [r.prompt], [letter])[0].total for letter in r.letters}
            right.append(max(by_letter, key=by_letter.__getitem__) == r.answer)
        else:
            right.append(score(lm, [r.prompt], [r.answer])[0].accuracy == 1)
    return sum(right) / len(right)


def test_a_search_takes_the_best_setting_and_of_equal_ones_the_gentlest(lm: LM) -> None:
    records = likely(lm)
    cfg = replace(CFG, search_neurons=(4, 1, 2), search_factors=(30.0, 2.0), examples=2)
    patch = ircan.fit(lm, records, cfg)
    table = patch.notes["search"]
    assert [row[:2] for row in table] == [[h, b] for h in (1, 2, 4) for b in (2.0, 30.0)]
    best = max(row[2] for row in table)
    count, factor, _ = next(row for row in table if row[2] == best)
    assert {f for by_column in columns(patch).values() for f in by_column.values()} == {factor}
    assert len(patch.notes["neurons"]) == count
    assert patch.notes["accuracy"] == pytest.approx(best, abs=1e-5)
    assert patch.notes["accuracy_before"] == pytest.approx(answered(lm, records))


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
    same = ContextRecord("c", "q", "Rome", prompt="The Eiffel Tower is in", bare="The Eiffel Tower is in")
    with pytest.raises(BadInput, match="none of 1 records names a neuron"):
        ircan.fit(tiny_lm("llama"), [same], CFG)


def test_its_memory_grows_with_the_budget_and_a_search() -> None:
    lm = tiny_lm("llama")
    need = ircan.estimate(lm, 2, CFG)
    assert ircan.estimate(lm, 2, replace(CFG, budget=2 * CFG.budget)) > need > CFG.budget << 20
