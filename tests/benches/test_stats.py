"""The only mean and its errors, by hand: pairs, ratios, sums, and answers that repeat themselves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lmpatch.benches.core.contract import Answer
from lmpatch.benches.core.stats import REPETITION, Collection, Number, collect, minus, numbers, stderr
from lmpatch.benches.general import METRICS, Row

PLAIN = {"bootstrap": 0}


def rows(*values: float | None, task: str = "csqa", **same: object) -> list[Row]:
    made = [
        Row(task=task, protocol="cloze-v1", form="cloze", id=str(i), source=f"f:{i}", gold=0,
            scores=(-1.0, -2.0, -3.0, -4.0), value=value)
        for i, value in enumerate(values)
    ]  # fmt: skip
    return [replace(row, **same) for row in made]  # type: ignore[arg-type]


def of(some: list[Row]) -> Collection:
    return collect(some, METRICS)


def number(some: list[Row], name: str = "cloze/csqa") -> Number:
    return numbers(of(some), PLAIN)[name]


def moved(base: list[Row], now: list[Row], name: str = "cloze/csqa") -> Number:
    return numbers(minus(of(now), of(base)), PLAIN)[name]


def test_the_error_of_a_difference_is_that_of_the_differences_of_each_record() -> None:
    base, now = rows(1.0, 0.0, 1.0, 1.0), rows(0.0, 0.0, 1.0, 0.0)
    error = pytest.approx(math.sqrt((3 * 0.25**2 + 0.75**2) / 3 / 4))
    assert (number(base).value, number(base).stderr) == (0.75, error)
    assert (number(now).value, number(now).stderr) == (0.25, error)
    c = moved(base, now)  # the differences are -1, 0, 0, -1: mean -0.5, variance 4 * 0.25 / 3
    assert (c.value, c.stderr) == (-0.5, pytest.approx(math.sqrt(4 * 0.25 / 3 / 4)))
    assert (c.n, c.dropped, c.within) == (4, 0, False)


def test_a_paired_error_is_smaller_than_two_separate_ones_where_records_agree() -> None:
    base = [float(i % 2) for i in range(40)]
    c = moved(rows(*base), rows(1 - base[0], *base[1:]))
    assert c.stderr and c.stderr < (number(rows(*base)).stderr or 0) / 3


@pytest.mark.parametrize("n", [3, 7, 49, 200, 333])
def test_one_answer_that_turned_is_within_one_standard_error(n: int) -> None:
    c = moved(rows(*[1.0] * n), rows(0.0, *[1.0] * (n - 1)))
    assert c.stderr == pytest.approx(1 / n) and c.within is True


def test_two_answers_that_turned_the_same_way_are_not() -> None:
    assert moved(rows(*[1.0] * 50), rows(0.0, 0.0, *[1.0] * 48)).within is False


def test_a_model_compared_with_itself_differs_by_exactly_nothing() -> None:
    c = moved(rows(0.1, 0.7, 0.3), rows(0.1, 0.7, 0.3))
    assert (c.value, c.stderr, c.within) == (0.0, 0.0, True)


def test_a_text_is_a_mean_over_tokens_and_its_error_that_of_a_ratio() -> None:
    base = [replace(row, form="text", weight=w) for row, w in zip(rows(2.0, 3.0), (10, 30), strict=True)]
    now = [replace(row, value=row.value + 0.1 * i) for i, row in enumerate(base) if row.value]
    one, c = number(base, "nats/csqa"), moved(base, now, "nats/csqa")
    assert one.value == pytest.approx((10 * 2 + 30 * 3) / 40) and one.weight == 40
    assert c.value == pytest.approx(30 * 0.1 / 40)
    spread = (10 * (0 - 0.075)) ** 2 + (30 * (0.1 - 0.075)) ** 2
    assert c.stderr == pytest.approx(math.sqrt(2 / 1 * spread) / 40)
    drawn = numbers(of(base), {"bootstrap": 200})["nats/csqa"]
    assert (drawn.low, drawn.high) == (2.0, 3.0)  # sizes travel with their values


def test_with_equal_weights_the_error_is_the_ordinary_one() -> None:
    values = [0.2, 0.5, 0.9]
    wanted = math.sqrt(sum((v - 1.6 / 3) ** 2 for v in values) / 2 / 3)
    assert stderr(values) == pytest.approx(wanted) == stderr(values, [7, 7, 7])


def test_one_record_has_no_error_and_no_verdict() -> None:
    c = moved(rows(1.0), rows(1.0))
    assert (c.value, c.stderr, c.within) == (0.0, None, None)


def test_a_record_that_one_side_could_not_score_counts_on_neither() -> None:
    c = moved(rows(1.0, 0.0, 1.0), rows(1.0, None, 1.0))
    assert (c.n, c.dropped, c.value) == (2, 1, 0.0)
    assert numbers(of(rows(None)), PLAIN) == {}


def test_records_are_matched_by_id_and_not_by_order() -> None:
    c = moved(rows(1.0, 0.0, 0.0), rows(1.0, 0.0, 0.0)[::-1])
    assert (c.value, c.stderr) == (0.0, 0.0)


def test_a_broken_model_is_outside_and_not_left_out() -> None:
    c = moved(rows(2.0, 3.0, form="text"), rows(2.0, math.inf, form="text"), "nats/csqa")
    assert (c.n, c.value, c.stderr, c.within) == (2, math.inf, None, None)


def test_tasks_stay_apart() -> None:
    found = numbers(of(rows(1.0, 0.0) + rows(1.0, 1.0, task="piqa")), PLAIN)
    assert {name: number.value for name, number in found.items()} == {"cloze/csqa": 0.5, "cloze/piqa": 1.0}


def test_answers_that_repeat_their_target_or_themselves_are_counted() -> None:
    texts = ("Rome, Rome and Rome", "Rome", "RomeRome RomeRome", "a b A b a", "", "x")
    answers = [Answer(id=str(i), prompt="p", wanted=("Rome",), text=text) for i, text in enumerate(texts)]
    found = numbers(collect(answers, REPETITION), PLAIN)
    assert (found["repeats"].value, found["repeats"].n) == (pytest.approx(2 / 6), 6)
    assert (found["distinct_2"].value, found["distinct_2"].n) == (pytest.approx((5 + 0.5) / 6), 6)  # (a b) (b a) twice
