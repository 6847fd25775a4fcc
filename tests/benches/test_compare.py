"""``compare``: every editor writes the same facts and is asked the same; the advice is what the rows say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from snapshot import changed, state
from tiny import tiny_lm

import lmpatch as lp
from lmpatch import api, registry
from lmpatch.benches.core.adapter import adapt
from lmpatch.benches.core.report import Report, Run
from lmpatch.benches.facts import advice, compare
from lmpatch.benches.facts.rows import Row
from lmpatch.errors import BadInput, Contradiction, Harmful, UnknownName

PLACES = ("Paris", "Rome", "Tokyo")
FACTS = [
    lp.Edit(f"The tower of {p} is in", "Oslo", f"tower of {p}", old=p, rephrases=[f"One finds the tower of {p} in"])
    for p in PLACES
]
TUNE = "finetune epochs=1 layer=1"
SHORT: dict[str, Any] = {"max_new_tokens": 2, "bootstrap": 0, "pack": 0}
BENCH = adapt("lmpatch.benches.facts")


def rows(stated: int, reworded: int, kept: int, n: int) -> list[Row]:
    """n facts, of which the first ones are stated, stated in other words, and leave the neighbour's answer."""
    made = []
    for i in range(n):
        case = {"when": "final", "case_id": str(i), "aliases": ("Oslo",), "base_text": "x"}
        for kind, em in (("edit", i < stated), ("rephrase", i < reworded)):
            made.append(Row(kind=kind, prompt=f"{kind} {i}", em=em, text="Oslo" if em else "x", **case))
        text = "x" if i < kept else "y"
        made.append(Row(kind="loc/near", prompt=f"near {i}", text=text, kl=0.0, em=False, **case))
    return made


def comparison(runs: dict[str, tuple[int, int, int]], n: int = 100, **costs: dict[str, Any]) -> advice.Comparison:
    """Of each run how many of n facts are stated, stated in other words, and leave the neighbour."""
    made = []
    for name, counts in runs.items():
        record = {"run_id": name, "baseline": name in ("none", "fact_in_prompt"), "comparable_group": "g"}
        record |= {"bootstrap": 0, **costs.get(name, {})}
        made.append(Run(BENCH, record, [replace(row, run_id=name) for row in rows(*counts, n)], [{}]))
    return advice.Comparison(Report(BENCH, tuple(made)), {"mend": "no mend editor."})


def test_the_advice_takes_the_best_and_says_why_the_others_lose() -> None:
    found = comparison(
        {
            "none": (0, 0, 100), "fact_in_prompt": (60, 30, 40), "loud": (100, 90, 10), "good": (95, 70, 90),
            "same": (95, 70, 90), "exact": (98, 0, 100),
        },
        good={"edit_s": {"median": 2.0}}, same={"edit_s": {"median": 0.5}},
    )  # fmt: skip
    assert [run.name for run in found.editors] == ["good", "same", "loud", "exact"]
    said = found.advice()
    assert said[0] == (
        "Take good: good states 95 % of the facts, in other words 70 %; where it moves most, 90 % of the answers stay "
        "as they were."
    )
    assert said[1] == "Not clearly behind it: same. same writes a fact in 0.5 s, good in 2 s."
    assert [line.partition(" by ")[0] for line in said[2:4]] == [
        "loud is behind in leaving near as it was", "exact is behind in the fact in other words",
    ]  # fmt: skip
    assert said[-1] == "mend is not compared: no mend editor." and len(said) == 5


def test_a_prompt_that_does_no_worse_is_named() -> None:
    found = comparison({"none": (0, 0, 100), "fact_in_prompt": (96, 80, 95), "good": (95, 80, 95)})
    assert "where you write the prompt yourself, edit nothing" in found.advice()[1]


def test_of_few_facts_nothing_is_called_better() -> None:
    said = comparison(
        {"none": (0, 0, 9), "fact_in_prompt": (9, 9, 9), "good": (9, 9, 9), "bad": (0, 0, 0)}, n=9
    ).advice()
    assert said[0] == "Only 9 facts were asked: differences mean little below 30." and len(said) == 3
    assert not any("behind" in line for line in said)


def test_where_no_editor_states_a_fact_none_is_taken() -> None:
    assert comparison({"none": (0, 0, 50), "a": (0, 0, 50)}, n=50).advice()[0].startswith("Take none: a states 0 %")


def test_the_tables_have_a_row_for_each_run_and_costs_for_each_editor() -> None:
    times = {"prefill_b1": 100.0, "token_b1": 20.0}
    costs = {"bytes": 2048, "infer_ms": {"patched": times}, "prep": {"training_s": 60}, "edit_s": {"median": 1.5}}
    costs |= {"health": {"base_perplexity": 10.0, "perplexity_max": 12.0}}
    answers, cost = comparison({"none": (0, 0, 50), "a": (25, 0, 50)}, n=50, a=costs).tables()
    assert answers.columns[:4] == ("editor", "states it", "in other words", "near unchanged")
    assert [row[0] for row in answers.rows] == ["none", "a"] and answers.rows[1][1].startswith("50.0 ±7.1")
    assert cost.rows == (("a", "1.20 ×", "1.5", "0.4", "2.0 KiB", "-", "60"),)


