"""The report of the RAG bench: patched models beside the unpatched one, as tables and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from . import _runs
from ._grid import NONE, Cell, Grid, flagged
from ._page import after, before, cards, examples, heading, plots, table
from ._rag_rows import CONDITIONS, NAMES, Metric, Row, difference, metric
from ._runs import BASE
from ._svg import bars, scatter

ERRORS = (
    "Shares in %, ± one standard error over items. Below: the difference to the unpatched model, item by item. In "
    "brackets the standard error if only articles are independent."
)
SHOWN = 6  # answers of each condition on the page


class Run(_runs.Run[Row]):
    """One model on all items."""

    def metric(self, name: str) -> Metric | None:
        """One of its numbers; None if nothing was asked for it."""
        return metric(self.rows, name)


class Report(_runs.Report[Run, Row]):
    """Runs on the same items, the unpatched model first."""

    kinds = Run, Row

    def difference(self, name: str, metric: str, to: str = BASE) -> Metric | None:
        """That run minus another, item by item.

        Args:
            metric: one of ``metrics``, or a sum: ``R_Ad+R_Ro``.
            to: the other; left out, the unpatched model.
        """
        return difference(metric, self.run(to).rows, self.run(name).rows)

    def _grids(self) -> list[Grid]:
        note = "; ".join(f"{name}: {what}" for name, what in NAMES.items())
        skills = _grid(self, "Adherence and robustness", list(NAMES), note)
        right = [f"accuracy/{condition}" for condition in CONDITIONS]
        shown = "Has the document's answer, or the true one where it has none. " + "; ".join(
            f"{condition}: {what}" for condition, what in CONDITIONS.items()
        )
        same = [f"exact/{condition}" for condition in CONDITIONS]
        exact = _grid(self, "Exact answers", same, "Is a wanted answer, normalised.", True)
        left = flagged((run.name, row.condition, row.flag) for run in self.runs for row in run.rows if row.flag)
        return [grid for grid in (skills, _grid(self, "Accuracy", right, shown), exact, left) if grid.rows]

    def _body(self) -> list[str]:
        record, question = self.runs[0].record, "Does it follow its documents, and only where they help?"
        body = [heading(question, record, f"at most {record['settings']['n']} items a condition")]
        for run in self.runs[1:]:
            both = [(name, run.metric(name)) for name in ("R_Ad", "R_Ro")]
            body.append(cards(run.name, [(name, f"{100 * m.value:.1f} %") for name, m in both if m]))
        body.append(plots([run.name for run in self.runs], _figures(self)))
        body += [table(grid) for grid in self._grids()]
        return body + [_answers(self, run) for run in self.runs[1:]]


def _grid(report: Report, title: str, names: Sequence[str], note: str, folded: bool = False) -> Grid:
    found = [name for name in names if any(run.metric(name) for run in report.runs)]
    rows = [(Cell(run.name), *(_cell(report, run, name) for name in found)) for run in report.runs] if found else []
    columns = ("run", *(name.removeprefix("accuracy/").removeprefix("exact/") for name in found))
    return Grid(title, f"{note}. {ERRORS}".replace("..", "."), columns, tuple(rows), folded)


def _cell(report: Report, run: Run, name: str) -> Cell:
    found = run.metric(name)
    if found is None:
        return Cell(NONE)
    moved = report.difference(run.name, name) if run.name != BASE else None
    below = f"{100 * moved.value:+.1f}{_errors(moved)}" if moved else f"n {found.n}"
    return Cell(f"{100 * found.value:.1f}{_errors(found)}", below, found.value)


def _errors(found: Metric) -> str:
    plain = "" if found.stderr is None else f" ±{100 * found.stderr:.1f}"
    return plain + ("" if found.clustered is None else f" ({100 * found.clustered:.1f})")


def _figures(report: Report) -> list[tuple[str, str]]:
    points, rows = [], []
    for colour, run in enumerate(report.runs):
        ad, ro = run.metric("R_Ad"), run.metric("R_Ro")
        if ad and ro:
            points.append((colour, run.name, ad.value, ro.value))
    for condition in CONDITIONS:
        found = [(i, run.name, run.metric(f"accuracy/{condition}")) for i, run in enumerate(report.runs)]
        drawn = [(i, name, m.value, m.stderr) for i, name, m in found if m]
        if drawn:
            rows.append((str(condition), None, drawn))
    return [
        ("Robustness against adherence", scatter(points, "R_Ad, %", "R_Ro, %")),
        ("Accuracy by condition", bars(rows, "%, with one standard error")),
    ]


def _answers(report: Report, run: Run) -> str:
    """Some answers of each condition, before and after."""
    was = {(row.condition, row.id): row.text for row in report.run(BASE).rows}
    rows = []
    for condition in CONDITIONS:
        own = [row for row in run.rows if row.condition == condition and not row.flag]
        for row in own[:: max(1, -(-len(own) // SHOWN))]:
            asked = f"{escape(row.question)}<small>{condition}; without documents: {escape(row.own)}</small>"
            was_said = before(was.get((condition, row.id), ""))
            rows.append((asked, escape(row.wanted[0]), was_said, after(row.text, row.hit)))
    columns = ("question", "wanted", "before", "after")
    return examples(f"Answers: {run.name}", "Evenly taken from each condition.", columns, rows)
