"""Rows of the context benches and the numbers made of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..core.contract import Example, Measure, Row, Scatter

When = Literal["context", "foreign", "bare"]
"""What the model read before the question: its own context, another record's, or none."""


@dataclass(frozen=True, kw_only=True)
class ContextRow(Row):
    """One record, asked once."""

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

    def key(self) -> Hashable:
        """Place and context."""
        return self.place, self.when

    def unit(self) -> Hashable:
        """The record."""
        return self.place

    def where(self) -> str:
        """Which context was read."""
        return {"context": "with its context", "foreign": "with another's context", "bare": "without context"}[
            self.when
        ]

    def generation(self) -> tuple[str, Sequence[str]] | None:
        """The text; nothing where a letter was chosen."""
        if self.said is None or self.scores:
            return None
        return self.said, [text for text in (self.answer, self.memory) if text] if self.when == "context" else []

    def example(self) -> Example | None:
        """With its own context: what that says and what memory does."""
        if self.said is None or self.when != "context":
            return None
        wanted = f"{self.answer}, not {self.memory}" if self.memory else self.answer
        return Example(self.id or str(self.place), wanted, self.said, self.said == self.answer)


Counts = Callable[[ContextRow], bool]


def _own(counts: Counts = lambda row: True) -> Callable[[ContextRow], str | None]:
    return lambda row: "" if row.when == "context" and (row.said is None or counts(row)) else None


def _other(when: When, counts: Counts = lambda row: True) -> Callable[[ContextRow], str | None]:
    return lambda row: "" if row.when == when and (row.said is None or row.kept is None or counts(row)) else None


def _known(row: ContextRow) -> bool:
    return bool(row.memory) and row.closed == row.memory


def _acc(row: ContextRow) -> float | None:
    return float(row.said == row.answer) if row.said is not None else None


def _stubborn(row: ContextRow) -> float | None:
    return float(row.said == row.memory) if row.said is not None else None


def _rest(row: ContextRow) -> float | None:
    return float(row.said not in (row.answer, row.memory)) if row.said is not None else None


def _adherence(row: ContextRow) -> float | None:
    return _acc(row) if row.closed is not None else None


def _kept(row: ContextRow) -> float | None:
    return None if row.said is None or row.kept is None else float(row.kept)


def _chance(row: ContextRow) -> float | None:
    return 1 / len(row.scores) if row.scores else None


OWN, OTHER = "With its context", "With another's context, or none"
CONFLICT = "acc over the records in conflict: without a context the unpatched model answers otherwise"
SR = "answers as memory says (stubbornness rate); over the records that name such an answer"
ROBUST = "with another record's context, the unpatched model's answer without any"
BCU = "the middle of acc and robustness, record by record (balance of context use)"
METRICS = {
    "acc": Measure("answers as the context says (faithfulness)", _acc, _own(), OWN, headline=True, chance=_chance),
    "sr": Measure(SR, _stubborn, _own(lambda r: bool(r.memory)), OWN, better="less", headline=True),
    "rest": Measure("neither of them", _rest, _own(), OWN, better=""),
    "adherence": Measure(CONFLICT, _adherence, _own(lambda r: r.closed is None or r.closed != r.answer), OWN),
    "robustness": Measure(ROBUST, _kept, _other("foreign"), OTHER, headline=True),
    "known_kept": Measure(
        "robustness over the records the unpatched model knows", _kept, _other("foreign", _known), OTHER
    ),
    "closed_kept": Measure("without a context, the unpatched model's answer", _kept, _other("bare"), OTHER),
    "bcu": Measure(BCU, group=OTHER, derived=("mean", "acc", "robustness"), headline=True),
}
PLOTS = (Scatter("Faithfulness and robustness", "acc", "robustness"),)
