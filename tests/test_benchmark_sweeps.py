"""benchmarks/sweeps.py and harm.py: no setting at an end is called best, nothing is measured twice, harm is counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_lm

import lmpatch as lp
from lmpatch.methods import memit, rome
from lmpatch.patches.weight.patch import WeightPatch

EDITS = [
    lp.Edit("The Eiffel Tower is in", "Rome", "Eiffel Tower", rephrases=["To see the Eiffel Tower go to"]),
    lp.Edit("Steve Jobs founded", "Paris", "Steve Jobs", rephrases=["The company of Steve Jobs is"]),
]


def test_an_axis_grows_until_its_best_lies_inside(script: Any) -> None:
    sweeps = script("sweeps")
    axis, asked = sweeps.Axis("lr", [1.0, 2.0], sweeps.times(2)), []

    def score(settings: dict[str, float]) -> float:
        asked.append(settings["lr"])
        return -abs(settings["lr"] - 8.0)

    best, edge = sweeps.descend([axis], {"lr": 1.0}, score)
    assert best == {"lr": 8.0} and edge == [] and axis.values == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_a_best_at_an_end_is_refused_and_the_end_of_a_setting_is_none(script: Any) -> None:
    sweeps = script("sweeps")
    axis = sweeps.Axis("lr", [1.0, 2.0], sweeps.times(2))
    _, edge = sweeps.descend([axis], {"lr": 1.0}, lambda s: s["lr"])
    assert edge == ["lr"] and len(axis.values) == 2 + sweeps.GROWTH
    layer = sweeps.Axis("layer", [0, 1, 2], sweeps.plus(1, 0, 3))
    best, edge = sweeps.descend([layer], {"layer": 1}, lambda s: -s["layer"])
    assert best == {"layer": 0} and edge == []
    assert sweeps.descend([sweeps.Axis("end", ["a", "b"])], {"end": "a"}, lambda s: s["end"] == "b") == (
        {"end": "b"},
        [],
    )


def test_the_front_holds_what_no_other_beats(script: Any) -> None:
    rows = [{"a": a, "kl": kl} for a, kl in ((0.9, 1.0), (0.8, 0.5), (0.7, 0.7), (0.9, 2.0), (0.5, 0.1))]
    front = script("sweeps").pareto(rows, "a", "kl", True)
    assert [(row["a"], row["kl"]) for row in front] == [(0.9, 1.0), (0.8, 0.5), (0.5, 0.1)]


def test_a_sweep_goes_on_where_it_stopped_and_keeps_no_best_at_an_end(script: Any, tmp_path: Path) -> None:
    sweeps = script("sweeps")
    file, calls = tmp_path / "sweep.json", []

    def measure(settings: dict[str, Any]) -> dict[str, float]:
        calls.append(settings)
        return {"efficacy": settings["lr"], "kl": settings["lr"], "score": settings["lr"]}

    for _ in range(2):
        axis = sweeps.Axis("lr", [1.0, 2.0], sweeps.times(2))
        sweeps.Sweep(file, {"model": "m"}).search("ft", [axis], {"lr": 1.0}, measure, ("efficacy", "kl", True))
    assert len(calls) == 2 + sweeps.GROWTH
    best = json.loads(file.read_text())["best"]["ft"]
    assert best["settings"] is None and best["edge"] == ["lr"] and best["at_edge"] == {"lr": 32.0}
    assert len(best["pareto"]) == len(calls)
    with pytest.raises(SystemExit, match="another run"):
        sweeps.Sweep(file, {"model": "other"})


@pytest.mark.slow
def test_facts_are_measured_under_every_kind_of_patch(script: Any) -> None:
    sweeps, lm = script("sweeps"), tiny_lm("llama")
    near = [lp.Edit(**{**vars(e), "locality": {"near": [lp.Ask("The Space Needle is in", "Seattle")]}}) for e in EDITS]
    facts = sweeps.Facts(lm, near, None)
    for row in (
        facts.tuned({"layer": 1, "epochs": 2, "end": "eos"}),
        facts.single(vars(rome.example(lm)[1])),
        facts.commit(1, {**vars(memit.example(lm)[1]), "weight": 1.0}),
        facts.commit(2, {**vars(memit.example(lm)[1]), "weight": 9.0}),
    ):
        assert 0 <= row["efficacy"] <= 1 and row["kl"] > 0 and 0 <= row["score"] <= 1
    assert len(facts.commits) == 1


@pytest.mark.slow
def test_harm_is_counted_once_for_each_edit_and_goes_on(script: Any, tmp_path: Path) -> None:
    harm, lm, made = script("harm"), tiny_lm("llama"), []

    def make(lm: lp.LM, edits: list[lp.Edit]) -> Iterator[Any]:
        for edit in edits:
            made.append(edit)
            yield WeightPatch.trial(lm, 0, 0.01) if edit is EDITS[0] else "it left the finite numbers"

    file, record = tmp_path / "harm.json", {"fingerprint": lm.fingerprint()}
    for _ in range(2):
        found = harm.run(lm, EDITS, {"rome": make}, file, record)
    assert len(made) == len(EDITS)
    numbers = found["summary"]["rome"]
    assert numbers["n"] == 2 and numbers["refused"] == 1 and numbers["largest_ratio"] == "inf"
    assert 0 < numbers["largest_ratio_kept"] < 1.5 and numbers["stated"] == 0.0
    with pytest.raises(SystemExit, match="another model"):
        harm.run(lm, EDITS, {}, file, {"fingerprint": "other"})
