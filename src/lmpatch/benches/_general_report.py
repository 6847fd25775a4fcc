"""The report of the general bench: patched models beside the unpatched one, as tables and one HTML page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from . import _runs
from ._general_rows import MEASURES, Comparison, Mean, Row, compare
from ._general_tasks import CLOZE, LETTERS, PROTOCOLS, TEXT
from ._grid import NONE, Cell, Grid, trimmed
from ._page import cards, heading, plots, table
from ._runs import BASE
from ._svg import bars

NOTES = {
    LETTERS: "Zero-shot, %. The options stand in the prompt; the answer is the one whose letter (anli: word) has the "
    "highest logit. squad is the mean of 1/perplexity of the gold answer.",
    CLOZE: "Zero-shot, %. The answer is the option whose own text is likeliest behind the question, per token.",
    TEXT: "Held-out text in windows of 256 words: mean negative log probability per token, nats, and the perplexity. "
    "Less is better.",
}
GUESSING = "Guessing is what chance scores: a task there says nothing."
ERRORS = "± and s.e. are standard errors over records, that of the difference over the records' own differences."


class Run(_runs.Run[Row]):
    """One model on all records: the unpatched one, or one patch."""


class Report(_runs.Report[Run, Row]):
    """Runs on the same records, the unpatched model first."""

    kinds = Run, Row

    def comparisons(self, name: str) -> list[Comparison]:
        """Every task under every protocol: that run against the unpatched model, record by record."""
        base = self.run(BASE).rows
        return compare(base) if name == BASE else compare(base, self.run(name).rows)

    def comparison(self, name: str, task: str, protocol: str) -> Comparison | None:
        """One of them; None if it was not asked."""
        found = (c for c in self.comparisons(name) if (c.task, c.protocol) == (task, protocol))
        return next(found, None)

    def _grids(self) -> list[Grid]:
        shown = self.runs[1:] or self.runs  # the patched ones; the unpatched one where it is alone
        found = [(run, self.comparisons(run.name)) for run in shown]
        grids = [_grid(protocol, found) for protocol in PROTOCOLS]
        return [grid for grid in (*grids, _left_out(self)) if grid.rows]

    def _body(self) -> list[str]:
        record = self.runs[0].record
        return [
            heading("Does everything else still work?", record, f"at most {record['settings']['n']} records a task"),
            *(cards(run.name, _headline(self.comparisons(run.name))) for run in self.runs[1:]),
            plots([run.name for run in self.runs], _figures(self)),
            *(table(grid) for grid in self._grids()),
        ]


def _grid(protocol: str, found: Sequence[tuple[Run, list[Comparison]]]) -> Grid:
    """One protocol. Numbers of two never stand in one column."""
    text = protocol == TEXT
    columns = ["task", "guessing", "unpatched", "patched", "difference", "s.e.", "within one s.e.", "records", "tokens"]
    rows = []
    for run, comparisons in found:
        for c in comparisons:
            if c.protocol == protocol:
                label = c.task if len(found) == 1 else f"{c.task}: {run.name}"
                share = Cell(NONE) if c.chance is None else Cell(f"{100 * c.chance:.1f}")
                count = Cell(str(c.n), f"{c.dropped} not asked" if c.dropped else "")
                tokens = Cell(f"{c.tokens:,}") if text else Cell(NONE)
                rows.append((Cell(label), share, *_numbers(c, text), count, tokens))
    notes = [NOTES[protocol], "" if text else GUESSING, ERRORS, *(_unfinished(run) for run, _ in found)]
    return trimmed(protocol, " ".join(filter(None, notes)), columns, rows)


def _numbers(c: Comparison, text: bool) -> list[Cell]:
    """Unpatched, patched, difference, its standard error, the verdict."""
    scale, digits = (1.0, 4) if text else (100.0, 1)

    def absolute(mean: Mean | None) -> Cell:
        if mean is None:
            return Cell(NONE)
        error = "" if mean.stderr is None else f"±{scale * mean.stderr:.{digits}f}"
        below = f"perplexity {_exp(mean.value):.2f}" if text else error
        return Cell(f"{scale * mean.value:.{digits}f}", below, None if text else mean.value)

    if c.difference is None:
        return [absolute(c.base), *[Cell(NONE)] * 4]
    moved, error = c.difference.value, c.difference.stderr
    return [
        absolute(c.base),
        absolute(c.patched),
        Cell(f"{scale * moved:+.{digits + 1}f}"),
        Cell(NONE if error is None else f"{scale * error:.{digits + 1}f}"),
        Cell(NONE if c.within is None else "yes" if c.within else "no"),
    ]


def _left_out(report: Report) -> Grid:
    """Tasks without files, and records that were not asked."""
    rows = [(Cell(task), Cell("skipped"), Cell(why)) for task, why in report.runs[0].record["skipped"].items()]
    known = {(row.task, row.protocol, row.id) for row in report.run(BASE).rows if row.flag}
    counts: Counter[tuple[str, str]] = Counter()
    for run in report.runs:
        for row in run.rows:
            if row.flag and (run.name == BASE or (row.task, row.protocol, row.id) not in known):
                counts[f"{row.task}, {row.protocol}" + ("" if run.name == BASE else f": {run.name}"), row.flag] += 1
    rows += [(Cell(where), Cell(f"{count} records"), Cell(why)) for (where, why), count in counts.items()]
    note = "Nothing is cut to fit, and nothing is left out without a word."
    return Grid("Not asked", note, ("task", "what", "why"), tuple(rows))


def _unfinished(run: Run) -> str:
    done, planned = len(run.parts), run.record["planned"]
    return "" if done == planned else f"{run.name} is not finished: {done} of {planned} parts."


def _headline(comparisons: Iterable[Comparison]) -> Iterable[tuple[str, str]]:
    """(label, value): the verdicts counted, and what moved most in standard errors."""
    judged = [c for c in comparisons if c.within is not None]
    for protocol in PROTOCOLS:
        verdicts = [c.within for c in judged if c.protocol == protocol]
        if verdicts:
            yield f"within one standard error: {protocol}", f"{sum(map(bool, verdicts))} of {len(verdicts)}"
    moved = [(c.difference.value / c.difference.stderr, c) for c in judged if c.difference and c.difference.stderr]
    if moved:
        by, c = max(moved, key=lambda pair: abs(pair[0]))
        yield f"moved most: {c.task}, {c.protocol}", f"{by:+.1f} s.e."


def _figures(report: Report) -> list[tuple[str, str]]:
    """(title, bars) of each protocol whose values are shares; the dashed line is what guessing scores."""
    runs = list(enumerate(report.runs))
    figures = []
    for protocol in PROTOCOLS:
        alone = [c for c in report.comparisons(BASE) if c.protocol == protocol and MEASURES[c.form] != MEASURES["text"]]
        rows = []
        for c in alone:
            found = [(i, run.name, report.comparison(run.name, c.task, protocol)) for i, run in runs]
            drawn = [(i, name, mean.value, mean.stderr) for i, name, f in found if f and (mean := f.patched or f.base)]
            rows.append((c.task, c.chance, drawn))
        if rows:
            figures.append((protocol, bars(rows, "%, with one standard error; dashed: guessing")))
    return figures


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
