"""Rows of the general bench, and two runs compared record by record. Rows are the truth; means are recomputed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["letters", "cloze", "answer", "text"]
MEASURES: dict[Form, str] = {
    "letters": "accuracy",
    "cloze": "accuracy",
    "answer": "1/perplexity of the answer",
    "text": "nats per token",
}
"""What a row's value is. Of the first three more is better, of the last less."""
ROUNDING = 1e-9  # one answer of n that turned is exactly one standard error; rounding must not decide the verdict


@dataclass(frozen=True)
class Row:
    """One record under one protocol, scored on one model."""

    run_id: str
    chunk: int
    task: str
    protocol: str
    form: Form
    id: str
    """Hash of the record: equal on every model."""
    source: str
    """File and line."""
    gold: int
    """Index of the right option."""
    scores: tuple[float, ...] = ()
    """One per option: its logit (letters), else its mean log probability per token, nats."""
    value: float | None = None
    """1 or 0 (right, wrong), 1/perplexity, or nats per token; None: not asked."""
    weight: int = 1
    """Tokens behind the value of a text, whose mean is one over tokens; 1 elsewhere."""
    flag: str = ""
    """Why it was not asked."""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Row:
        """A row from its JSON form."""
        return cls(**{**record, "scores": tuple(record["scores"])})


@dataclass(frozen=True)
class Mean:
    """A mean over records and its standard error; None for a single record."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Comparison:
    """One task under one protocol: the unpatched model, and a patched one on the same records."""

    task: str
    protocol: str
    form: Form
    n: int
    """Records scored on both."""
    dropped: int
    """Records that were not asked; their rows say why."""
    tokens: int
    """Tokens behind a text's mean; equal to ``n`` elsewhere."""
    chance: float | None
    """What guessing scores; None without options."""
    base: Mean
    patched: Mean | None = None
    difference: Mean | None = None
    """Patched minus base, record by record, so its error is smaller than that of two separate means."""

    @property
    def within(self) -> bool | None:
        """The difference is at most one standard error; None where there is none."""
        if self.difference is None or self.difference.stderr is None:
            return None
        return abs(self.difference.value) <= self.difference.stderr * (1 + ROUNDING)


def compare(base: Iterable[Row], patched: Iterable[Row] | None = None) -> list[Comparison]:
    """Every task under every protocol, in the order of first appearance. Records missing on either side count nowhere.

    Args:
        base: rows of the unpatched model.
        patched: rows of the patched one; None: only the base is described.
    """
    other = {(row.task, row.protocol, row.id): row for row in patched} if patched is not None else None
    groups: dict[tuple[str, str], list[tuple[Row, Row]]] = {}
    for row in base:
        now = other.get((row.task, row.protocol, row.id)) if other is not None else row
        if now is not None:
            groups.setdefault((row.task, row.protocol), []).append((row, now))
    made = []
    for pairs in groups.values():
        both = [(was, now) for was, now in pairs if was.value is not None and now.value is not None]
        if both:
            made.append(_comparison(both, len(pairs) - len(both), other is not None))
    return made


def _comparison(pairs: Sequence[tuple[Row, Row]], dropped: int, patched: bool) -> Comparison:
    first = pairs[0][0]
    weights = [was.weight for was, _ in pairs]
    before, after = ([row.value for row in rows if row.value is not None] for rows in zip(*pairs, strict=True))
    moved = [b - a for a, b in zip(before, after, strict=True)]
    options = [len(was.scores) for was, _ in pairs]
    return Comparison(
        first.task,
        first.protocol,
        first.form,
        n=len(pairs),
        dropped=dropped,
        tokens=sum(weights),
        chance=sum(1 / k for k in options) / len(options) if MEASURES[first.form] == "accuracy" else None,
        base=mean(before, weights),
        patched=mean(after, weights) if patched else None,
        difference=mean(moved, weights) if patched else None,
    )


def mean(values: Sequence[float], weights: Sequence[int]) -> Mean:
    """Weighted mean and its standard error, linearised as for a ratio; with weights 1 it is s / sqrt(n).

    Source: Cochran, Sampling Techniques (1977), sec. 2.11: m = sum(w v) / sum(w),
    se = sqrt(n / (n - 1) * sum((w (v - m))^2)) / sum(w).
    """
    n, total = len(values), sum(weights)
    middle = sum(w * v for v, w in zip(values, weights, strict=True)) / total
    if n < 2 or not math.isfinite(middle):
        return Mean(middle, None)
    spread = sum((w * (v - middle)) ** 2 for v, w in zip(values, weights, strict=True))
    return Mean(middle, math.sqrt(n / (n - 1) * spread) / total)
