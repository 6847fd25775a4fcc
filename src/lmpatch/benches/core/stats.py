"""The only mean, standard error, clustered error and bootstrap of all benches, and the numbers made of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ...data.matching import normalise
from ...errors import MissingExtra
from .contract import Json, Measure

ROUNDING = 1e-9  # one answer of n that turned is exactly one standard error; rounding must not decide the verdict


@dataclass(frozen=True)
class Number:
    """A mean over records, or a sum or difference of means, with what it rests on."""

    name: str
    value: float
    stderr: float | None
    """As if units were independent; None for a single one."""
    clustered: float | None
    """As if clusters were, and no more (Liang and Zeger 1986); None without clusters."""
    low: float | None
    """2.5 % of the bootstrapped values; None for a single unit."""
    high: float | None
    """97.5 %."""
    n: int
    """Units."""
    dropped: int = 0
    """Rows that belong here and were not asked or have no value."""
    split: str = "all"
    """Which of the rows."""
    protocol: str = ""
    weight: int = 0
    """Sum of the rows' sizes, such as tokens, where they differ from ``n``."""

    @property
    def error(self) -> float | None:
        """The larger of the two standard errors."""
        return None if self.stderr is None else max(self.stderr, self.clustered or 0.0)

    @property
    def within(self) -> bool | None:
        """Of a difference: it is at most one standard error. None without an error."""
        return None if self.error is None else abs(self.value) <= self.error * (1 + ROUNDING)


@dataclass(frozen=True)
class Values:
    """What one number is made of, unit by unit."""

    units: dict[Hashable, list[float]] = field(default_factory=dict)
    sizes: dict[Hashable, int] = field(default_factory=dict)
    clusters: dict[Hashable, str] = field(default_factory=dict)
    dropped: int = 0

    def minus(self, other: Values) -> Values:
        """Paired differences. Units missing on either side do not count."""
        return self._with(other, lambda a, b: mean(a) - mean(b))

    def halfway(self, other: Values) -> Values:
        """The middle of both, over the units that have both."""
        return self._with(other, lambda a, b: (mean(a) + mean(b)) / 2)

    def _with(self, other: Values, both: Callable[[list[float], list[float]], float]) -> Values:
        units = {unit: [both(own, other.units[unit])] for unit, own in self.units.items() if unit in other.units}
        return Values(units, self.sizes, self.clusters, max(self.dropped, other.dropped))


def mean(values: Sequence[float], sizes: Sequence[int] | None = None) -> float:
    """The mean, weighted by sizes where there are some."""
    return float(np.average(values, weights=sizes))


def stderr(values: Sequence[float], sizes: Sequence[int] | None = None) -> float | None:
    """s / sqrt(n); with sizes that of a ratio, linearised. None for fewer than two values, or where one is infinite.

    Source: Cochran, Sampling Techniques (1977), sec. 2.11: m = sum(w v) / sum(w),
    se = sqrt(n / (n - 1) * sum((w (v - m))^2)) / sum(w).
    """
    n = len(values)
    if n < 2 or not np.isfinite(values).all():
        return None
    if sizes is None:
        return float(_scipy().sem(values))
    v, w = np.asarray(values), np.asarray(sizes)
    return float(np.sqrt(n / (n - 1) * ((w * (v - mean(values, sizes))) ** 2).sum()) / w.sum())


def clustered(terms: Sequence[Values]) -> float | None:
    """The error of a sum of means if only clusters are independent: deviations are summed within a cluster, over all
    terms, before they are squared (Liang and Zeger 1986). None for fewer than two clusters."""
    totals: dict[str, float] = {}
    for term in terms:
        flat, sizes = _flat(term)
        middle, whole = mean(flat, sizes), sum(sizes) if sizes else len(flat)
        for i, unit in enumerate(term.units):
            if (cluster := term.clusters.get(unit)) is None:
                return None
            totals[cluster] = totals.get(cluster, 0.0) + (sizes[i] if sizes else 1) * (flat[i] - middle) / whole
    g = len(totals)
    return math.sqrt(g / (g - 1) * sum(x**2 for x in totals.values())) if g > 1 else None


