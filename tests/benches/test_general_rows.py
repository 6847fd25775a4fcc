"""The numbers of the general bench, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lmpatch.benches._general_rows import Mean, Row, compare, mean


def rows(*values: float | None, task: str = "csqa", **same: object) -> list[Row]:
    made = [
        Row("", 0, task, "cloze-v1", "cloze", str(i), f"f:{i}", 0, scores=(-1.0, -2.0, -3.0, -4.0), value=value)
        for i, value in enumerate(values)
    ]
    return [replace(row, **same) for row in made]  # type: ignore[arg-type]


def test_the_error_of_a_difference_is_that_of_the_differences_of_each_record() -> None:
    (c,) = compare(rows(1.0, 0.0, 1.0, 1.0), rows(0.0, 0.0, 1.0, 0.0))
    assert c.base == Mean(0.75, pytest.approx(math.sqrt((3 * 0.25**2 + 0.75**2) / 3 / 4)))
    assert c.patched == Mean(0.25, pytest.approx(math.sqrt((3 * 0.25**2 + 0.75**2) / 3 / 4)))
    # the differences are -1, 0, 0, -1: mean -0.5, variance 4 * 0.25 / 3
    assert c.difference == Mean(-0.5, pytest.approx(math.sqrt(4 * 0.25 / 3 / 4)))
    assert (c.n, c.dropped, c.chance, c.within) == (4, 0, 0.25, False)


def test_a_paired_error_is_smaller_than_two_separate_ones_where_records_agree() -> None:
    base = [float(i % 2) for i in range(40)]
    (c,) = compare(rows(*base), rows(1 - base[0], *base[1:]))
    assert c.difference and c.difference.stderr and c.base.stderr
    assert c.difference.stderr < c.base.stderr / 3


@pytest.mark.parametrize("n", [3, 7, 49, 200, 333])
def test_one_answer_that_turned_is_within_one_standard_error(n: int) -> None:
    (c,) = compare(rows(*[1.0] * n), rows(0.0, *[1.0] * (n - 1)))
    assert c.difference and c.difference.stderr == pytest.approx(1 / n) and c.within is True


def test_two_answers_that_turned_the_same_way_are_not() -> None:
    (c,) = compare(rows(*[1.0] * 50), rows(0.0, 0.0, *[1.0] * 48))
    assert c.within is False


def test_a_model_compared_with_itself_differs_by_exactly_nothing() -> None:
    (c,) = compare(rows(0.1, 0.7, 0.3), rows(0.1, 0.7, 0.3))
    assert c.difference == Mean(0.0, 0.0) and c.within is True


def test_a_text_is_a_mean_over_tokens_and_its_error_that_of_a_ratio() -> None:
    base = [replace(row, form="text", weight=w) for row, w in zip(rows(2.0, 3.0), (10, 30), strict=True)]
    now = [replace(row, value=row.value + 0.1 * i) for i, row in enumerate(base) if row.value]
    (c,) = compare(base, now)
    assert c.base.value == pytest.approx((10 * 2 + 30 * 3) / 40) and c.tokens == 40 and c.chance is None
    assert c.difference and c.difference.value == pytest.approx(30 * 0.1 / 40)
    spread = (10 * (0 - 0.075)) ** 2 + (30 * (0.1 - 0.075)) ** 2
    assert c.difference.stderr == pytest.approx(math.sqrt(2 / 1 * spread) / 40)


def test_with_equal_weights_the_error_is_the_ordinary_one() -> None:
    values = [0.2, 0.5, 0.9]
    wanted = math.sqrt(sum((v - 1.6 / 3) ** 2 for v in values) / 2 / 3)
    assert mean(values, [1, 1, 1]).stderr == pytest.approx(wanted) == mean(values, [7, 7, 7]).stderr


def test_one_record_has_no_error_and_no_verdict() -> None:
    (c,) = compare(rows(1.0), rows(1.0))
    assert c.difference == Mean(0.0, None) and c.within is None


def test_a_record_that_one_side_could_not_score_counts_on_neither() -> None:
    (c,) = compare(rows(1.0, 0.0, 1.0), rows(1.0, None, 1.0))
    assert (c.n, c.dropped, c.base.value) == (2, 1, 1.0)
    assert compare(rows(None), rows(None)) == []


def test_records_are_matched_by_id_and_not_by_order() -> None:
    (c,) = compare(rows(1.0, 0.0, 0.0), rows(1.0, 0.0, 0.0)[::-1])
    assert c.difference == Mean(0.0, 0.0)


def test_a_broken_model_is_outside_and_not_left_out() -> None:
    (c,) = compare(rows(2.0, 3.0, form="text"), rows(2.0, math.inf, form="text"))
    assert c.n == 2 and c.difference == Mean(math.inf, None) and c.within is None


def test_tasks_stay_apart_and_an_unpatched_run_is_described_alone() -> None:
    found = compare(rows(1.0, 0.0) + rows(1.0, 1.0, task="piqa"))
    assert [(c.task, c.base.value, c.patched, c.difference) for c in found] == [
        ("csqa", 0.5, None, None),
        ("piqa", 1.0, None, None),
    ]
