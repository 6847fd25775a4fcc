"""The tables and the verdict: what stands in them at 80 columns, and what few records do not prove."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from rich.console import Console

from lmpatch.benches.core.adapter import Adapter
from lmpatch.benches.core.contract import Answer, Measure, Settings
from lmpatch.benches.core.report import Report, Run
from lmpatch.benches.facts import METRICS
from lmpatch.benches.facts.rows import Row

FEW = {"bootstrap": 0}


def run(bench: Adapter, name: str, rows: Sequence[Any]) -> Run:
    record = {"run_id": name, "baseline": name in ("none", "fact_in_prompt"), "bench": bench.name, **FEW}
    return Run(bench, record, rows, [{"seconds": 1.0}])


def answers(**shares: tuple[int, int]) -> Report:
    """A bench of one number: of how many records each run has how many right."""
    measure = Measure("it is right", lambda row: row.hit, headline=True)
    bench = Adapter("echo", "Is it right?", Settings, {"right": measure}, lambda: [])
    return Report(
        bench,
        tuple(
            run(bench, name, [Answer(id=f"{i}", prompt="p", wanted=("a",), hit=i < right) for i in range(n)])
            for name, (right, n) in shares.items()
        ),
    )


def facts(n: int) -> Report:
    """Every kind of question of the facts bench, asked of three runs."""
    kinds = ("edit", "rephrase", "loc/same_relation", "loc/same_subject", "port/reasoning")
    same: Mapping[str, Any] = {"when": "final", "text": "Rome", "base_text": "Paris", "old_aliases": ("Paris",)}
    some = {"em": True, "contains": True, "was_right": False, "kl": 0.1, "tf_acc": 0.5, "tf_new": -1.0, "tf_old": -2.0}
    rows = [
        Row(kind=kind, prompt=f"{kind} {i}", case_id=str(i), aliases=("Rome",), **same, **some)
        for kind in kinds
        for i in range(n)
    ]
    bench = Adapter("facts", "Do edits hold?", Settings, METRICS, lambda: [], Row=Row)
    return Report(bench, tuple(run(bench, name, rows) for name in ("none", "fact_in_prompt", "rome")))


def printed(report: Report, width: int, **how: bool) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table(**how))
    return capture.get()


def test_at_80_columns_the_numbers_a_run_is_remembered_by_stand_in_one_line_each() -> None:
    report = facts(40)
    short, whole = printed(report, 80), printed(report, 200, every=True)
    for name in ("reliability", "generality", "portability/reasoning", "loc_unchanged/same_relation", "repeats"):
        assert any(line.split()[:1] == [name] for line in short.splitlines()), name
    for word in ("none", "fact_in_prompt", "rome"):
        assert word in short
    for name in ("tf_reliability", "loc_kl_p95", "reliability (was_wrong)"):
        assert name not in short and name in whole, name
    more = len(whole.splitlines()) - len(short.splitlines())
    assert more > 40 and len(short.splitlines()) < 50 and max(map(len, short.splitlines())) <= 80
    assert re.search(r"\d+ more\s+numbers:\s+--all", short) and "--all" not in whole


@pytest.mark.slow
def test_only_what_is_shown_is_explained() -> None:
    short, whole = printed(facts(40), 200), printed(facts(40), 200, every=True)
    assert "begins with the new one (efficacy)" in short and "more probable than the old" not in short
    assert "more probable than the old" in whole


@pytest.mark.parametrize(("n", "told"), [(1, "too few"), (4, "too few"), (29, "too few"), (30, "better in right")])
def test_few_records_get_no_verdict_and_no_star(n: int, told: str) -> None:
    report = answers(none=(0, n), one=(n, n), two=(0, n))
    first = report.verdict()[0]
    assert first.startswith("one against the unpatched model: ") and told in first
    starred = re.search(r"\d( ±[\d.]+)? ★", printed(report, 100)) is not None
    assert ("better" in first, starred) == (n >= 30, n >= 30)
    assert n >= 30 or f"n = {n}" in first
    many = answers(none=(0, n), **{f"run{i}": (i, n) for i in range(5)})
    assert any("has the highest right" in line for line in many.verdict()) is (n >= 30)


@pytest.mark.parametrize(("right", "shown"), [(40, "100.0"), (0, "0.0")])
def test_all_alike_is_no_certainty(right: int, shown: str) -> None:
    text = printed(answers(none=(right, 40), one=(right, 40)), 100)
    assert shown in text and "±0.0" not in text and "n=40" in text
    assert "± 0" not in answers(none=(right, 40)).verdict()[0]


def test_the_short_form_as_json_has_value_error_and_n_of_what_the_table_shows() -> None:
    short, whole = facts(40).summary(), facts(40).summary(every=True)
    assert [each["run_id"] for each in short["runs"]] == ["none", "fact_in_prompt", "rome"]
    rome = short["runs"][-1]
    assert rome["metrics"]["reliability"] == {"value": 1.0, "error": 0.0, "n": 40}
    assert rome["differences"]["reliability"] == {"value": 0.0, "error": 0.0, "n": 40}
    assert "tf_reliability" not in rome["metrics"] and "tf_reliability" in whole["runs"][-1]["metrics"]
    assert short["verdict"] and len(json.dumps(short, indent=1).splitlines()) < 220
