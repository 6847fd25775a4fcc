"""The only mean, standard error, clustered error and bootstrap of all benches, and the numbers made of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import sub
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


@dataclass
class Values:
    """What one number is made of, unit by unit."""

    units: dict[Hashable, list[float]] = field(default_factory=dict)
    sizes: dict[Hashable, int] = field(default_factory=dict)
    clusters: dict[Hashable, str] = field(default_factory=dict)
    dropped: int = 0

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

    def paired(self, other: Values, made: Callable[[float, float], float] = sub) -> Values:
        """The difference of both, or what else is made of them. Units missing on either side do not count."""
        units = {u: [made(mean(own), mean(other.units[u]))] for u, own in self.units.items() if u in other.units}
        return Values(units, self.sizes, self.clusters, max(self.dropped, other.dropped))


def mean(values: Sequence[float], sizes: Sequence[int] | None = None) -> float:
    """The mean, weighted by sizes where there are some."""
    if sizes is None and len(values) == 1:  # most units hold one row
        return float(values[0])
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
        return float(np.std(values, ddof=1) / np.sqrt(n))
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
    if sizes is None:
        return _bootstrap(samples, lambda *drawn, axis: sum(d.mean(axis) for d in drawn), resamples, seed, False)[:2]
    (values,) = samples
    return _bootstrap((values, sizes), lambda v, w, axis: (v * w).sum(axis) / w.sum(axis), resamples, seed, True)[:2]


def number(name: str, terms: Sequence[Values], *, bootstrap: int, seed: int, **labels: Any) -> Number | None:
    """The sum of the terms' means with all its errors; None where a term has no unit."""
    if not terms or not all(term.units for term in terms):
        return None
    flat = [_flat(term) for term in terms]
    value = sum(mean(values, sizes) for values, sizes in flat)
    errors = [error for values, sizes in flat if (error := stderr(values, sizes)) is not None]
    error, by_cluster = (math.hypot(*errors), clustered(terms)) if len(errors) == len(terms) else (None, None)
    sizes = flat[0][1] if len(terms) == 1 else None
    low, high = interval([values for values, _ in flat], bootstrap, seed, sizes=sizes)
    n, dropped = sum(len(term.units) for term in terms), max(term.dropped for term in terms)
    return Number(name, value, error, by_cluster, low, high, n, dropped, weight=sum(sizes or ()), **labels)


def percentile(name: str, term: Values, share: float, *, bootstrap: int, seed: int, **labels: Any) -> Number:
    """A percentile over all rows, with the bootstrap over units behind both errors."""
    groups = [np.asarray(values) for values in term.units.values()]

    def of(picks: Any) -> float:
        return float(np.percentile(np.concatenate([groups[int(i)] for i in picks]), share))

    low = high = error = None
    if bootstrap and len(groups) > 1:
        low, high, error = _bootstrap([range(len(groups))], of, bootstrap, seed, False)
    return Number(name, of(range(len(groups))), error, None, low, high, len(groups), term.dropped, **labels)


def _flat(term: Values) -> tuple[list[float], list[int] | None]:
    """Unit means, and their sizes where any is not 1."""
    values = [mean(v) for v in term.units.values()]
    sizes = [term.sizes.get(unit, 1) for unit in term.units]
    return values, sizes if any(size != 1 for size in sizes) else None


def _bootstrap(data: Any, statistic: Any, resamples: int, seed: int, paired: bool) -> tuple[float, float, float]:
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise MissingExtra('benches need scipy. Run: pip install "lmpatch[bench]"') from error
    rng = np.random.default_rng(seed)
    drawn = bootstrap(data, statistic, n_resamples=resamples, paired=paired, method="percentile", rng=rng)
    limits = drawn.confidence_interval
    return float(limits.low), float(limits.high), float(drawn.standard_error)


Collection = Mapping[str, tuple[Measure, Values]]
"""Full name → its measure, and what it is made of."""


def said_twice(text: str, wanted: Sequence[str]) -> float:
    """1 where a text says one of the wanted answers twice or more, parts of words counted."""
    return float(any(normalise(text).count(normalise(answer)) > 1 for answer in wanted if normalise(answer)))


def distinct(text: str, _: Sequence[str] = ()) -> float:
    """Share of a text's word pairs that differ."""
    pairs = list(pairwise(text.casefold().split()))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def _twice(row: Any) -> float:
    return said_twice(*row.generation())


def _distinct(row: Any) -> float:
    return distinct(*row.generation())


TWICE = "answers that say a wanted answer twice or more, parts of words counted"
PAIRS = "share of an answer's word pairs that differ (distinct-2): low where it runs in circles"
REPETITION = {
    "repeats": Measure(
        TWICE, _twice,
        lambda row: "" if (row.generation() or ("", ()))[1] else None, "Repetition", better="less", beside=True,
    ),
    "distinct_2": Measure(
        PAIRS, _distinct,
        lambda row: None if row.generation() is None else "", "Repetition", beside=True,
    ),
}  # fmt: skip
"""Beside every generated score."""


def collect(rows: Sequence[Any], metrics: Mapping[str, Measure]) -> dict[str, tuple[Measure, Values]]:
    """Full name → its measure and values, in the order of ``metrics``; a family's members as they come."""
    whole: dict[str, tuple[Measure, Values]] = {}
    for key, measure in metrics.items():
        if measure.derived:
            how, one, two = measure.derived
            if one in whole and two in whole:
                made = sub if how == "minus" else lambda a, b: (a + b) / 2
                whole[key] = measure, whole[one][1].paired(whole[two][1], made)
            continue
        base, mark, split = key.partition("@")
        for row in rows:
            if (member := measure.of(row)) is not None:
                full = base + (f"/{member}" if member else "") + mark + split
                whole.setdefault(full, (measure, Values()))[1].add(row, measure.value(row))
    return {name: pair for name, pair in whole.items() if pair[1].units}


def minus(rows: Collection, base: Collection) -> Collection:
    """Differences from another run, unit by unit. Percentiles have none."""
    return {n: (m, v.paired(base[n][1])) for n, (m, v) in rows.items() if n in base and m.percentile is None}


def numbers(rows: Collection, record: Json) -> dict[str, Number]:
    """Every number that rows hold, under its full name (``name@split``)."""
    found: dict[str, Number] = {}
    for name, (measure, values) in rows.items():
        plain, _, split = name.partition("@")
        labels = {"split": split or "all", "protocol": measure.protocol(record), **_how(record)}
        if measure.percentile is not None:
            found[name] = percentile(plain, values, measure.percentile, **labels)
        elif (one := number(plain, [values], **labels)) is not None:
            found[name] = one
    return found


def total(name: str, rows: Collection, record: Json) -> Number | None:
    """One number, or a sum of them such as ``R_Ad+R_Ro``; None where one is missing."""
    parts = name.split("+")
    return number(name, [rows[part][1] for part in parts], **_how(record)) if rows.keys() >= {*parts} else None


def _how(record: Json) -> Json:
    return {"bootstrap": record.get("bootstrap", 1000), "seed": record.get("seed", record.get("order_seed", 0))}
