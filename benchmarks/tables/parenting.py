"""Parenting beside plain fine-tuning, tuning on form alone, few-shot prompts, CAD and IRCAN: five seeds, same items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from statistics import fmean, stdev
from typing import Any

from .rows import RESULTS, Row, read, summary
from .stats import NORMAL, Mean, percent, points, table

MODELS = ("gemma-3-270m", "smollm2-135m-instruct")
TUNED = {
    "format_only": "tuned on form alone", "plain": "plain fine-tuning", "mixed": "one mix of three losses",
    "parenting": "**`parenting`**",
}  # fmt: skip
SUM = ("R_Ad", "R_Ro")
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Standard errors in half a 95 % interval over so many seeds."""
NOTHING = "Not measured yet in this form: `benchmarks/parenting.py` makes the rows."
Values = dict[str, float]


def counts(row: Row, metric: str) -> bool:
    """Whether the row is one of a metric's items."""
    if row.get("flag"):
        return False
    if metric == "R_Ro":
        return row["condition"] == "irrelevant" and bool(row.get("known"))
    return bool(row["condition"] == "conflict")


@dataclass(frozen=True)
class Runs:
    """The rows of one model's runs."""

    rows: Mapping[str, Sequence[Row]]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Runs:
        """By run."""
        made: dict[str, list[Row]] = {}
        for row in rows:
            made.setdefault(row["run_id"], []).append(row)
        return cls(made)

    def seeds(self, name: str) -> list[str]:
        """The runs of a method: one a seed, or one alone."""
        found = [run for run in self.rows if run == name or run.rpartition("-")[0] == name]
        return sorted(found)

    def values(self, run: str, metric: str, field: str = "hit") -> Values:
        """Item → what its answer is worth."""
        return {row["id"]: float(row[field]) for row in self.rows[run] if counts(row, metric)}

    def level(self, name: str, metrics: Sequence[str] = SUM, field: str = "hit") -> Mean:
        """The sum of the metrics, over items and seeds."""
        return self._mean([[self.values(run, m, field) for m in metrics] for run in self.seeds(name)])

    def moved(self, name: str, to: str, metrics: Sequence[str] = SUM) -> Mean:
        """Minus another method, item by item and seed by seed; one without seeds is set against each."""
        own, other = self.seeds(name), self.seeds(to)
        pairs = (
            zip(own * len(other), other, strict=False) if len(own) == 1 else zip(own, other * len(own), strict=False)
        )
        terms = []
        for one, two in pairs:
            both = [(self.values(one, m), self.values(two, m)) for m in metrics]
            terms.append([{id: a[id] - b[id] for id in a if id in b} for a, b in both])
        return self._mean(terms)

    def spread(self, name: str) -> float | None:
        """Standard deviation of the sum over seeds; None for one alone."""
        return deviation([sum(map(_middle, terms)) for terms in self._terms(name)])

    def _terms(self, name: str) -> list[list[Values]]:
        return [[self.values(run, m) for m in SUM] for run in self.seeds(name)]

    def _mean(self, terms: Sequence[Sequence[Values]]) -> Mean:
        """Half of the interval holds both: which articles were asked, and which seeds were drawn."""
        each = [sum(map(_middle, own)) for own in terms]
        over = [{id: sum(own[k][id] for own in terms) / len(terms) for id in terms[0][k]} for k in range(len(terms[0]))]
        spread, n = deviation(each), len(each)
        seeds = 0.0 if spread is None else STUDENT.get(n, NORMAL) * spread / sqrt(n)
        half = hypot(NORMAL * clustered(over, self._articles), seeds)
        return Mean(sum(each) / n, half, sum(map(len, over)))

    @property
    def _articles(self) -> dict[str, str]:
        return {row["id"]: row["article"] for rows in self.rows.values() for row in rows}


