"""What a bench is made of: its settings, its rows, its numbers and its plots, as values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Json = dict[str, Any]
BASE = "none"
"""The run of the unpatched model."""


@dataclass(frozen=True)
class Settings:
    """What the settings of every bench have."""

    seed: int = 0
    """Which records are chosen, their order, and the resamples."""
    batch_size: int = 64
    """Texts in one forward."""
    bootstrap: int = 1000
    """Resamples behind each interval; 0: none."""


class Example(NamedTuple):
    """One question and its answer, for people to read."""

    prompt: str
    wanted: str
    answer: str
    right: bool | None = None
    moved: float | None = None
    """How far from the unpatched model; those that moved most are shown first."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question, asked once of one model. Benches derive their own; rows are the truth, numbers are recomputed."""

    run_id: str = ""
    """The run; ``core`` fills it in."""
    chunk: int = 0
    """What was finished or not as a whole; ``core`` fills it in."""
    flag: str = ""
    """Why it was not asked, or what was done differently."""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Any:
        """A row from its JSON form."""
        values: Json = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
        return cls(**values)

    def key(self) -> Hashable:
        """The question; the same in every run."""
        raise NotImplementedError

    def unit(self) -> Hashable:
        """Rows of one unit are averaged before units are."""
        return self.key()

    def cluster(self) -> str | None:
        """Units of one cluster are not independent; None: all are."""
        return None

    def size(self) -> int:
        """How much the row weighs in a mean."""
        return 1

    def where(self) -> str:
        """Which kind of question it is, where a bench asks several."""
        return ""

    def generation(self) -> tuple[str, Sequence[str]] | None:
        """Generated text and what is wanted in it; None where nothing was generated."""
        return None

    def example(self) -> Example | None:
        """What a person would read; None: nothing."""
        return None


@dataclass(frozen=True, kw_only=True)
class Answer(Row):
    """A row that will do for a bench that asks and compares texts."""

    id: str
    prompt: str
    wanted: tuple[str, ...]
    text: str | None = None
    """The answer; None: not asked."""
    hit: bool | None = None
    """It is right."""
    kind: str = ""
    """Examples are taken from each kind."""

    def key(self) -> Hashable:
        """Kind and id."""
        return self.kind, self.id

    def where(self) -> str:
        """The kind."""
        return self.kind

    def generation(self) -> tuple[str, Sequence[str]] | None:
        """The text."""
        return None if self.text is None else (self.text, self.wanted)

    def example(self) -> Example | None:
        """The whole row."""
        return None if self.text is None else Example(self.prompt, " / ".join(self.wanted), self.text, self.hit)


@dataclass(frozen=True)
class Measure:
    """One number of a bench, or a family of them. In ``METRICS`` it stands under its name, a split of it under
    ``name@split``."""

    means: str
    """What it says, in words that need no paper."""
    value: Callable[[Any], float | bool | None] = lambda row: None
    """What a row is worth; None: it has no value, and is counted as dropped."""
    of: Callable[[Any], str | None] = lambda row: ""
    """"": the row belongs to it. ``x``: to ``name/x``. None: to neither."""
    group: str = ""
    """Heading in the table."""
    unit: Literal["%", "nats", ""] = "%"
    better: Literal["more", "less", ""] = "more"
    headline: bool = False
    """One of the few that a run is remembered by."""
    beside: bool = False
    """It stands beside those few: how their answers repeat themselves."""
    shown: bool = True
    """It stands in the table; else only in ``to_json`` and ``to_pandas``."""
    chance: Callable[[Any], float | None] | None = None
    """What guessing scores on a row."""
    percentile: float | None = None
    """This percentile over rows, not the mean over units."""
    derived: tuple[Literal["mean", "minus"], str, str] | None = None
    """Made of two others, unit by unit, in place of ``value``."""
    protocol: Callable[[Json], str] = lambda record: ""
    """How it is asked, as an id; of a run's record."""


@dataclass(frozen=True)
class Scatter:
    """Two numbers of each run against each other; where they are families, one plot each member of the second."""

    title: str
    x: str
    y: str


@dataclass(frozen=True)
class Curve:
    """A line for each run."""

    title: str
    x: str
    y: str
    points: Callable[[Sequence[Any]], Sequence[tuple[str, float]]]
    """(label, share) of a run's rows, in order."""
    labels: tuple[str, ...]
    """All labels there can be, in order."""


Plot = Scatter | Curve