def interval(
    samples: Sequence[Sequence[float]], resamples: int, seed: int, *, sizes: Sequence[int] | None = None
) -> tuple[float | None, float | None]:
    """2.5th and 97.5th percentile of the sum of the samples' means over resampled units; None for fewer than two."""
    if not resamples or min(map(len, samples)) < 2 or not all(np.isfinite(s).all() for s in samples):
        return None, None
    if sizes is not None:  # one sample, whose sizes travel with it
        low, high, _ = _bootstrap(
            (*samples, sizes), lambda v, w, axis: (v * w).sum(axis) / w.sum(axis), resamples, seed
        )
        return low, high
    low, high, _ = _bootstrap(samples, lambda *drawn, axis: sum(d.mean(axis) for d in drawn), resamples, seed, False)
    return low, high


def number(name: str, terms: Sequence[Values], *, bootstrap: int, seed: int, **labels: Any) -> Number | None:
    """The sum of the terms' means with all its errors; None where a term has no unit."""
    if not terms or not all(term.units for term in terms):
        return None
    flat = [_flat(term) for term in terms]
    errors = [stderr(values, sizes) for values, sizes in flat]
    alone = any(error is None for error in errors)
    sizes = flat[0][1] if len(terms) == 1 else None
    low, high = interval([values for values, _ in flat], bootstrap, seed, sizes=sizes)
    return Number(
        name,
        sum(mean(values, sizes) for values, sizes in flat),
        None if alone else math.hypot(*(error or 0.0 for error in errors)),
        None if alone else clustered(terms),
        low,
        high,
        sum(len(term.units) for term in terms),
        max(term.dropped for term in terms),
        weight=sum(sizes) if sizes else 0,
        **labels,
    )


def percentile(name: str, term: Values, share: float, *, bootstrap: int, seed: int, **labels: Any) -> Number | None:
    """A percentile over all rows, with the bootstrap over units behind both errors."""
    groups = [np.asarray(values) for values in term.units.values()]
    if not groups:
        return None

    def of(picks: Any) -> float:
        return float(np.percentile(np.concatenate([groups[int(i)] for i in picks]), share))

    low = high = error = None
    if bootstrap and len(groups) > 1:
        low, high, error = _bootstrap([range(len(groups))], of, bootstrap, seed, False, vectorized=False)
    return Number(name, of(range(len(groups))), error, None, low, high, len(groups), term.dropped, **labels)


def _flat(term: Values) -> tuple[list[float], list[int] | None]:
    """Unit means, and their sizes where any is not 1."""
    values = [mean(v) if len(v) > 1 else v[0] for v in term.units.values()]
    sizes = [term.sizes.get(unit, 1) for unit in term.units]
    return values, sizes if any(size != 1 for size in sizes) else None


def _bootstrap(
    data: Any, statistic: Any, resamples: int, seed: int, paired: bool = True, **how: Any
) -> tuple[float, float, float]:
    drawn = _scipy().bootstrap(
        data, statistic, n_resamples=resamples, paired=paired, method="percentile",
        rng=np.random.default_rng(seed), **{"vectorized": True, **how},
    )  # fmt: skip
    limits = drawn.confidence_interval
    return float(limits.low), float(limits.high), float(drawn.standard_error)


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtra('benches need scipy. Run: pip install "lmpatch[bench]"') from error
    return stats


# Numbers of rows


def _twice(row: Any) -> float:
    text, wanted = row.generation()
    return float(any(normalise(text).count(normalise(answer)) > 1 for answer in wanted if normalise(answer)))


def _distinct(row: Any) -> float:
    words = row.generation()[0].casefold().split()
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def _generated(row: Any) -> str | None:
    return None if row.generation() is None else ""


