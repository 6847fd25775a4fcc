"""The report of the context benches: models and wordings side by side, as tables and one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from . import _runs
from ._context_rows import Metric, Row, differences, metrics
from ._grid import NONE, Cell, Grid, flagged, trimmed
from ._page import cards, heading, plots, table
from ._runs import BASE
from ._svg import Bar, bars, scatter

LISTENS = [
    ("acc", "ACC"), ("sr", "SR"), ("rest", "neither"), ("adherence", "ACC in conflict"),
]  # fmt: skip
KEEPS = [
    ("acc", "faithfulness"), ("robustness", "robustness"), ("bcu", "BCU"), ("known_kept", "of those known"),
    ("closed_kept", "without context"),
]  # fmt: skip
LISTENS_NOTE = (
    "Shares of records, %. ACC: the answer of the context; SR, stubbornness rate: the answer of memory. In conflict: "
    "over the records the unpatched model answers otherwise without their context. In small print the 95 % bootstrap "
    "interval over records, the standard error and the number of records; Δ is taken record by record."
)
KEEPS_NOTE = (
    "Faithfulness is ACC. Robustness: with another record's context, the answer of the unpatched model without "
    "any. BCU is the mean of both. Of those known: robustness over the records the unpatched model knows. Without "
    "context: the same answer as the unpatched model."
)
SHOWN = 12  # records in the table of examples


class Run(_runs.Run[Row]):
    """One model under one wording, on all records."""

    @cached_property
    def numbers(self) -> dict[str, Metric]:
        """Every number of the run, computed from its rows."""
        return metrics(self.rows, bootstrap=self.record["bootstrap"], seed=self.record["seed"])


class Report(_runs.Report[Run, Row]):
    """Runs on the same records, the unpatched model under the plain wording first."""

    kinds = Run, Row

    def metrics(self, name: str) -> dict[str, Metric]:
        """The numbers of a run: ``acc``, ``sr``, ``rest``, ``adherence``, ``robustness``, ``bcu``, ..."""
        return self.run(name).numbers

    def differences(self, name: str) -> dict[str, Metric]:
        """The same as differences from the unpatched model under the plain wording, record by record."""
        run = self.run(name)
        return differences(self.run(BASE).rows, run.rows, bootstrap=run.record["bootstrap"], seed=run.record["seed"])

    def _grids(self) -> list[Grid]:
        moved = {run.name: self.differences(run.name) for run in self.runs}
        grids = [
            _grid("With the context", LISTENS_NOTE, LISTENS, ("acc", "Δ ACC"), self.runs, moved),
            _grid("With another's context", KEEPS_NOTE, KEEPS, ("bcu", "Δ BCU"), self.runs, moved),
            flagged((run.name, row.when, row.flag) for run in self.runs for row in run.rows if row.flag),
        ]
        return [grid for grid in grids if grid.rows]

    def _body(self) -> list[str]:
        record, question = self.runs[0].record, "Which does it trust, the context or its memory?"
        patched = [run for run in self.runs if not run.record["baseline"]]
        return [
            heading(question, record, f"{record['records']} records"),
            *(cards(run.name, _headline(run, self.differences(run.name))) for run in patched[:6]),
            plots([run.name for run in self.runs] if len(self.runs) <= 6 else [], self._figures()),
            *(table(grid) for grid in self._grids()),
            *(table(_examples(self.run(BASE), run)) for run in patched[:1]),
        ]

    def _figures(self) -> list[tuple[str, str]]:
        rows: list[tuple[str, float | None, list[Bar]]] = []
        points: list[tuple[int, str, float, float]] = []
        for colour, run in enumerate(self.runs):
            found = run.numbers
            shown: list[Bar] = [
                (colour, name, found[name].value, found[name].stderr) for name in ("acc", "sr") if name in found
            ]
            rows.append((run.name, None, shown))
            if "robustness" in found and "acc" in found:
                points.append((colour, run.name, found["acc"].value, found["robustness"].value))
        return [
            ("ACC above SR", bars(rows, "%, with one standard error")),
            ("Faithfulness and robustness", scatter(points, "ACC with its context, %", "kept with another's, %")),
        ]


def _grid(
    title: str,
    note: str,
    columns: Sequence[tuple[str, str]],
    moved: tuple[str, str],
    runs: Sequence[Run],
    differ: Mapping[str, Mapping[str, Metric]],
) -> Grid:
    rows = []
    for run in runs:
        found, change = run.numbers, differ[run.name].get(moved[0])
        if not any(name in found for name, _ in columns[1:]):
            continue
        cells = [_share(found.get(name)) for name, _ in columns]
        cells.append(_share(change, signed=True) if change and run.name != BASE else Cell(NONE))
        rows.append((Cell(run.name, _unfinished(run)), *cells))
    return trimmed(title, note, ["run", *(label for _, label in columns), moved[1]], rows)


def _share(metric: Metric | None, signed: bool = False) -> Cell:
    if metric is None:
        return Cell(NONE)
    sign = "+" if signed else ""
    parts = [] if metric.low is None else [f"{100 * metric.low:{sign}.1f} to {100 * (metric.high or 0.0):{sign}.1f}"]
    parts += [] if metric.stderr is None else [f"s.e. {100 * metric.stderr:.1f}"]
    parts.append(f"n={metric.n}" + (f" ({metric.dropped} not asked)" if metric.dropped else ""))
    return Cell(f"{100 * metric.value:{sign}.1f}", ", ".join(parts), None if signed else metric.value)


def _unfinished(run: Run) -> str:
    done, planned = len(run.parts), run.record["planned"]
    return "" if done == planned else f"{done} of {planned} parts"


def _headline(run: Run, moved: Mapping[str, Metric]) -> list[tuple[str, str]]:
    """(label, value) of the few numbers a run is remembered by."""
    found = run.numbers
    pairs: list[tuple[str, str]] = []
    for name, label in (("acc", "ACC"), ("sr", "SR"), ("robustness", "robustness"), ("bcu", "BCU")):
        if name in found:
            pairs.append((label, f"{100 * found[name].value:.1f} %"))
    if "acc" in moved:
        pairs.append(("Δ ACC", f"{100 * moved['acc'].value:+.1f}"))
    return pairs


def _examples(base: Run, run: Run) -> Grid:
    before = {row.place: row for row in base.rows if row.when == "context"}
    rows = []
    for row in [row for row in run.rows if row.when == "context" and row.said is not None][:SHOWN]:
        was = before[row.place].said
        said = (row.answer, row.memory, row.closed, was, row.said)
        rows.append((Cell(row.id), *(Cell(NONE if text is None else text) for text in said)))
    columns = ("record", "context says", "memory says", "without context", "unpatched", run.name)
    return Grid("Examples", "The first records, as they were answered.", columns, tuple(rows), folded=True)
