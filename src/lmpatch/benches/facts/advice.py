"""What a comparison of editors says: its tables, and in plain words which one to take and why not the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean
from typing import Any, NamedTuple

from ...resources import format_bytes
from ..core.contract import Json
from ..core.report import Report, Run
from ..core.stats import Number
from ..core.tables import CLEAR, ENOUGH, NONE, show

PROMPT = "fact_in_prompt"
ANSWER = 16
"""Tokens of the answer whose time is told."""
FASTER = 2.0
"""Times less seconds an edit, from which one of two equal editors is called faster."""
JUDGED = ("reliability", "generality")
KEPT = "loc_unchanged/"
WORDS = {"reliability": "the fact itself", "generality": "the fact in other words"}
ANSWERS = {
    "reliability": "states it", "generality": "in other words", "portability/": "follows: {}",
    KEPT: "{} unchanged", "loc_kl/": "{} KL", "repeats": "twice", "long_states": "long answer",
}  # fmt: skip
FORCED = {"tf_reliability": "reliability", "tf_generality": "generality", "tf_locality/": "locality: {}"}
"""Number of the facts bench, a family where it ends in a stroke -> the head of its column."""
COSTS = ("editor", "perplexity", "s an edit", "s an answer", "patch", "statistics, s", "training, s")
TITLES = {
    "answers": "Answers as they are generated: shares in %, KL in nats",
    "forced": "Teacher-forced, as in older papers, %",
    "costs": "Costs",
}


class Table(NamedTuple):
    """One table as texts."""

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Comparison:
    """Editors side by side on the same facts."""

    report: Report
    """Everything that was asked, as the facts bench reports it."""
    left_out: Mapping[str, str]
    """Method -> why it is not among them."""

    @property
    def editors(self) -> list[Run]:
        """The runs with a patch, the best first."""
        runs = [run for run in self.report.runs if not run.record["baseline"]]
        return sorted(runs, key=lambda run: -score(run))

    @property
    def asked(self) -> int:
        """Facts that were asked."""
        return max(
            (run.metrics()["reliability"].n for run in self.editors if "reliability" in run.metrics()), default=0
        )

    def tables(self) -> list[Table]:
        """Answers, teacher-forced numbers and costs; the unpatched model and the fact in the prompt come first."""
        runs = [*(run for run in self.report.runs if run.record["baseline"]), *self.editors]
        parts = [_numbers("answers", runs, ANSWERS), _numbers("forced", runs, FORCED)]
        rows = tuple((run.title, *_costs(run)) for run in self.editors)
        return [*(part for part in parts if len(part.columns) > 1), Table("costs", TITLES["costs"], COSTS, rows)]

    def advice(self) -> list[str]:
        """Which editor to take, and why not each of the others."""
        best, *others = self.editors
        behind = {run.name: self.behind(run, best) for run in others}
        level = [run for run in others if not behind[run.name]]
        few = f"Only {self.asked} facts were asked: differences mean little below {ENOUGH}."
        lines = [few] if self.asked < ENOUGH else []
        works = best.metrics()[JUDGED[0]].value > 0 if JUDGED[0] in best.metrics() else False
        lines.append(f"{f'Take {best.name}' if works else 'Take none'}: {_praise(best)}.")
        if level and self.asked >= ENOUGH:
            lines.append(f"Not clearly behind it: {', '.join(run.name for run in level)}.{_faster(best, level)}")
        prompts = [run for run in self.report.runs if run.name == PROMPT and self.asked >= ENOUGH]
        if any(not self.behind(run, best) for run in prompts):
            lines.append(
                "The fact before the question does no worse: where you write the prompt yourself, edit nothing."
            )
        for run in others:
            if lost := behind[run.name]:
                lines.append(f"{run.name} is behind in {'; '.join(lost)}.")
        return [*lines, *(f"{name} is not compared: {why}" for name, why in self.left_out.items())]

    def behind(self, run: Run, best: Run) -> list[str]:
        """Where a run is clearly worse than the best, the largest difference first."""
        names = [name for name in best.metrics() if name in JUDGED or (name.startswith(KEPT) and "@" not in name)]
        lost: list[tuple[float, str]] = []
        for name in names:
            gap = self.report.difference(best.name, name, run.name) if name in run.metrics() else None
            if gap and gap.n >= ENOUGH and gap.value > 0 and gap.value >= CLEAR * (gap.error or 0.0):
                error = f" ± {100 * gap.error:.0f}" if gap.error else ""
                lost.append((gap.value, f"{plainly(name)} by {100 * gap.value:.0f}{error} points"))
        return [text for _, text in sorted(lost, reverse=True)]

    def summary(self) -> Json:
        """Tables and advice as values: of each run its numbers with error and n, and its costs."""
        runs = [
            {"name": run.name, "baseline": run.record["baseline"], "metrics": _values(run), "costs": costs(run)}
            for run in self.report.runs
        ]
        return {"facts": self.asked, "advice": self.advice(), "left_out": dict(self.left_out), "runs": runs}

    def __repr__(self) -> str:
        return f"Comparison({', '.join(run.name for run in self.editors)}; {' '.join(self.advice()[:2])})"


def score(run: Run) -> float:
    """By what editors are ordered: the harmonic mean of efficacy, paraphrase and the answers that stay as they were,
    of the kind of question that suffers most. A number that was not asked is left out."""
    found = run.metrics()
    parts = [found[name].value for name in JUDGED if name in found]
    return harmonic_mean([*parts, *([kept.value] if (kept := worst(run)) else [])] or [0.0])


def worst(run: Run) -> Number | None:
    """Of the kinds of questions that must stay as they are, the one that does so least."""
    kinds = [number for name, number in run.metrics().items() if name.startswith(KEPT) and "@" not in name]
    return min(kinds, key=lambda number: number.value, default=None)


def plainly(name: str) -> str:
    """A number in words: what is better or worse."""
    return WORDS.get(name, f"leaving {name.removeprefix(KEPT).replace('_', ' ')} as it was")


def costs(run: Run) -> Json:
    """Perplexity as a multiple of the unpatched model's; seconds an edit, an answer, of preparation; bytes."""
    record = run.record
    health, speed, prep = (record.get(name) or {} for name in ("health", "infer_ms", "prep"))
    before, after = health.get("base_perplexity"), health.get("perplexity_max")
    patched = speed.get("patched")
    return {
        "perplexity": after / before if before and after is not None else None,
        "edit_s": (record.get("edit_s") or {}).get("median"),
        "answer_s": (patched["prefill_b1"] + (ANSWER - 1) * patched["token_b1"]) / 1000 if patched else None,
        "bytes": record.get("bytes"),
        "statistics_s": prep.get("statistics_s"),
        "training_s": prep.get("training_s"),
    }


