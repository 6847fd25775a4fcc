"""``Report``: the runs of a bench side by side, as numbers, tables and one page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...errors import BadInput, MissingExtra
from . import page, stats
from .adapter import Adapter, adapt
from .contract import BASE, Json, Measure
from .stats import Number
from .store import Store
from .tables import Grid, beaten, comparison, costs, flagged, kept, printed, verdict

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Run:
    """One line of a table: a model on everything it was asked, and how that was done."""

    bench: Adapter
    record: Json
    rows: Sequence[Any]
    parts: Sequence[Json]
    """What was finished together, with its seconds."""

    @property
    def name(self) -> str:
        """Its ``run_id``."""
        return str(self.record["run_id"])

    @property
    def title(self) -> str:
        """Its name, and how much of it is there if not all."""
        done, planned = len(self.parts), self.record.get("planned", len(self.parts))
        return self.name if done >= planned else f"{self.name} (not finished: {done} of {planned} chunks)"

    @cached_property
    def values(self) -> stats.Collection:
        """What its numbers are made of."""
        return stats.collect(self.rows, self.bench.metrics)

    def measure(self, name: str) -> Measure:
        """The measure behind a full name such as ``loc_kl/same_relation@was_wrong``."""
        return self.values[name][0]

    @cached_property
    def _numbers(self) -> dict[str, Number]:
        return stats.numbers(self.values, self.record)

    def metrics(self) -> dict[str, Number]:
        """Every number of the run, computed from its rows; of part of the rows under ``name@split``."""
        return self._numbers

    def metric(self, name: str, split: str = "all") -> Number | None:
        """One number, or a sum such as ``R_Ad+R_Ro``, of all rows or of a split of ``METRICS``; None: there is none."""
        full = name if split == "all" else f"{name}@{split}"
        return stats.total(full, self.values, self.record) if "+" in full else self._numbers.get(full)

    @cached_property
    def chances(self) -> dict[str, float]:
        """What guessing scores, where that is known."""
        shares: dict[str, list[float]] = {}
        for name, measure in self.bench.metrics.items():
            if measure.chance is None:
                continue
            for row in self.rows:
                if (member := measure.of(row)) is not None and (share := measure.chance(row)) is not None:
                    shares.setdefault(f"{name}/{member}" if member else name, []).append(share)
        return {name: stats.mean(values) for name, values in shares.items()}

    def __repr__(self) -> str:
        return f"Run({self.title}, n = {max((number.n for number in self._numbers.values()), default=0)})"

    @property
    def settled(self) -> Json:
        """Everything that decides the run's numbers: its record without them."""
        return {key: value for key, value in self.record.items() if key != "metrics"}


