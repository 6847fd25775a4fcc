"""The gate before a patch is given away: what the facts bench and its probe pack found, held against limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...data.edits import Ask, Edit, read_edits
from ...errors import BadInput
from ...inference.plain_text import TEXT
from ...patches.guard import LIMIT
from ..core.contract import BASE
from ..core.report import Report
from ..core.stats import Number
from .cases import with_unrelated


@dataclass(frozen=True)
class Config:
    """Limits of the gate, and how much is asked. Shares in 0..1; a limit of none is not held, its number is shown."""

    cases: int = 50
    """Facts that are asked, chosen by the seed where there are more."""
    seed: int = 0
    """Which facts those are."""
    max_new_tokens: int = 32
    """Length of a short answer at most."""
    batch_size: int = 64
    """Texts in one forward."""
    efficacy: float | None = 0.9
    """At least: answers to the facts' own prompts that begin with the new answer."""
    paraphrase: float | None = 0.6
    """At least: the same in other words."""
    repeats: float | None = 0.25
    """At most: answers that say the new answer twice or more."""
    distinct_2: float | None = 0.9
    """At least: distinct word pairs of an answer."""
    neighbours: float | None = 0.7
    """At least: answers about other things that stay as they were, to the last word; each kind by itself."""
    perplexity: float | None = LIMIT
    """At most: perplexity of plain text with the patch, over that without."""
    negation: float | None = 0.5
    """At least: prompts that ask what is not so, and whose answer does not state the new fact."""
    old_mentioned: float | None = 0.5
    """At least: the new answer, although the old fact stands before the question."""
    true_false: float | None = 0.5
    """At least: statements rightly called true or false; always one word scores 0.5."""
    reversal: float | None = 0.5
    """At least: the subject is likelier behind the new object than behind another."""
    composition: float | None = None
    """At least: the facts' own questions that take a further step."""
    long_states: float | None = 0.6
    """At least: long answers that state the new fact."""
    long_repeats: float | None = None
    """At most: long answers that say it twice or more."""
    long_distinct_2: float | None = 0.15
    """At most: how far the distinct word pairs of long answers are below the unpatched model's."""


Side = Literal["at least", "at most", "at most below"]
CHECKS: Mapping[str, tuple[str, Side]] = {
    "efficacy": ("reliability", "at least"),
    "paraphrase": ("generality", "at least"),
    "repeats": ("repeats", "at most"),
    "distinct_2": ("distinct_2", "at least"),
    "neighbours": ("loc_unchanged/", "at least"),
    "perplexity": ("", "at most"),
    "negation": ("negation", "at least"),
    "old_mentioned": ("old_mentioned", "at least"),
    "true_false": ("true_false", "at least"),
    "reversal": ("reversal", "at least"),
    "composition": ("composition", "at least"),
    "long_states": ("long_states", "at least"),
    "long_repeats": ("long_repeats", "at most"),
    "long_distinct_2": ("long_distinct_2", "at most below"),
}
"""Limit → the bench's number, a family where it ends in a stroke; on which side of the limit it must be."""
UNASKED = "the facts allow no such question"


@dataclass(frozen=True)
class Line:
    """One number against its limit."""

    check: str
    value: float | None
    """None: nothing was asked."""
    unpatched: float | None
    fact_in_prompt: float | None
    limit: float | None
    side: Side
    n: int
    """Facts, of perplexity texts."""
    passed: bool | None
    """None: there is no limit, or nothing was asked."""

    @property
    def wanted(self) -> str:
        """The limit as text."""
        if self.limit is None:
            return "none"
        return f"{self.side.removesuffix(' below')} {self.limit:g}" + " below unpatched" * self.side.endswith("below")


@dataclass(frozen=True)
class Verdict:
    """What a check found."""

    lines: tuple[Line, ...]
    report: Report
    """Everything that was asked, as the facts bench reports it."""

    @property
    def passed(self) -> bool:
        """No limit is missed."""
        return not self.missed

    @property
    def missed(self) -> tuple[str, ...]:
        """The checks that failed."""
        return tuple(line.check for line in self.lines if line.passed is False)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return "passed" if self.passed else f"failed: {', '.join(self.missed)}"


def facts_of(edits: Sequence[Mapping[str, Any]]) -> list[Edit]:
    """The facts a patch says it holds.

    Raises:
        BadInput: it holds none, or records of another kind.
    """
    if not edits or not all({"prompt", "target"} <= edit.keys() for edit in edits):
        raise BadInput("this patch holds no facts of its own. Give a file of facts to ask it.")
    groups = ("locality", "portability")
    return read_edits([{k: dict(v) if k in groups else v for k, v in edit.items()} for edit in edits])


def with_neighbours(edits: Sequence[Edit]) -> list[Edit]:
    """The facts; where none names a question that must stay as it is, each with the beginning of an everyday text."""
    if any(edit.locality for edit in edits):
        return list(edits)
    return with_unrelated(edits, [Ask(start) for start, _ in TEXT])


def settings(limits: Config) -> dict[str, Any]:
    """Those of the facts bench."""
    asked = {"sample": limits.cases, "pack": limits.cases, "per_kind": 3, "bootstrap": 0}
    asked |= {name: getattr(limits, name) for name in ("seed", "max_new_tokens", "batch_size")}
    return asked | {"teacher_forced": False, "distractor": False, "latency": False}


def judge(report: Report, limits: Config) -> Verdict:
    """The numbers of the report's one patched run against the limits."""
    (run,) = (run for run in report.runs if not run.record["baseline"])
    found = {each.name: each.metrics() for each in report.runs}
    names = [name for name in found[run.name] if "@" not in name]
    lines: list[Line] = []
    for check, (metric, side) in CHECKS.items():
        limit = getattr(limits, check)
        if check == "perplexity":
            lines.append(_perplexity(run.record.get("health") or {}, limit))
            continue
        family = [name for name in names if metric.endswith("/") and name.startswith(metric)]
        for name in family or [metric]:
            label = f"{check}/{name.removeprefix(metric)}" if family else check
            rivals = (found.get(key, {}).get(name) for key in (run.name, BASE, "fact_in_prompt"))
            lines.append(_line(label, limit, side, *rivals))
    return Verdict(tuple(lines), report)


def _line(
    check: str, limit: float | None, side: Side, own: Number | None, base: Number | None, told: Number | None
) -> Line:
    value, before, text = (number.value if number else None for number in (own, base, told))
    return Line(check, value, before, text, limit, side, own.n if own else 0, _holds(value, before, limit, side))


def _holds(value: float | None, before: float | None, limit: float | None, side: Side) -> bool | None:
    """A number that is none misses every limit."""
    if value is None or limit is None:
        return None
    if side == "at least":
        return value >= limit
    return value <= limit if side == "at most" else value >= (before or 0.0) - limit


def _perplexity(health: Mapping[str, Any], limit: float | None) -> Line:
    after, before = health.get("perplexity_max"), health.get("base_perplexity")
    ratio = after / before if after is not None and before else None
    passed = _holds(ratio, None, limit, "at most")
    return Line("perplexity", ratio, 1.0 if before else None, None, limit, "at most", len(TEXT), passed)


def shown(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    """The lines as a table: verdict, check, value, limit, unpatched, fact in the prompt, n."""
    words = {True: "pass", False: "FAIL", None: "-"}
    for line in lines:
        numbers = ("-" if x is None else f"{x:.2f}" for x in (line.value, line.unpatched, line.fact_in_prompt))
        value, before, text = numbers
        why = value if line.n or line.value is not None else UNASKED
        yield words[line.passed], line.check, why, line.wanted, before, text, str(line.n)