def _wanted(row: Any) -> str | None:
    answer = row.generation()
    return "" if answer and answer[1] else None


TWICE = "answers that say a wanted answer twice or more, parts of words counted"
PAIRS = "share of an answer's word pairs that differ (distinct-2): low where it runs in circles"
REPETITION = {
    "repeats": Measure(TWICE, _twice, _wanted, "Repetition", better="less"),
    "distinct_2": Measure(PAIRS, _distinct, _generated, "Repetition"),
}
"""Beside every generated score."""


def collect(rows: Sequence[Any], metrics: Mapping[str, Measure]) -> dict[str, tuple[Measure, Values]]:
    """Full name → its measure and values, in the order of ``metrics``; a family's members as they come."""
    whole: dict[str, tuple[Measure, Values]] = {}
    for key, measure in metrics.items():
        members: dict[str, _Collected] = {}
        if measure.derived:
            how, one, two = measure.derived
            if one in whole and two in whole:
                a, b = whole[one][1], whole[two][1]
                whole[key] = measure, a.minus(b) if how == "minus" else a.halfway(b)
            continue
        for row in rows:
            if (member := measure.of(row)) is not None:
                members.setdefault(member, _Collected()).add(row, measure.value(row))
        base, mark, split = key.partition("@")
        for member, values in members.items():
            whole[base + (f"/{member}" if member else "") + mark + split] = measure, values.values()
    return {name: pair for name, pair in whole.items() if pair[1].units}


class _Collected:
    """Values on their way in."""

    def __init__(self) -> None:
        self.units: dict[Hashable, list[float]] = {}
        self.sizes: dict[Hashable, int] = {}
        self.clusters: dict[Hashable, str] = {}
        self.dropped = 0

    def add(self, row: Any, value: float | bool | None) -> None:
        """One row's value; None is counted."""
        if value is None:
            self.dropped += 1
            return
        unit = row.unit()
        self.units.setdefault(unit, []).append(float(value))
        if row.size() != 1:
            self.sizes[unit] = row.size()
        if (cluster := row.cluster()) is not None:
            self.clusters[unit] = cluster

    def values(self) -> Values:
        """All of it."""
        return Values(self.units, self.sizes, self.clusters, self.dropped)


Collection = Mapping[str, tuple[Measure, Values]]


def numbers(rows: Collection, record: Json) -> dict[str, Number]:
    """Every number that rows hold, under its full name (``name@split``)."""
    every = {name: _one(name, measure, values, record) for name, (measure, values) in rows.items()}
    return {name: number for name, number in every.items() if number is not None}


def differences(base: Collection, rows: Collection, record: Json) -> dict[str, Number]:
    """The same, as differences from another run, unit by unit."""
    every = {
        name: _one(name, measure, values.minus(base[name][1]), record)
        for name, (measure, values) in rows.items()
        if name in base and measure.percentile is None
    }
    return {name: number for name, number in every.items() if number is not None}


def total(name: str, rows: Collection, record: Json, base: Collection | None = None) -> Number | None:
    """One number, or a sum of them such as ``R_Ad+R_Ro``; with ``base`` the difference from it, unit by unit."""
    terms = []
    for part in name.split("+"):
        if part not in rows or (base is not None and part not in base):
            return None
        terms.append(rows[part][1] if base is None else rows[part][1].minus(base[part][1]))
    return number(name, terms, **_how(record))


def _one(name: str, measure: Measure, values: Values, record: Json) -> Number | None:
    plain, _, split = name.partition("@")
    labels = {"split": split or "all", "protocol": measure.protocol(record), **_how(record)}
    if measure.percentile is not None:
        return percentile(plain, values, measure.percentile, **labels)
    return number(plain, [values], **labels)


def _how(record: Json) -> Json:
    return {"bootstrap": record.get("bootstrap", 1000), "seed": record.get("seed", record.get("order_seed", 0))}
