"""Rows of the RAG bench: what is asked under which condition, when an answer counts, and the numbers made of it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..data.context import InContext
from ..data.rag.reader import RagRecord, f1, holds, normalise, whole

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
    article: str
    condition: Condition
    asked: InContext
    question: str
    wanted: tuple[str, ...]
    """What the document says; the true answers where it says nothing."""
    own: str
    """The unpatched model's closed-book answer."""
    known: bool
    """A true answer stands in it: repeated, it is a hit where the document does not answer."""


def samples(records: Sequence[RagRecord], own: Mapping[str, str]) -> list[Sample]:
    """Everything that can be asked about records. Without a conflict or a true answer there is nothing to ask.

    Args:
        own: question → closed-book answer.
    """
    made = []
    without_context: set[str] = set()  # questions asked without a document: once, however many records they have
    for r in records:
        said, question = own[r.question], r.id.partition(":")[0]
        for condition in VARIANTS.get(r.variant, ()):
            if condition == "empty":
                if (key := question or r.question) in without_context:
                    continue
                without_context.add(key)
            changed = condition in ("conflict", "mixed")
            if changed and (f1(said, r.answer) >= AGREES or holds(said, [r.answer])):
                continue
            wanted = (r.answer,) if changed else r.gold or ((r.answer,) if r.answer else ())
            if wanted:
                asked = InContext(r.without_context, r.without_context) if condition == "empty" else r.asked
                right = holds(said, r.gold)
                made.append(Sample(r.id, r.title or question, condition, asked, r.question, wanted, said, right))
    return made


@dataclass(frozen=True)
class Row:
    """One sample, answered by one model."""

    run_id: str
    chunk: int
    id: str
    article: str
    """Its title; the question where there is none. Items of one article are not independent."""
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
    flag: str = ""
    """Why it was not asked; it then counts nowhere."""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Row:
        """A row from its JSON form."""
        return cls(**{**record, "wanted": tuple(record["wanted"])})


def judged(sample: Sample, text: str, flag: str = "") -> Row:
    """The row of an answer, or of none where a flag says why."""
    has = holds(text, sample.wanted)
    reads = sample.condition in ("context", "conflict", "mixed")
    return Row(
        "",
        0,
        sample.id,
        sample.article,
        sample.condition,
        sample.question,
        sample.wanted,
        sample.own,
        sample.known,
        text,
        hit=has and not (reads and _beside(text, sample)),
        exact=normalise(text) in {normalise(w) for w in sample.wanted},
        kept=bool(normalise(sample.own)) and f1(text, sample.own) >= AGREES,
        flag=flag,
    )


def _beside(text: str, sample: Sample) -> bool:
    """The model's own answer stands in what is left of the text without the wanted one."""
    rest = normalise(text)
    for wanted in sorted(map(normalise, sample.wanted), key=len, reverse=True):
        rest = re.sub(whole(wanted), " ", rest) if wanted else rest
    return holds(rest, [sample.own])


@dataclass(frozen=True)
class Metric:
    """A share of rows, or the sum of two, with its standard error."""

    name: str
    value: float
    stderr: float | None
    """As if items were independent."""
    clustered: float | None
    """As if articles were, and no more."""
    n: int


NAMES = {
    "R_Ad": "conflict items answered from the document and not from memory",
    "R_Ad/known": "of these, those that memory has right",
    "R_Ad/mixed": "the same among noise",
    "R_Ro": "irrelevant items still right, of those right without documents",
    "R_Ro/empty": "the same without a document",
    "kept": "irrelevant items with the model's own answer, right or wrong",
}
"""Metric → what it is the share of. ``accuracy/<condition>`` and ``exact/<condition>`` are over all items of it."""
ALL = (*NAMES, *(f"{kind}/{condition}" for kind in ("accuracy", "exact") for condition in CONDITIONS))
Value = tuple[str, str, float]
"""(id, article, value) of one row."""


def chosen(rows: Iterable[Row], name: str) -> list[Value]:
    """Every row a metric is the mean of."""
    kind, _, which = name.partition("/")
    condition = {"R_Ad": "conflict", "R_Ro": "irrelevant", "kept": "irrelevant"}.get(kind, which)
    if kind in ("R_Ad", "R_Ro") and which in CONDITIONS:
        condition = which
    own = [r for r in rows if r.condition == condition and not r.flag]
    if kind == "R_Ro" or which == "known":
        own = [r for r in own if r.known]
    if kind == "kept":
        return [(r.id, r.article, float(r.kept)) for r in own if normalise(r.own)]
    return [(r.id, r.article, float(r.exact if kind == "exact" else r.hit)) for r in own]


def metric(rows: Sequence[Row], name: str) -> Metric | None:
    """One number of a run, or the sum of several: ``R_Ad+R_Ro``. None where one has no row."""
    return mean(name, *(chosen(rows, part) for part in name.split("+")))


def difference(name: str, base: Sequence[Row], rows: Sequence[Row]) -> Metric | None:
    """Rows minus base on the same items, so its error is smaller than that of two separate means."""
    groups = []
    for part in name.split("+"):
        was = {id: value for id, _, value in chosen(base, part)}
        groups.append([(id, article, value - was[id]) for id, article, value in chosen(rows, part) if id in was])
    return mean(name, *groups)


def mean(name: str, *groups: Sequence[Value]) -> Metric | None:
    """The sum of the groups' means; None if one is empty.

    The clustered error is that of Liang and Zeger (1986): deviations are summed within an article, over all groups,
    before they are squared.
    """
    if not all(groups):
        return None
    total, variance = 0.0, 0.0
    articles: defaultdict[str, float] = defaultdict(float)
    for group in groups:
        n = len(group)
        middle = sum(value for _, _, value in group) / n
        total += middle
        variance += sum((value - middle) ** 2 for _, _, value in group) / max(1, n - 1) / n
        for _, article, value in group:
            articles[article] += (value - middle) / n
    g = len(articles)
    clustered = math.sqrt(g / (g - 1) * sum(x**2 for x in articles.values())) if g > 1 else None
    alone = min(map(len, groups)) < 2
    return Metric(name, total, None if alone else math.sqrt(variance), clustered, sum(map(len, groups)))
