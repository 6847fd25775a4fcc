"""Rows of the RAG bench: what is asked under which condition, when an answer counts, and the numbers made of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ...data.context import InContext
from ...data.rag.reader import RagRecord, f1, holds, normalise, whole
from ..core.contract import Example, Measure, Row, Scatter

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
    items = []
    without_context: set[str] = set()  # questions asked without a document: once, however many records they have
    for r in records:
        closed, question = own[r.question], r.id.partition(":")[0]
        for condition in VARIANTS.get(r.variant, ()):
            if condition == "empty":
                if (key := question or r.question) in without_context:
                    continue
                without_context.add(key)
            changed = condition in ("conflict", "mixed")
            if changed and (f1(closed, r.answer) >= AGREES or holds(closed, [r.answer])):
                continue
            wanted = (r.answer,) if changed else r.gold or ((r.answer,) if r.answer else ())
            if wanted:
                asked = InContext(r.without_context, r.without_context) if condition == "empty" else r.asked
                right = holds(closed, r.gold)
                items.append(Sample(r.id, r.title or question, condition, asked, r.question, wanted, closed, right))
    return items


@dataclass(frozen=True, kw_only=True)
class RagRow(Row):
    """One sample, answered by one model."""

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

    def key(self) -> Hashable:
        """Condition and record."""
        return self.condition, self.id

    def cluster(self) -> str | None:
        """The article."""
        return self.article

    def where(self) -> str:
        """The condition."""
        return self.condition

    def generation(self) -> tuple[str, Sequence[str]] | None:
        """The text."""
        return None if self.flag else (self.text, self.wanted)

    def example(self) -> Example | None:
        """With the closed-book answer beside the question."""
        if self.flag:
            return None
        return Example(f"{self.question} [without documents: {self.own}]", self.wanted[0], self.text, self.hit)


def judged(sample: Sample, text: str, flag: str = "") -> RagRow:
    """The row of an answer, or of none where a flag says why."""
    has = holds(text, sample.wanted)
    reads = sample.condition in ("context", "conflict", "mixed")
    return RagRow(
        id=sample.id,
        article=sample.article,
        condition=sample.condition,
        question=sample.question,
        wanted=sample.wanted,
        own=sample.own,
        known=sample.known,
        text=text,
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


def _of(*conditions: str, known: bool = False) -> Callable[[RagRow], str | None]:
    return lambda r: "" if r.condition in conditions and not r.flag and (r.known or not known) else None


def _had_own(row: RagRow) -> str | None:
    return "" if row.condition == "irrelevant" and not row.flag and normalise(row.own) else None


def _hit(row: RagRow) -> bool:
    return row.hit


def _exact(row: RagRow) -> bool:
    return row.exact


def _kept(row: RagRow) -> bool:
    return row.kept


AD, RO = "Adherence: follows its documents", "Robustness: only where they help"
FOLLOWED = "conflict items answered from the document and not from memory (adherence)"
HELD = "irrelevant items still right, of those right without documents (robustness)"
RIGHT = "has the document's answer, or the true one where it has none"
METRICS = {
    "R_Ad": Measure(FOLLOWED, _hit, _of("conflict"), AD, headline=True),
    "R_Ad/known": Measure("of these, those that memory has right", _hit, _of("conflict", known=True), AD),
    "R_Ad/mixed": Measure("the same among noise", _hit, _of("mixed"), AD),
    "R_Ro": Measure(HELD, _hit, _of("irrelevant", known=True), RO, headline=True),
    "R_Ro/empty": Measure("the same without a document", _hit, _of("empty", known=True), RO),
    "kept": Measure("irrelevant items with the model's own answer, right or wrong", _kept, _had_own, RO),
    **{f"accuracy/{name}": Measure(f"{RIGHT}; {what}", _hit, _of(name), "Accuracy", headline=True)
       for name, what in CONDITIONS.items()},
    **{f"exact/{name}": Measure(f"is a wanted answer, normalised; {what}", _exact, _of(name), "Exact answers")
       for name, what in CONDITIONS.items()},
}  # fmt: skip
PLOTS = (Scatter("Robustness against adherence", "R_Ad", "R_Ro"),)
