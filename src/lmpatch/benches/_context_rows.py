"""Rows of the context benches and the numbers made of them. Rows are the truth; numbers are recomputed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

When = Literal["context", "foreign", "bare"]
"""What the model read before the question: its own context, another record's, or none."""


@dataclass(frozen=True)
class Row:
    """One record, asked once."""

    run_id: str
    chunk: int
    place: int
    """Which of the records asked it is."""
    id: str
    when: When
    answer: str
    """What the record's own context says."""
    memory: str
    """What is known without it; "" if the record does not say."""
    said: str | None
    """The answer, as far as it had to be generated to be judged; a letter where there are options. None: not asked."""
    closed: str | None
    """What the unpatched model says without a context. None: not asked."""
    kept: bool | None = None
    """``said`` is that answer; None with its own context, or where one of them was not asked."""
    scores: tuple[float, ...] = ()
    """One per option: its logit, or the log probability of the whole letter."""
    other: str = ""
    """Whose context was read."""
    flag: str = ""
    """Why it was not asked, or what was done differently."""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Row:
        """A row from its JSON form."""
        return cls(**{**record, "scores": tuple(record["scores"])})


@dataclass(frozen=True)
class Metric:
    """A mean over records."""

    name: str
    value: float
    stderr: float | None
    """s / sqrt(n); None for a single record."""
    low: float | None
    """2.5 % of the bootstrapped means."""
    high: float | None
    """97.5 %."""
    n: int
    dropped: int
    """Records that were not asked."""


def _acc(row: Row) -> float:
    return float(row.said == row.answer)


def _stubborn(row: Row) -> float:
    return float(row.said == row.memory)


def _rest(row: Row) -> float:
    return float(row.said not in (row.answer, row.memory))


def _kept(row: Row) -> float:
    return float(bool(row.kept))


def _every(row: Row) -> bool:
    return True


MEASURES: dict[str, tuple[When, Callable[[Row], float], Callable[[Row], bool]]] = {
    "acc": ("context", _acc, _every),
    "sr": ("context", _stubborn, lambda row: bool(row.memory)),
    "rest": ("context", _rest, _every),
    "adherence": ("context", _acc, lambda row: row.closed != row.answer),
    "robustness": ("foreign", _kept, _every),
    "known_kept": ("foreign", _kept, lambda row: bool(row.memory) and row.closed == row.memory),
    "closed_kept": ("bare", _kept, _every),
}
"""Name -> which rows, the value of one, and which of them count."""


def values(rows: Sequence[Row], name: str) -> tuple[dict[int, float], int]:
    """Place -> value of every record that counts for a number, and how many of them were not asked."""
    if name == "bcu":  # the mean of both sides, over the records asked on both
        found, dropped = values(rows, "acc")
        other, missing = values(rows, "robustness")
        return {i: (v + other[i]) / 2 for i, v in found.items() if i in other}, max(dropped, missing)
    when, value, counts = MEASURES[name]
    right = [row for row in rows if row.when == when]
    asked = [row for row in right if row.said is not None and (when == "context" or row.kept is not None)]
    if name in ("adherence", "known_kept"):  # which records count is told by the answer without a context
        asked = [row for row in asked if row.closed is not None]
    return {row.place: value(row) for row in asked if counts(row)}, len(right) - len(asked)


NAMES = (*MEASURES, "bcu")


def metrics(rows: Sequence[Row], *, bootstrap: int, seed: int) -> dict[str, Metric]:
    """Every number the rows of one run hold."""
    made = {}
    for name in NAMES:
        found, dropped = values(rows, name)
        if found:
            made[name] = mean(name, list(found.values()), dropped, bootstrap, seed)
    return made


def differences(base: Sequence[Row], rows: Sequence[Row], *, bootstrap: int, seed: int) -> dict[str, Metric]:
    """The same, as differences from another run, record by record. Records missing on either side do not count."""
    made = {}
    for name in NAMES:
        (before, missing), (after, dropped) = values(base, name), values(rows, name)
        moved = [after[i] - before[i] for i in after if i in before]
        if moved:
            made[name] = mean(name, moved, max(missing, dropped), bootstrap, seed)
    return made


def mean(name: str, found: Sequence[float], dropped: int, bootstrap: int, seed: int) -> Metric:
    """The mean, its standard error and the interval of the means of resampled records."""
    data, n = np.asarray(found), len(found)
    value = float(data.mean())
    if n < 2:
        return Metric(name, value, None, None, None, n, dropped)
    error = float(data.std(ddof=1)) / math.sqrt(n)
    if not bootstrap:
        return Metric(name, value, error, None, None, n, dropped)
    random = np.random.default_rng(seed)
    drawn = data[random.integers(0, n, (bootstrap, n))].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Metric(name, value, error, float(low), float(high), n, dropped)