@pytest.mark.slow
def test_every_method_that_writes_facts_takes_part_and_no_other() -> None:
    lm = tiny_lm("llama")
    facts = [name for name in registry.names("methods") if registry.method(name).record is lp.Edit]
    assert sorted(who.name for who in api.entrants(lm)) == facts and "rag" in facts
    for wrong, error, text in (
        (["cad"], BadInput, "cad writes no facts"),
        (["rome", "rome"], BadInput, "'rome' is named twice"),
        (["rome stps=2"], BadInput, "Did you mean steps"),
        (["roem"], UnknownName, "Did you mean"),
        ([""], UnknownName, "no method"),
    ):
        with pytest.raises(error, match=text):
            api.entrants(lm, wrong)
    editor = lp.Editor("other", {}, None, {}, {})  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="an editor of other, which is not compared"):
        api.entrants(lm, ["rome"], editors=[editor])


def test_facts_that_contradict_or_are_missing_are_refused() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(Contradiction):
        lp.compare(lm, [FACTS[0], replace_target(FACTS[0], "Bern")], [TUNE])
    with pytest.raises(BadInput, match="no facts"):
        lp.compare(lm, [], [TUNE])


def replace_target(edit: lp.Edit, target: str) -> lp.Edit:
    return lp.Edit(edit.prompt, target, edit.subject)


@pytest.mark.slow
def test_a_comparison_restores_the_model_and_says_who_could_not_run(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    before, heard = state(lm), []
    found = lp.compare(
        lm, FACTS, [TUNE, "rag", "memit nas=true"], expect=heard.extend, out=tmp_path / "out", **SHORT
    )  # fmt: skip
    assert changed(before, state(lm)) == []
    assert {run.name for run in found.editors} == {TUNE, "rag"}
    assert "needs anchor facts" in found.left_out["memit nas=true"]
    assert [each.name for each in heard[1:]] == [TUNE, "rag", "memit nas=true"]
    assert all(each.seconds > 0 and each.bytes > 0 for each in heard[:3]) and "anchor" in heard[3].why
    patch = lp.load_patch(tmp_path / "out/patches" / compare.slug(TUNE))
    assert patch.method == "finetune" and len(patch.edits) == len(FACTS)
    metrics = found.report.run("rag").metrics()
    assert {"reliability", "generality", "loc_unchanged/unrelated", "tf_reliability"} <= metrics.keys()
    assert found.summary()["left_out"].keys() == {"memit nas=true"}


@pytest.mark.slow
def test_an_interrupt_loses_neither_patch_nor_rows(tmp_path: Path) -> None:
    lm, made = tiny_lm("llama"), []

    def entrant(name: str, stop: bool = False) -> compare.Entrant:
        def make(lm: lp.LM, edits: list[lp.Edit]) -> lp.Patch:
            made.append(name)
            if stop and made.count(name) == 1:
                raise KeyboardInterrupt
            return lp.fit(lm, "finetune", edits, epochs=1, layer=1)

        return compare.Entrant(name, make, {"epochs": 1})

    cfg, before = compare.Config(**SHORT), state(lm)
    both = [entrant("first"), entrant("second", stop=True)]
    with pytest.raises(KeyboardInterrupt):
        compare.contest(lm, FACTS, both, cfg, tmp_path)
    assert changed(before, state(lm)) == []
    report, left_out = compare.contest(lm, FACTS, both, cfg, tmp_path)
    assert made == ["first", "second", "second"] and not left_out
    assert {run.name for run in report.runs} == {"none", "fact_in_prompt", "first", "second"}
    alone, _ = compare.contest(lm, FACTS, both[:1], cfg, tmp_path)
    assert [run.name for run in alone.runs if not run.record["baseline"]] == ["first"]
    with pytest.raises(BadInput, match="no method could write these facts. first: .* other facts or settings"):
        compare.contest(lm, FACTS, [replace(both[0], settings={"epochs": 2})], cfg, tmp_path)


@pytest.mark.slow
def test_a_patch_that_wrecks_the_model_is_left_out_unless_it_is_forced() -> None:
    lm = tiny_lm("llama")
    wild = "finetune lr=10 epochs=4 layer=1"
    found = lp.compare(lm, FACTS, [TUNE, wild], **SHORT)
    assert "The patch was not made" in found.left_out[wild]
    (who,) = api.entrants(lm, [wild], force=True)
    patch = who.make(lm, FACTS)
    assert isinstance(patch, lp.Patch) and patch.made["change_ratio"] > 10
    with pytest.raises(Harmful):
        api.entrants(lm, [wild])[0].make(lm, FACTS)
