"""``Report``: the runs of a bench side by side, as numbers, tables and one HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ._record import find
from ._rows import Metric, Row, metrics, retention
from ._store import Store

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Run:
    """One line of a table: a method, or a baseline, with everything that was recorded of it."""

    record: dict[str, Any]
    rows: Sequence[Row]
    chunks: Sequence[dict[str, Any]]

    @property
    def name(self) -> str:
        """Its ``run_id``."""
        return str(self.record["run_id"])

    @cached_property
    def _metrics(self) -> list[Metric]:
        bootstrap, seed = self.record["bootstrap"], self.record["order_seed"]
        return metrics(self.rows, suffix=self.record["suffix"], bootstrap=bootstrap, seed=seed)

    def metrics(self) -> list[Metric]:
        """Every number of the run, computed from its rows."""
        return self._metrics

    def metric(self, name: str, split: str = "all", when: str = "final") -> Metric | None:
        """One number, e.g. ``metric("reliability", "was_wrong")``; None if the run has no such."""
        return find(self._metrics, name, split, when)

    def retention(self) -> list[tuple[str, float, int]]:
        """(ages, share still answered as edited, rows), youngest first."""
        return retention(self.rows)


@dataclass(frozen=True)
class Report:
    """Runs that may stand in one table: same protocol, data, base, edits and commit size."""

    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        if len(set(names)) < len(names):
            raise BadInput(f"two runs have one name among {', '.join(names)}. Give each its own run_id.")
        _comparable(self.runs)

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

    def metrics(self) -> dict[str, list[Metric]]:
        """Run → its numbers."""
        return {run.name: run.metrics() for run in self.runs}

    def table(self) -> Group:
        """Tables for a terminal: runs as rows, numbers as columns. Print them with rich."""
        from ._grid import grids
        from ._table import tables

        return tables(grids(self))

    def save_html(self, path: str | Path) -> Path:
        """Write one page that needs nothing else."""
        from ._html import page

        path = Path(path)
        path.write_text(page(self), encoding="utf-8")
        return path


def combine(reports: Iterable[Report]) -> Report:
    """Several reports in one. Baselines they share are kept once.

    Raises:
        BadInput: they were made on other data, another base or by another protocol, or two runs have one name.
    """
    every = [run for report in reports for run in report.runs]
    if not every:
        raise BadInput("no reports to combine. Give at least one.")
    _comparable(every)
    baselines = {run.name: run for run in every if run.record["baseline"]}
    return Report((*baselines.values(), *(run for run in every if not run.record["baseline"])))


def read_report(folder: str | Path) -> Report:
    """The report of a folder that ``run(..., out=folder)`` filled.

    Raises:
        BadInput: the folder holds no runs.
    """
    if not (Path(folder) / "runs.jsonl").is_file():
        raise BadInput(f"{folder} holds no runs. Give the folder passed as out=.")
    return begun(Store(Path(folder), Row.read))


def begun(store: Store[Row]) -> Report:
    """Every run that has scored a chunk."""
    runs = (Run(record, store.rows_of(name), store.chunks_of(name)) for name, record in store.runs.items())
    return Report(tuple(run for run in runs if run.chunks))


def _comparable(runs: Sequence[Run]) -> None:
    if len({run.record["comparable_group"] for run in runs}) > 1:
        listed = "; ".join(f"{run.name}: {_made(run)}" for run in runs)
        raise BadInput(f"these runs cannot stand in one table ({listed}). Make a report of each.")


def _made(run: Run) -> str:
    record = run.record
    keys = ("protocol_id", "data_name", "base_model", "n_edits", "commit_size", "order_seed")
    return ", ".join(f"{key} {record[key]}" for key in keys if record.get(key) not in ("", None))
