"""Every number made of rows, against a computation by hand."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from lmpatch.benches.core.stats import Number, collect, interval, numbers
from lmpatch.benches.facts import METRICS, Row
from lmpatch.benches.facts.rows import protocol, retention


def row(case: str, kind: str = "edit", **values: object) -> Row:
    plain: dict[str, object] = {"text": "x", "base_text": "x", "aliases": ("a",), "was_right": False}
    names = {"run_id": "run", "when": "final", "case_id": case, "kind": kind, "prompt": "prompt"}
    return Row(**(names | plain | values))  # type: ignore[arg-type]


def metrics(rows: list[Row], bootstrap: int = 50) -> dict[str, Number]:
    return numbers(collect(rows, METRICS), {"bootstrap": bootstrap})


def value(rows: list[Row], name: str, split: str = "all", bootstrap: int = 50) -> Number:
    found = [
        m for k, m in metrics(rows, bootstrap).items() if (m.name, m.split, "immediate" in k) == (name, split, False)
    ]
    assert len(found) == 1, f"{name} {split}: {len(found)}"
    return found[0]


def absent(rows: list[Row], name: str, split: str = "all") -> bool:
    return not [m for m in metrics(rows, 0).values() if m.name == name and m.split == split]


def test_a_row_survives_json() -> None:
    one = row("a", em=True, kl=0.25, old_aliases=("b", "c"), flag="collided")
    assert Row.read(json.loads(json.dumps(asdict(one)))) == one


def test_reliability_is_the_mean_over_cases() -> None:
    rows = [row("a", em=True, contains=True), row("b", em=False, contains=True), row("c", em=True, contains=False)]
    rows += [row("d", em=False, contains=False)]
    found = value(rows, "reliability")
    assert (found.value, found.n, found.dropped) == (0.5, 4, 0)
    assert value(rows, "reliability_contains").value == 0.5


def test_prompts_are_averaged_inside_their_case_first() -> None:
    rows = [row("a", "rephrase", em=True)] * 3 + [
        row("b", "rephrase", em=e) for e in (False, False, False, False, True)
    ]
    found = value(rows, "generality")
    assert found.value == pytest.approx((1 + 0.2) / 2)  # not (3 + 1) / 8
    assert found.n == 2


def test_chunks_weigh_by_their_cases_not_each_the_same() -> None:
    rows = [replace(row("a", em=True), chunk=0)] + [replace(row(c, em=False), chunk=1) for c in "bcd"]
    assert value(rows, "reliability").value == 0.25  # the mean of chunk means would be 0.5


def test_splits_follow_what_the_base_model_said_to_each_prompt() -> None:
    rows = [
        row("a", "rephrase", em=True, was_right=True),
        row("a", "rephrase", em=False, was_right=False),
        row("b", "rephrase", em=True, was_right=False),
    ]
    assert value(rows, "generality").value == 0.75
    assert (value(rows, "generality", "was_wrong").value, value(rows, "generality", "was_wrong").n) == (0.5, 2)
    assert (value(rows, "generality", "was_right").value, value(rows, "generality", "was_right").n) == (1.0, 1)


def test_what_was_not_asked_is_counted_as_dropped_and_not_as_wrong() -> None:
    rows = [row("a", em=True), Row(when="final", case_id="b", kind="edit", prompt="p", flag="superseded")]
    found = value(rows, "reliability")
    assert (found.value, found.n, found.dropped) == (1.0, 1, 1)


def test_numbers_that_are_not_finite_are_dropped_and_counted() -> None:
    rows = [row("a", "loc/x", kl=math.nan), row("b", "loc/x", kl=0.5), row("c", "loc/x", kl=math.inf)]
    found = value(rows, "loc_kl/x")
    assert (found.value, found.n, found.dropped) == (0.5, 1, 2)


def test_the_old_answer_counts_only_where_one_is_known() -> None:
    rows = [row("a", old_aliases=("o",), old_first=True), row("b", old_aliases=("o",), old_first=False), row("c")]
    found = value(rows, "old_answer_rate")
    assert (found.value, found.n, found.dropped) == (0.5, 2, 0)


def test_locality_kinds_and_portability_axes_are_never_merged() -> None:
    rows = [row("a", "loc/x", text="same", base_text="Same."), row("a", "loc/y", text="one", base_text="two")]
    rows += [row("a", "port/hop", em=True), row("a", "port/alias", em=False)]
    names = {m.name: m.value for m in metrics(rows, 0).values() if m.split == "all"}
    assert names["loc_unchanged/x"] == 1.0 and names["loc_unchanged/y"] == 0.0
    assert names["portability/hop"] == 1.0 and names["portability/alias"] == 0.0
    assert not {"loc_unchanged", "portability"} & set(names)


def test_correct_locality_is_taken_over_what_the_base_had_right() -> None:
    rows = [row("a", "loc/x", em=True, was_right=True), row("b", "loc/x", em=False, was_right=True)]
    rows += [row("c", "loc/x", em=True, was_right=False), row("d", "loc/x", aliases=(), was_right=None)]
    found = value(rows, "loc_correct/x")
    assert (found.value, found.n) == (0.5, 2)
    assert absent(rows, "loc_correct/x", "was_wrong")


def test_kl_has_a_mean_over_cases_and_a_tail_over_prompts() -> None:
    values = {"a": [0.0, 0.1, 0.2], "b": [1.0]}
    rows = [row(c, "loc/x", kl=v) for c, found in values.items() for v in found]
    assert value(rows, "loc_kl/x").value == pytest.approx((0.1 + 1.0) / 2)
    assert value(rows, "loc_kl_p95/x").value == pytest.approx(float(np.percentile([0, 0.1, 0.2, 1.0], 95)))


def test_teacher_forced_numbers_have_an_id_of_their_own() -> None:
    rows = [row("a", tf_acc=0.5, tf_new=-1.0, tf_old=-2.0, old_aliases=("o",), em=True)]
    rows += [row("b", tf_acc=1.0, tf_new=-3.0, tf_old=-2.0, old_aliases=("o",), em=True)]
    rows += [row("a", "loc/x", tf_same=0.25)]
    assert value(rows, "tf_reliability").value == 0.75
    assert value(rows, "tf_success").value == 0.5
    margin = (math.exp(-1) - math.exp(-2) + math.exp(-3) - math.exp(-2)) / 2
    assert value(rows, "tf_margin").value == pytest.approx(margin)
    assert value(rows, "tf_locality/x").value == 0.25
    assert value(rows, "tf_reliability").protocol != value(rows, "reliability").protocol


def test_immediate_and_final_never_mix() -> None:
    rows = [
        row("a", em=False),
        replace(row("a", em=True), when="immediate"),
        replace(row("a", em=True), when="retention"),
    ]
    found = {
        m.protocol: m.value
        for m in metrics(rows, 0).values()
        if m.name == "reliability" and m.split in ("all", "immediate")
    }
    assert found == {"gen-final-v1": 0.0, "gen-immediate-v1": 1.0}


def test_forgetting_pairs_the_same_cases() -> None:
    now = {"a": True, "b": True, "c": False, "only": True}
    later = {"a": False, "b": True, "c": False}
    rows = [replace(row(c, em=e), when="immediate") for c, e in now.items()] + [row(c, em=e) for c, e in later.items()]
    found = metrics(rows)["forgetting"]
    assert (found.value, found.n) == (pytest.approx(1 / 3), 3)
    assert "forgetting" not in metrics([row("a", em=True)])


def test_the_retention_curve_puts_ages_in_bins_and_takes_probes_only() -> None:
    ages = {0: True, 1: True, 9: False, 10: True, 99: False, 100: True, 5000: False}
    rows = [row(str(a), em=e, age=a, probe=True) for a, e in ages.items()]
    rows += [row("z", em=False, age=0), row("y", "rephrase", em=False, age=0, probe=True)]
    assert retention(rows) == [
        ("0", 1.0, 1),
        ("1-9", 0.5, 2),
        ("10-99", 0.5, 2),
        ("100-999", 1.0, 1),
        ("1000+", 0.0, 1),
    ]


@pytest.mark.parametrize(
    ("measure", "when", "suffix", "id"),
    [
        ("gen", "final", "-prefix", "gen-final-v1-prefix"),
        ("gen", "immediate", "-full-8tokens-raw", "gen-immediate-v1-full-8tokens-raw"),
        ("tf", "final", "-prefix", "tf-recipe-chunk-v1"),
        ("tf", "immediate", "-prefix-chat-raw", "tf-immediate-v1-chat-raw"),
    ],
)
def test_protocol_ids_say_what_decides_a_number(measure: str, when: str, suffix: str, id: str) -> None:
    assert protocol(measure, when, suffix) == id


def test_the_interval_is_the_bootstrap_over_cases() -> None:
    values = np.random.default_rng(0).normal(size=200)
    low, high = interval([list(values)], 2000, 1)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert interval([list(values)], 2000, 1) == (low, high)
    assert interval([[1.0]], 2000, 1) == (None, None)


def test_the_interval_resamples_cases_not_prompts() -> None:
    rows = [row("a", "rephrase", em=True)] * 500 + [row("b", "rephrase", em=False)] * 500
    found = value(rows, "generality", bootstrap=500)  # a thousand prompts, but two cases: nothing is certain
    assert (found.low, found.high, found.n) == (0.0, 1.0, 2)
    assert found.stderr == pytest.approx(0.5)


# Numbers of real rows, by hand

SAMPLE = json.loads((Path(__file__).parent / "rows.json").read_text())


@pytest.mark.parametrize("name", SAMPLE)
def test_numbers_of_recorded_rows_are_those_worked_out_by_hand(name: str) -> None:
    """Rows of the first release; what was worked out beside them was counted without any of this code."""
    bench, wanted = importlib.import_module(f"lmpatch.benches.{name}"), SAMPLE[name]["numbers"]
    rows = [bench.Row.read(record) for record in SAMPLE[name]["rows"]]
    found = numbers(collect(rows, bench.METRICS), {"bootstrap": 0})
    for key, (mean, n) in wanted.items():
        assert (found[key].value, found[key].n) == (pytest.approx(mean), n), key
