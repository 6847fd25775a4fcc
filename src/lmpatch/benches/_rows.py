"""Rows, one per prompt and moment, and the numbers made of them. Rows are the truth; means are always recomputed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._text import same

BINS = ((0, 0), (1, 9), (10, 99), (100, 999), (1000, None))
"""Ages of the retention curve: edits written since, first and last of each bin."""
SPLITS = ("all", "was_wrong", "was_right")


@dataclass(frozen=True)
class Row:
    """One prompt of one case at one moment."""

    run_id: str
    when: str
    """``final``: all edits of the chunk in place; ``immediate``: after the commit that holds it; ``retention``."""
    chunk: int
    case_id: str
    kind: str
    """``edit``, ``rephrase``, ``loc/<kind>``, ``port/<axis>``."""
    prompt: str
    aliases: tuple[str, ...] = ()
    old_aliases: tuple[str, ...] = ()
    flag: str = ""
    """Why the prompt was not asked, or why the edit was not written (``refused: ...``, ``stopped``)."""
    base_text: str | None = None
    text: str | None = None
    """The generation, unchanged; None: not asked."""
    was_right: bool | None = None
    """The base model answers this prompt as wanted."""
    em: bool | None = None
    contains: bool | None = None
    old_first: bool | None = None
    tf_acc: float | None = None
    """Share of the answer's tokens that are the first choice, teacher-forced."""
    tf_same: float | None = None
    """Share of the answer's tokens where the first choice is the base model's."""
    tf_new: float | None = None
    """Mean log probability per token of the answer, nats."""
    tf_old: float | None = None
    """The same of the old answer."""
    kl: float | None = None
    """KL(p_base || p_now) of the next token, nats."""
    edit_index: int = 0
    age: int = 0
    """Edits written after the commit that holds this one."""
    n_edits: int = 0
    """Edits in the model."""
    probe: bool = False
    """The case belongs to the retention curve."""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Row:
        """A row from its JSON form."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(**values)


@dataclass(frozen=True)
class Metric:
    """A mean with its interval, how many cases it is made of, and what is missing from it."""

    name: str
    split: str
    value: float
    low: float | None
    """95 % bootstrap interval over cases; None for a single case."""
    high: float | None
    n: int
    """Cases."""
    dropped: int
    """Prompts that belong here and were not asked or have no value."""
    protocol: str


@dataclass(frozen=True)
class _Measure:
    name: str  # {} stands for the locality kind or portability axis
    kind: str
    value: Callable[[Row], float | bool | None]
    protocol: str = "gen"
    only: Callable[[Row], bool] = lambda row: True


def _unchanged(row: Row) -> bool | None:
    return None if row.text is None or row.base_text is None else same(row.text, row.base_text)


def _success(row: Row) -> bool | None:
    return None if row.tf_new is None or row.tf_old is None else row.tf_new > row.tf_old


def _margin(row: Row) -> float | None:
    return None if row.tf_new is None or row.tf_old is None else math.exp(row.tf_new) - math.exp(row.tf_old)


def _has_old(row: Row) -> bool:
    return bool(row.old_aliases)


def _has_answer(row: Row) -> bool:
    return bool(row.aliases)


def _known(row: Row) -> bool:
    return row.was_right is True


MEASURES = (
    _Measure("reliability", "edit", lambda row: row.em),
    _Measure("reliability_contains", "edit", lambda row: row.contains),
    _Measure("generality", "rephrase", lambda row: row.em),
    _Measure("generality_contains", "rephrase", lambda row: row.contains),
    _Measure("old_answer_rate", "edit", lambda row: row.old_first, only=_has_old),
    _Measure("old_answer_rate_rephrase", "rephrase", lambda row: row.old_first, only=_has_old),
    _Measure("portability/{}", "port/", lambda row: row.em),
    _Measure("portability_contains/{}", "port/", lambda row: row.contains),
    _Measure("loc_unchanged/{}", "loc/", _unchanged),
    _Measure("loc_correct/{}", "loc/", lambda row: row.em, only=_known),
    _Measure("loc_kl/{}", "loc/", lambda row: row.kl),
    _Measure("tf_reliability", "edit", lambda row: row.tf_acc, "tf"),
    _Measure("tf_generality", "rephrase", lambda row: row.tf_acc, "tf"),
    _Measure("tf_generality/{}", "port/", lambda row: row.tf_acc, "tf"),
    _Measure("tf_locality/{}", "loc/", lambda row: row.tf_same, "tf", only=_has_answer),
    _Measure("tf_success", "edit", _success, "tf", only=_has_old),
    _Measure("tf_success_rephrase", "rephrase", _success, "tf", only=_has_old),
    _Measure("tf_margin", "edit", _margin, "tf", only=_has_old),
    _Measure("tf_margin_rephrase", "rephrase", _margin, "tf", only=_has_old),
)

Cases = dict[str, list[float]]  # case -> values of its prompts


def protocol(measure: str, when: str, suffix: str) -> str:
    """The id under which a number may be compared with others.

    Args:
        measure: ``gen`` or ``tf``.
        suffix: what else decides the number: rule of matching, length, chat, raw.
    """
    if measure == "tf":
        name = "tf-recipe-chunk-v1" if when == "final" else f"tf-{when}-v1"
        return name + "".join(f"-{part}" for part in suffix.split("-") if part in ("raw", "chat"))
    return f"gen-{when}-v1{suffix}"


def metrics(rows: Sequence[Row], *, suffix: str = "", bootstrap: int = 1000, seed: int = 0) -> list[Metric]:
    """Every number the rows of one run hold: a mean inside each case first, then over cases.

    Args:
        bootstrap: resamples of the cases behind each interval.
    """
    made: list[Metric] = []
    for when in ("final", "immediate"):
        chosen = [row for row in rows if row.when == when]
        for measure in MEASURES:
            for name, found in sorted(_by_name(chosen, measure).items()):
                id = protocol(measure.protocol, when, suffix)
                made += _split(name, found, measure, id, bootstrap, seed)
    return made + forgetting(rows, suffix=suffix, bootstrap=bootstrap, seed=seed)


def forgetting(rows: Sequence[Row], *, suffix: str = "", bootstrap: int = 1000, seed: int = 0) -> list[Metric]:
    """Immediate minus final ``em`` on the edit prompts scored at both moments; none or one metric."""
    at: dict[str, dict[str, float]] = {"immediate": {}, "final": {}}
    for row in rows:
        if row.kind == "edit" and row.when in at and row.em is not None:
            at[row.when][row.case_id] = float(row.em)
    cases = {c: [value - at["final"][c]] for c, value in at["immediate"].items() if c in at["final"]}
    if not cases:
        return []
    low, high = interval(cases, _macro, bootstrap, seed)
    id = protocol("gen", "retention", suffix)
    return [Metric("forgetting", "all", _macro(cases.values()), low, high, len(cases), 0, id)]


def retention(rows: Iterable[Row]) -> list[tuple[str, float, int]]:
    """(ages, share of edit prompts answered as edited, rows) of the probe cases, youngest first."""
    values: dict[str, list[float]] = {label(ages): [] for ages in BINS}
    for row in rows:
        if row.probe and row.kind == "edit" and row.em is not None:
            values[next(label(b) for b in BINS if b[1] is None or row.age <= b[1])].append(float(row.em))
    return [(ages, sum(v) / len(v), len(v)) for ages, v in values.items() if v]


def label(ages: tuple[int, int | None]) -> str:
    """``0``, ``1-9``, ``1000+``."""
    low, high = ages
    return f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"


def _by_name(rows: Iterable[Row], measure: _Measure) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kind, slash, rest = row.kind.partition("/")
        if kind + slash == measure.kind and measure.only(row):
            found[measure.name.format(rest)].append(row)
    return found


def _split(name: str, rows: Sequence[Row], measure: _Measure, id: str, bootstrap: int, seed: int) -> Iterable[Metric]:
    for split in SPLITS[:1] if measure.only is _known else SPLITS:
        cases: Cases = {}
        dropped = 0
        for row in rows:
            if split != "all" and row.was_right is not (split == "was_right"):
                continue
            value = measure.value(row)
            if value is None or not math.isfinite(value):
                dropped += 1
            else:
                cases.setdefault(row.case_id, []).append(float(value))
        statistics = {name: _macro} if cases else {}
        if cases and measure.name == "loc_kl/{}" and split == "all":
            statistics[name.replace("loc_kl", "loc_kl_p95")] = _p95
        for full_name, statistic in statistics.items():
            low, high = interval(cases, statistic, bootstrap, seed)
            yield Metric(full_name, split, statistic(cases.values()), low, high, len(cases), dropped, id)


def _macro(cases: Iterable[Sequence[float]]) -> float:
    """Mean over cases of the mean inside each."""
    return float(np.mean([np.mean(values) for values in cases]))


def _p95(cases: Iterable[Sequence[float]]) -> float:
    """95th percentile over all prompts."""
    return float(np.percentile(np.concatenate([np.asarray(values) for values in cases]), 95))


def interval(
    cases: Cases, statistic: Callable[[Iterable[Sequence[float]]], float], resamples: int, seed: int
) -> tuple[float | None, float | None]:
    """2.5th and 97.5th percentile of the statistic over resampled cases; None for fewer than two cases."""
    groups = list(cases.values())
    if len(groups) < 2 or not resamples:
        return None, None
    random = np.random.default_rng(seed)
    if statistic is _macro:  # a mean of means needs no Python loop
        means = np.array([np.mean(values) for values in groups])
        drawn = np.array([means[random.integers(0, len(means), len(means))].mean() for _ in range(resamples)])
    else:
        picks = (random.integers(0, len(groups), len(groups)) for _ in range(resamples))
        drawn = np.array([statistic([groups[i] for i in pick]) for pick in picks])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