@dataclass(frozen=True)
class Report:
    """Runs that may stand in one table, the unpatched model first."""

    bench: Adapter
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        if len(set(names)) < len(names):
            raise BadInput(f"two runs have one name among {', '.join(names)}. Give each its own run_id.")
        _comparable(self.runs)

    @classmethod
    def of(cls, bench: Adapter, store: Store[Any]) -> Report:
        """Every run of the store that has finished a chunk; ``BadInput`` where none has."""
        if not store.runs:
            raise BadInput(f"{store.folder} holds no runs. Give the folder passed as out=.")
        runs = (Run(bench, record, store.rows_of(name), store.chunks_of(name)) for name, record in store.runs.items())
        if not (some := tuple(run for run in runs if run.parts)):
            raise BadInput(f"no chunk of the runs in {store.folder} is finished. Run the bench again: it goes on.")
        return cls(bench, some)

    @classmethod
    def read(cls, bench: ModuleType | Adapter | str, folder: str | Path) -> Report:
        """The report of a folder that ``run(..., out=folder)`` filled; ``BadInput`` where it holds no runs."""
        adapter = adapt(bench)
        return cls.of(adapter, Store(Path(folder), adapter.Row.read))

    @property
    def rows(self) -> list[Any]:
        """All rows of all runs."""
        return [row for run in self.runs for row in run.rows]

    def run(self, name: str) -> Run:
        """The run of that name; ``BadInput`` where there is none."""
        if name not in (runs := {run.name: run for run in self.runs}):
            raise BadInput(f"no run {name!r}. There are: {', '.join(runs)}.")
        return runs[name]

    def metrics(self) -> dict[str, dict[str, Number]]:
        """Run → its numbers."""
        return {run.name: run.metrics() for run in self.runs}

    def difference(self, name: str, metric: str, to: str = BASE) -> Number | None:
        """A number, or a sum of some, of that run minus another's on the same records: its error is smaller than that
        of two separate means."""
        run = self.run(name)
        return stats.total(metric, stats.minus(run.values, self.run(to).values), run.record)

    def differences(self, name: str, to: str = BASE) -> dict[str, Number]:
        """Every number of that run minus another's."""
        run = self.run(name)
        return stats.numbers(stats.minus(run.values, self.run(to).values), run.record)

    @cached_property
    def _moved(self) -> dict[str, dict[str, Number]]:
        """Run → its differences from the unpatched model; empty where that is not there."""
        based = any(run.name == BASE for run in self.runs)
        return {run.name: self.differences(run.name) if based and run.name != BASE else {} for run in self.runs}

    def verdict(self) -> list[str]:
        """What the numbers say, a sentence a patched run."""
        return [*verdict(self.runs, self._moved), *self._losers()]

    def _losers(self) -> list[str]:
        """The patched runs that a mere prompt beats."""
        name = self.bench.JUDGED_BY
        prompts = [run for run in self.runs if run.record["baseline"] and run.name != BASE and name in run.metrics()]
        if not prompts:
            return []
        best = max(prompts, key=lambda run: run.metrics()[name].value)
        patched = [run for run in self.runs if not run.record["baseline"]]
        return beaten(best, name, [(run, self.difference(run.name, name, best.name)) for run in patched])

    def grids(self, every: bool = True) -> list[Grid]:
        """The tables as plain values."""
        grids = [comparison(self.runs, self._moved, every), costs(self.runs), flagged(self.runs)]
        return [grid for grid in grids if grid.rows]

    def table(self, every: bool = False) -> Group:
        """Verdict and tables for a terminal: the numbers a run is remembered by, or every one. ``print`` shows them."""
        return printed(self.verdict(), self.grids(every))

    def summary(self, every: bool = False) -> Json:
        """What ``table`` shows, as values: of each run its numbers and differences with error and n."""
        runs = []
        for run in self.runs:
            names, both = kept(run, every), {"metrics": run.metrics(), "differences": self._moved[run.name]}
            short = {
                key: {n: {"value": x.value, "error": x.error, "n": x.n} for n, x in found.items() if n in names}
                for key, found in both.items()
            }
            runs.append({"run_id": run.name, **short})
        return {"bench": self.bench.name, "verdict": self.verdict(), "runs": runs}

    def save_html(self, path: str | Path) -> Path:
        """Write one page that needs nothing else."""
        path = Path(path)
        path.write_text(page.document(self.bench, self.runs, self.verdict(), self.grids()), encoding="utf-8")
        return path

    def __repr__(self) -> str:
        text = f"{self.bench.name}: {self.runs}; {' '.join(self.verdict())}"
        return f"Report({shorten(text, 400, placeholder=' …')})"

    def _repr_html_(self) -> str:
        """Verdict and tables in a notebook."""
        return page.fragment(self.verdict(), self.grids())

    def to_json(self) -> str:
        """Records and numbers of every run, without rows."""
        runs = [
            run.settled
            | {"metrics": {name: asdict(number) for name, number in run.metrics().items()}}
            | {"differences": {name: asdict(number) for name, number in self._moved[run.name].items()}}
            for run in self.runs
        ]
        return json.dumps({"bench": self.bench.name, "verdict": self.verdict(), "runs": runs}, ensure_ascii=False)

    def to_pandas(self) -> Any:
        """A data frame, one line a run and number; ``MissingExtra`` without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise MissingExtra("to_pandas needs pandas. Run: pip install pandas") from error
        lines = []
        for run in self.runs:
            for name, number in run.metrics().items():
                moved = self._moved[run.name].get(name)
                change = {"difference": moved and moved.value, "difference_stderr": moved and moved.error}
                lines.append({"run": run.name, **asdict(number), **change})
        return pandas.DataFrame(lines)


def combine(reports: Iterable[Report]) -> Report:
    """Several reports in one, the baselines they share once; ``BadInput`` for other data, another base or another
    protocol, or two runs of one name."""
    reports = list(reports)
    if not reports:
        raise BadInput("no reports to combine. Give at least one.")
    every = [run for report in reports for run in report.runs]
    _comparable(every)
    baselines = {run.name: run for run in every if run.record["baseline"]}
    return replace(reports[0], runs=(*baselines.values(), *(run for run in every if not run.record["baseline"])))


def _comparable(runs: Sequence[Run]) -> None:
    if len({run.record.get("comparable_group") for run in runs}) > 1:
        keys = ("protocol_id", "data_name", "base_model", "n_edits", "commit_size", "order_seed")
        listed = "; ".join(
            f"{run.name}: {', '.join(f'{k} {run.record[k]}' for k in keys if run.record.get(k) not in ('', None))}"
            for run in runs
        )
        raise BadInput(f"these runs cannot stand in one table ({listed}). Make a report of each.")
