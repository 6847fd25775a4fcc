"""Rows of the general bench and the numbers made of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

from ..core.contract import Example, Measure, Row

Form = Literal["letters", "cloze", "answer", "text"]
ACCURACY = ("letters", "cloze")
"""Forms whose value is right or wrong."""


@dataclass(frozen=True, kw_only=True)
class TaskRow(Row):
    """One record under one protocol, scored on one model."""

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

    def key(self) -> Hashable:
        """Task, protocol and record."""
        return self.task, self.protocol, self.id

    def size(self) -> int:
        """Tokens of a text."""
        return self.weight

    def where(self) -> str:
        """Task and protocol."""
        return f"{self.task}, {self.protocol}"

    def example(self) -> Example | None:
        """Which option was chosen; the texts stand in the task's file."""
        if self.value is None or self.form not in ACCURACY:
            return None
        best = max(range(len(self.scores)), key=self.scores.__getitem__)
        return Example(self.source, f"option {self.gold + 1}", f"option {best + 1}", bool(self.value))


def _of(form: Form) -> Callable[[TaskRow], str | None]:
    return lambda row: row.task if row.form == form else None


def _chance(row: TaskRow) -> float | None:
    return 1 / len(row.scores) if row.scores else None


def _value(row: TaskRow) -> float | None:
    return row.value


LETTERS, CLOZE, TEXT = "recipe-general-v1", "cloze-v1", "perplexity-v1"
PROTOCOLS = (LETTERS, CLOZE, TEXT)
MARKED, LIKELY, HELD_OUT = (
    f"Letters of options [{LETTERS}]",
    f"Likelihood of texts [{CLOZE}]",
    f"Held-out text [{TEXT}]",
)
LETTER = "zero-shot: the options stand in the prompt; the one whose letter (anli: word) has the highest logit is right"
OPTION = "zero-shot: the option whose own text is likeliest behind the question, per token, is right"
NATS = "mean negative log probability per token of windows of 256 words, nats"
METRICS = {
    "letters": Measure(LETTER, _value, _of("letters"), MARKED, headline=True, chance=_chance),
    "answer": Measure("mean of 1/perplexity of the gold answer", _value, _of("answer"), MARKED, headline=True),
    "cloze": Measure(OPTION, _value, _of("cloze"), LIKELY, headline=True, chance=_chance),
    "nats": Measure(NATS, _value, _of("text"), HELD_OUT, unit="nats", better="less", headline=True),
}
