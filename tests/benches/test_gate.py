"""The gate: numbers against limits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lmpatch.benches.core.adapter import adapt
from lmpatch.benches.core.report import Report, Run
from lmpatch.benches.facts import Row, gate
from lmpatch.benches.facts.gate import CHECKS, UNASKED, Config, Line
from lmpatch.config import parse
from lmpatch.data.edits import Ask, Edit
from lmpatch.errors import BadInput
from lmpatch.patches.patch import plain_edits

BENCH = adapt("lmpatch.benches.facts")


def rows(kind: str, right: int, n: int = 10, **values: Any) -> list[Row]:
    """Of ``n`` cases ``right`` answer as wanted."""
    made: list[Row] = []
    for i in range(n):
        said: dict[str, Any] = {"text": "Rome" if i < right else "Paris", "base_text": "Rome", **values}
        said |= {"aliases": ("Rome",), "old_aliases": ("Paris",), "em": i < right, "contains": i < right}
        made.append(Row(when="final", case_id=str(i), kind=kind, prompt=kind, **said))
    return made


def judge(own: list[Row], base: list[Row] | None = None, after: float = 11.0, **limits: Any) -> dict[str, Line]:
    health = {"perplexity_max": after, "base_perplexity": 10.0}
    made = {"none": rows("edit", 0) if base is None else base, "fact_in_prompt": rows("edit", 8), "rome": own}
    runs = [
        Run(BENCH, {"run_id": name, "baseline": name != "rome", "bootstrap": 0, "health": health}, some, [{}])
        for name, some in made.items()
    ]
    verdict = gate.judge(Report(BENCH, tuple(runs)), Config(**limits))
    assert verdict.passed is (not verdict.missed) is bool(verdict)
    return {line.check: line for line in verdict.lines}


def test_every_check_is_a_setting_with_a_meaning_and_a_number_of_the_bench() -> None:
    assert CHECKS.keys() <= Config.__dataclass_fields__.keys()
    names = {name.partition("@")[0] for name in BENCH.metrics}
    assert {metric.removesuffix("/") for metric, _ in CHECKS.values() if metric} <= names


@pytest.mark.parametrize(("right", "passed"), [(10, True), (9, True), (8, False)])
def test_at_least_holds_at_its_limit_and_misses_below(right: int, passed: bool) -> None:
    line = judge(rows("edit", right))["efficacy"]
    assert (line.passed, line.value, line.n) == (passed, right / 10, 10)
    assert (line.unpatched, line.fact_in_prompt, line.wanted) == (0.0, 0.8, "at least 0.9")


@pytest.mark.parametrize(("after", "passed"), [(15.0, True), (15.1, False), (math.inf, False), (math.nan, False)])
def test_at_most_misses_above_and_a_number_that_is_none_misses(after: float, passed: bool) -> None:
    assert judge(rows("edit", 10), after=after)["perplexity"].passed is passed


def test_each_kind_of_neighbour_is_a_line_of_its_own() -> None:
    found = judge([*rows("edit", 10), *rows("loc/same_relation", 9), *rows("loc/same_subject", 3)])
    assert found["neighbours/same_relation"].passed and not found["neighbours/same_subject"].passed


def test_a_limit_may_be_set_or_left_out() -> None:
    own = [*rows("edit", 8), *rows("pack/negation", 2)]
    assert judge(own)["negation"].passed is False
    assert judge(own, negation=0.1)["negation"].passed is True
    line = judge(own, **parse(Config, ["negation=none"]))["negation"]
    assert (line.passed, line.value, line.wanted) == (None, 0.2, "none")


def test_what_the_facts_do_not_ask_fails_nothing_and_is_said() -> None:
    found = judge(rows("edit", 10), composition=0.9)
    assert found["composition"].passed is None and found["composition"].n == 0
    assert dict((line[1], line[2]) for line in gate.shown([*found.values()]))["composition"] == UNASKED


def test_long_answers_are_held_against_the_unpatched_models() -> None:
    circles = rows("pack/long", 10, text="Rome is " * 20)
    assert judge([*rows("edit", 10), *circles], circles)["long_distinct_2"].passed
    plain = rows("pack/long", 10, text="Rome is a city of many fine old bridges")
    line = judge([*rows("edit", 10), *circles], plain)["long_distinct_2"]
    assert line.passed is False and line.wanted == "at most 0.15 below unpatched"


def test_the_facts_of_a_patch_come_back_whole() -> None:
    edit = Edit("a", "b", "", old="c", locality={"near": [Ask("d", ("e",))]}, portability={"hop": [Ask("f", ("g",))]})
    (back,) = gate.facts_of(plain_edits([edit]))
    assert replace(back, id="") == edit
    for none in ([], [{"question": "x"}]):
        with pytest.raises(BadInput, match="no facts of its own. Give a file"):
            gate.facts_of(none)


def test_facts_without_neighbours_are_given_everyday_ones() -> None:
    some = gate.with_neighbours([Edit("a", "b"), Edit("c", "d")])
    assert [edit.locality[0][0] for edit in some] == ["unrelated"] * 2
    assert some[0].locality != some[1].locality
    near = [Edit("a", "b", locality={"near": [Ask("d")]}), Edit("c", "d")]
    assert gate.with_neighbours(near) == near