def _middle(values: Values) -> float:
    return fmean(values.values())


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for fewer than two."""
    return stdev(values) if len(values) > 1 else None


def clustered(terms: Sequence[Values], articles: Mapping[str, str]) -> float:
    """Standard error of a sum of means if only articles are independent (Liang and Zeger 1986)."""
    totals: dict[str, float] = {}
    for term in terms:
        middle = _middle(term)
        for id, value in term.items():
            totals[articles[id]] = totals.get(articles[id], 0.0) + (value - middle) / len(term)
    g = len(totals)
    return sqrt(g / (g - 1) * sum(x**2 for x in totals.values())) if g > 1 else 0.0


def verdict(runs: Runs, model: str) -> str:
    """One sentence: better, worse or a tie, and by how much."""
    found, n = runs.moved("parenting", "plain"), len(runs.seeds("parenting"))
    word = "ties" if abs(found.value) <= found.half else "is better than" if found.value > 0 else "is worse than"
    return f"On {model}, Parenting {word} plain fine-tuning: R_Ad + R_Ro {points(found)} points, {n} seeds."


def form(runs: Runs) -> str:
    """How much of what plain tuning gains is the form of an answer, and what a prompt gains."""
    base = {name: runs.moved(name, "none").value for name in ("plain", "format_only", shots(runs))}
    plain, tuned, shown = (100 * value for value in base.values())
    return (
        f"Against the unpatched model, plain fine-tuning gains {plain:.0f} points of R_Ad + R_Ro, tuning on form alone "
        f"{tuned:.0f}, and a few-shot prompt without any tuning {shown:.0f}."
    )


def shots(runs: Runs) -> str:
    """The run of the few-shot prompt."""
    return next(run for run in runs.rows if run.endswith(" shots"))


def lines(runs: Runs, dev: Mapping[str, Any]) -> list[list[str]]:
    """A table line per method."""
    few = shots(runs)
    count = few.split()[1]
    named = {"none": "unpatched", few: f"unpatched, {count} examples", "cad": f"`cad`, {count} examples"}
    named |= {"ircan": f"`ircan`, {count} examples"} | TUNED
    made = []
    for name, label in named.items():
        if not runs.seeds(name):
            continue
        spread = runs.spread(name)
        made.append(
            [
                label,
                settings(dev["methods"].get("none" if name == few else name)) if name != "none" else "",
                percent(runs.level(name, ["R_Ad"])),
                percent(runs.level(name, ["R_Ro"])),
                f"{100 * runs.level(name).value:.1f}",
                "" if spread is None else f"{100 * spread:.1f}",
                percent(runs.level(name, ["R_Ad"], "exact")),
                "" if name == "plain" else points(runs.moved(name, "plain")),
            ]
        )
    return made


def settings(found: Mapping[str, Any] | None) -> str:
    """What was chosen, out of how many; one at the edge of what was tried says so."""
    if found is None:
        return ""
    said = ", ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                     for key, value in found["chosen"].items())  # fmt: skip
    return f"{said} (of {len(found['tried'])}{'' if found['inside'] else ', at the edge'})"


HEAD = (
    "method", "chosen on dev", "follows a contradicting document (R_Ad)", "keeps a right answer (R_Ro)", "sum",
    "spread of the sum over seeds", "is exactly the answer", "sum minus plain fine-tuning, points",
)  # fmt: skip


def of_model(model: str, made: Callable[[Runs], str]) -> str:
    """What the rows of this model give; a line that says so where there are none."""
    folder = f"parenting-{model}"
    if not (RESULTS / folder / "rows.jsonl.gz").exists():
        return NOTHING
    runs = Runs.of(read(folder))
    return made(runs) if all(map(runs.seeds, TUNED)) else NOTHING


def parenting_table(model: str) -> str:
    """All methods on one model."""

    def made(runs: Runs) -> str:
        dev = summary(f"parenting-{model}/dev.json")
        items = [len(runs.values("none", metric)) for metric in SUM]
        told = (
            f"{items[0]} items with a contradicting document and {items[1]} with an irrelevant one, whose answer the "
            f"model knows. Settings were chosen by the sum on {dev['dev_n']} dev items of each kind. Tuning took "
            f"{dev['steps']} steps. ± is half of a 95 % interval, over articles and seeds together. Differences are "
            "taken item by item and seed by seed."
        )
        return "\n\n".join([verdict(runs, model), table(HEAD, lines(runs, dev)), form(runs), told])

    return of_model(model, made)


def parenting_verdict() -> str:
    """The sentence of each model that was measured."""
    said = [of_model(model, lambda runs, model=model: verdict(runs, model)) for model in MODELS]  # type: ignore[misc]
    return "\n".join(dict.fromkeys(f"- {line}" for line in said)) if any(s != NOTHING for s in said) else NOTHING
