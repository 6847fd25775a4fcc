"""The report of the RAG bench: patched models beside the unpatched one, as tables and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ._grid import NONE, Cell, Grid
from ._page import cards, document, made, plots, table
from ._rag_rows import CONDITIONS, NAMES, Metric, Row, difference, metrics
from ._svg import bars, scatter

if TYPE_CHECKING:
    from rich.console import Group

BASE = "none"
"""The run of the unpatched model, named as in the other benches."""
ERRORS = "Shares in %, ± one standard error over items. Below: the difference to the unpatched model, item by item."
SHOWN = 6  # answers of each condition on the page


@dataclass(frozen=True)
class Run:
    """One model on all items."""

    record: dict[str, Any]
    rows: Sequence[Row]
    parts: Sequence[dict[str, Any]]
    """What was asked together, with its seconds."""

    @property
    def name(self) -> str:
        """Its ``run_id``."""
        return str(self.record["run_id"])

    def metric(self, name: str) -> Metric | None:
        """One of its numbers; None if nothing was asked for it."""
        return next((m for m in metrics(self.rows) if m.name == name), None)


@dataclass(frozen=True)
class Report:
    """Runs on the same items, the unpatched model first."""

    runs: tuple[Run, ...]

    @property
    def rows(self) -> list[Row]:
        """All rows of all runs."""
        return [row for run in self.runs for row in run.rows]

    def run(self, name: str) -> Run:
        """The run of that name.

        Raises:
            BadInput: there is none.
        """
        for run in self.runs:
            if run.name == name:
                return run
        raise BadInput(f"no run {name!r}. There are: {', '.join(run.name for run in self.runs)}.")

    def difference(self, name: str, metric: str) -> Metric | None:
        """That run minus the unpatched model, item by item."""
        return difference(metric, self.run(BASE).rows, self.run(name).rows)

    def table(self) -> Group:
        """Tables for a terminal. Print them with rich."""
        from ._table import tables

        return tables(_grids(self))

    def save_html(self, path: str | Path) -> Path:
        """Write one page that needs nothing else."""
        path = Path(path)
        path.write_text(_page(self), encoding="utf-8")
        return path


def _grids(report: Report) -> list[Grid]:
    skills = _grid(report, "Adherence and robustness", list(NAMES), "; ".join(f"{n}: {w}" for n, w in NAMES.items()))
    right = [f"accuracy/{condition}" for condition in CONDITIONS]
    shown = "Has the document's answer, or the true one where it has none. " + "; ".join(
        f"{condition}: {what}" for condition, what in CONDITIONS.items()
    )
    exact = _grid(report, "Exact answers", [f"exact/{c}" for c in CONDITIONS], "Is a wanted answer, normalised.", True)
    return [grid for grid in (skills, _grid(report, "Accuracy", right, shown), exact) if grid.rows]


def _grid(report: Report, title: str, names: Sequence[str], note: str, folded: bool = False) -> Grid:
    found = [name for name in names if any(run.metric(name) for run in report.runs)]
    rows = [(Cell(run.name), *(_cell(report, run, name) for name in found)) for run in report.runs] if found else []
    columns = ("run", *(name.removeprefix("accuracy/").removeprefix("exact/") for name in found))
    return Grid(title, f"{note}. {ERRORS}".replace("..", "."), columns, tuple(rows), folded)


def _cell(report: Report, run: Run, name: str) -> Cell:
    metric = run.metric(name)
    if metric is None:
        return Cell(NONE)
    error = "" if metric.stderr is None else f" ±{100 * metric.stderr:.1f}"
    moved = report.difference(run.name, name) if run.name != BASE else None
    below = f"n {metric.n}"
    if moved is not None:
        spread = "" if moved.stderr is None else f" ±{100 * moved.stderr:.1f}"
        below = f"{100 * moved.value:+.1f}{spread}"
    return Cell(f"{100 * metric.value:.1f}{error}", below, metric.value)


def _page(report: Report) -> str:
    record = report.runs[0].record
    about = f"{record['base_model']} · {record['dtype']} · at most {record['settings']['n']} items a condition"
    data = f" · {record['data_name']}" if record["data_name"] else ""
    body = [f"<h1>Does it follow its documents, and only where they help?</h1><p>{escape(about + data)}</p>"]
    for run in report.runs[1:]:
        both = [(name, run.metric(name)) for name in ("R_Ad", "R_Ro")]
        body.append(cards(run.name, [(name, f"{100 * m.value:.1f} %") for name, m in both if m]))
    body.append(plots([run.name for run in report.runs], _figures(report)))
    body += [table(grid) for grid in _grids(report)]
    body += [_answers(report, run) for run in report.runs[1:]]
    body.append(made((run.name, run.record) for run in report.runs))
    return document(f"rag: {record['base_model']}", body)


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
        own = [row for row in run.rows if row.condition == condition]
        for row in own[:: max(1, -(-len(own) // SHOWN))]:
            mark = f'<span class="{"yes" if row.hit else "no"}">{"✓" if row.hit else "✗"}</span> {escape(row.text)}'
            asked = f"{escape(row.question)}<small>{condition}; without documents: {escape(row.own)}</small>"
            before = f'<span class="dim">{escape(was.get((condition, row.id), ""))}</span>'
            rows.append(f"<tr><td>{asked}</td><td>{escape(row.wanted[0])}</td><td>{before}</td><td>{mark}</td></tr>")
    head = "".join(f"<th>{column}</th>" for column in ("question", "wanted", "before", "after"))
    listed = f'<div class="scroll"><table class="text"><tr>{head}</tr>{"".join(rows)}</table></div>'
    return f"<h2>{escape(f'Answers: {run.name}')}</h2><p>Evenly taken from each condition.</p>{listed}"