def _costs(run: Run) -> Iterator[str]:
    found = costs(run)
    yield NONE if found["perplexity"] is None else f"{found['perplexity']:.2f} ×"
    for name in ("edit_s", "answer_s"):
        yield NONE if found[name] is None else f"{found[name]:.3g}"
    yield NONE if found["bytes"] is None else format_bytes(found["bytes"])
    for name in ("statistics_s", "training_s"):
        yield NONE if found[name] is None else f"{found[name]:.3g}"


def _values(run: Run) -> Json:
    names = {name: head for heads in (ANSWERS, FORCED) for name, head in heads.items()}
    return {
        name: {"value": number.value, "error": number.error, "n": number.n}
        for name, number in run.metrics().items()
        if _family(name) in names
    }


def _family(name: str) -> str:
    head, stroke, _ = name.partition("/")
    return "" if "@" in name else head + stroke


def _numbers(key: str, runs: Sequence[Run], heads: Mapping[str, str]) -> Table:
    """A column for each number that some run has, in the order of the heads."""
    there = list(dict.fromkeys(name for run in runs for name in run.metrics()))
    names = [name for head in heads for name in there if _family(name) == head]
    columns = [heads[_family(name)].format(name.partition("/")[2].replace("_", " ")) for name in names]
    rows = tuple((run.title, *(_cell(run, name) for name in names)) for run in runs)
    return Table(key, TITLES[key], ("editor", *columns), rows)


def _cell(run: Run, name: str) -> str:
    number = run.metrics().get(name)
    if number is None:
        return NONE
    if run.measure(name).unit == "nats":
        return f"{number.value:.2f}" + (f" ±{number.error:.2f}" if number.error else "")
    return show(run.measure(name), number.value, number.error)


def _praise(run: Run) -> str:
    found, kept = run.metrics(), worst(run)
    shares = [f"{100 * found[name].value:.0f} %" for name in JUDGED if name in found]
    told = f"{run.name} states {shares[0]} of the facts" if shares else f"{run.name} was asked no fact"
    told += f", in other words {shares[1]}" if len(shares) > 1 else ""
    rest = f"; where it moves most, {100 * kept.value:.0f} % of the answers stay as they were" if kept else ""
    return told + rest


def _faster(best: Run, level: Sequence[Run]) -> str:
    """A sentence on the one that writes much faster than the best, if one does."""
    times: list[tuple[Any, str]] = [(costs(run)["edit_s"], run.name) for run in level]
    own, (least, name) = costs(best)["edit_s"], min((t for t in times if t[0] is not None), default=(None, ""))
    if own is None or least is None or least * FASTER > own:
        return ""
    return f" {name} writes a fact in {least:.2g} s, {best.name} in {own:.2g} s."
