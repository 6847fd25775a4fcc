"""``Report``: the runs of a bench side by side, as numbers, tables and one HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import BadInput
from . import _runs
from ._grid import Grid, grids
from ._html import body
from ._record import find
from ._rows import Metric, Row, metrics, retention
from ._store import Json, Store

if TYPE_CHECKING:
    from typing_extensions import Self


class Run(_runs.Run[Row]):
    """A method, or a baseline, with everything that was recorded of it."""

    @property
    def chunks(self) -> Sequence[Json]:
        """The finished groups of edits."""
        return self.parts

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
class Report(_runs.Report[Run, Row]):
    """Runs that may stand in one table: same protocol, data, base, edits and commit size."""

    kinds = Run, Row

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        if len(set(names)) < len(names):
            raise BadInput(f"two runs have one name among {', '.join(names)}. Give each its own run_id.")
        _comparable(self.runs)

    @classmethod
    def of(cls, store: Store[Row]) -> Self:
        """Every run that has scored a chunk.

        Raises:
            BadInput: none has.
        """
        found = tuple(run for run in super().of(store).runs if run.chunks)
        if not found:
            raise BadInput(f"no chunk of the runs in {store.folder} is finished. Run the bench again: it goes on.")
        return cls(found)

    def metrics(self) -> dict[str, list[Metric]]:
        """Run → its numbers."""
        return {run.name: run.metrics() for run in self.runs}

    def _grids(self) -> list[Grid]:
        return grids(self)

    def _body(self) -> list[str]:
        return body(self)


read_report = Report.read


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


def _comparable(runs: Sequence[Run]) -> None:
    if len({run.record["comparable_group"] for run in runs}) > 1:
        listed = "; ".join(f"{run.name}: {_made(run)}" for run in runs)
        raise BadInput(f"these runs cannot stand in one table ({listed}). Make a report of each.")


def _made(run: Run) -> str:
    record = run.record
    keys = ("protocol_id", "data_name", "base_model", "n_edits", "commit_size", "order_seed")
    return ", ".join(f"{key} {record[key]}" for key in keys if record.get(key) not in ("", None))
