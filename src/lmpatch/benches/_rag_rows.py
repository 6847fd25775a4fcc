"""Rows of the RAG bench: what is asked under which condition, when an answer counts, and the numbers made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..data.context import InContext
from ..data.rag import RagRecord, f1, known, normalise
from ._text import first
from ._text import normalise as spoken

Condition = Literal["context", "conflict", "mixed", "irrelevant", "empty"]
CONDITIONS: dict[Condition, str] = {
    "context": "the document that answers",
    "conflict": "that document with another answer",
    "mixed": "the same among noise of its own and of another article",
    "irrelevant": "a document of another article",
    "empty": "no document",
}
VARIANTS: dict[str, tuple[Condition, ...]] = {
    "original": ("context",),
    "substituted": ("conflict",),
    "mixed": ("mixed",),
    "foreign": ("irrelevant", "empty"),
}
"""Variant of a record → the conditions it is asked under."""
AGREES = 0.5
"""Token F1 of a closed-book answer with the context's from which the two do not conflict. Source: COIECD."""


@dataclass(frozen=True)
class Sample:
    """One question under one condition."""

    id: str
    condition: Condition
    asked: InContext
    question: str
    wanted: tuple[str, ...]
    """What the document says; the true answers where it says nothing."""
    own: str
    """The unpatched model's closed-book answer."""
    known: bool
    """That answer is right."""


def samples(records: Sequence[RagRecord], own: Mapping[str, str]) -> list[Sample]:
    """Everything that can be asked about records. Without a conflict or a true answer there is nothing to ask.

    Args:
        own: question → closed-book answer.
    """
    made = []
    for r in records:
        said = own[r.question]
        for condition in VARIANTS.get(r.variant, ()):
            wanted = (r.answer,) if r.answer else r.gold
            if condition in ("conflict", "mixed") and f1(said, r.answer) >= AGREES:
                continue
            if wanted:
                asked = InContext(r.bare, r.bare) if condition == "empty" else r.asked
                made.append(Sample(r.id, condition, asked, r.question, wanted, said, known(said, r.gold)))
    return made


@dataclass(frozen=True)
class Row:
    """One sample, answered by one model."""

    run_id: str
    chunk: int
    id: str
    condition: Condition
    question: str
    wanted: tuple[str, ...]
    own: str
    known: bool
    text: str
    """What was generated."""
    hit: bool
    """It has a wanted answer; under ``context``, ``conflict`` and ``mixed`` the model's own is not beside it."""
    exact: bool
    """It is a wanted answer, normalised."""
    kept: bool
    """It is the model's own closed-book answer, or nearly."""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Row:
        """A row from its JSON form."""
        return cls(**{**record, "wanted": tuple(record["wanted"])})


def judged(sample: Sample, text: str) -> Row:
    """The row of an answer."""
    has = first(spoken(text), [spoken(w) for w in sample.wanted]) is not None
    alone = not has or not _beside(text, sample)
    reads = sample.condition in ("context", "conflict", "mixed")
    return Row(
        "",
        0,
        sample.id,
        sample.condition,
        sample.question,
        sample.wanted,
        sample.own,
        sample.known,
        text,
        hit=has and (alone or not reads),
        exact=normalise(text) in {normalise(w) for w in sample.wanted},
        kept=bool(normalise(sample.own)) and f1(text, sample.own) >= AGREES,
    )


def _beside(text: str, sample: Sample) -> bool:
    """The model's own answer stands in what is left of the text without the wanted one."""
    own, rest = spoken(sample.own), spoken(text)
    for wanted in sorted(map(spoken, sample.wanted), key=len, reverse=True):
        rest = rest.replace(wanted, " ") if wanted else rest
    return bool(own) and first(rest, [own]) is not None


@dataclass(frozen=True)
class Metric:
    """A share of rows with its standard error."""

    name: str
    value: float
    stderr: float | None
    n: int


NAMES = {
    "R_Ad": "conflict items answered from the document and not from memory",
    "R_Ad/mixed": "the same among noise",
    "R_Ro": "irrelevant items still right, of those right without documents",
    "R_Ro/empty": "the same without a document",
    "kept": "irrelevant items with the model's own answer, right or wrong",
}
"""Metric → what it is the share of. ``accuracy/<condition>`` and ``exact/<condition>`` are over all items of it."""


def chosen(rows: Iterable[Row], name: str) -> list[tuple[str, float]]:
    """(id, value) of every row a metric is the mean of."""
    kind, _, condition = name.partition("/")
    if kind == "R_Ad":
        return [(r.id, float(r.hit)) for r in rows if r.condition == (condition or "conflict")]
    if kind == "R_Ro":
        return [(r.id, float(r.hit)) for r in rows if r.condition == (condition or "irrelevant") and r.known]
    if kind == "kept":
        return [(r.id, float(r.kept)) for r in rows if r.condition == "irrelevant" and normalise(r.own)]
    return [(r.id, float(r.exact if kind == "exact" else r.hit)) for r in rows if r.condition == condition]


def metrics(rows: Sequence[Row]) -> list[Metric]:
    """All numbers of one run; those without a row are left out."""
    names = [*NAMES, *(f"{kind}/{condition}" for kind in ("accuracy", "exact") for condition in CONDITIONS)]
    return [found for name in names if (found := mean(name, [value for _, value in chosen(rows, name)]))]


def difference(name: str, base: Sequence[Row], rows: Sequence[Row]) -> Metric | None:
    """Rows minus base on the same items, so its error is smaller than that of two separate means."""
    was = dict(chosen(base, name))
    return mean(name, [value - was[id] for id, value in chosen(rows, name) if id in was])


def mean(name: str, values: Sequence[float]) -> Metric | None:
    """Mean with s / √n; None of nothing."""
    n = len(values)
    if not n:
        return None
    middle = sum(values) / n
    error = math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    return Metric(name, middle, error, n)
