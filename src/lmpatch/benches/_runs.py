"""What the reports of all benches share: runs side by side, as tables and as one HTML page."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ..errors import BadInput
from ._grid import Grid
from ._page import document, made
from ._store import Json, R, Store
from ._table import tables

if TYPE_CHECKING:
    from rich.console import Group
    from typing_extensions import Self

BASE = "none"
"""The run of the unpatched model."""


@dataclass(frozen=True)
class Run(Generic[R]):
    """One line of a table: a model on everything it was asked, and how that was done."""

    record: Json
    rows: Sequence[R]
    parts: Sequence[Json]
    """What was finished together, with its seconds."""

    @property
    def name(self) -> str:
        """Its ``run_id``."""
        return str(self.record["run_id"])


N = TypeVar("N", bound=Run[Any])


@dataclass(frozen=True)
class Report(ABC, Generic[N, R]):
    """Runs that may stand in one table, the unpatched model first."""

    runs: tuple[N, ...]
    kinds: ClassVar[tuple[Any, Any]]
    """The classes of a run and of a row."""

    @classmethod
    def of(cls, store: Store[R]) -> Self:
        """Every run the store holds."""
        run, _ = cls.kinds
        return cls(tuple(run(record, store.rows_of(n), store.chunks_of(n)) for n, record in store.runs.items()))

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The report of a folder that ``run(..., out=folder)`` filled.

        Raises:
            BadInput: the folder holds no runs.
        """
        if not (Path(folder) / "runs.jsonl").is_file():
            raise BadInput(f"{folder} holds no runs. Give the folder passed as out=.")
        return cls.of(Store(Path(folder), cls.kinds[1].read))

    @property
    def rows(self) -> list[R]:
        """All rows of all runs."""
        return [row for run in self.runs for row in run.rows]

    def run(self, name: str) -> N:
        """The run of that name.

        Raises:
            BadInput: there is none.
        """
        for run in self.runs:
            if run.name == name:
                return run
        raise BadInput(f"no run {name!r}. There are: {', '.join(run.name for run in self.runs)}.")

    def table(self) -> Group:
        """Tables for a terminal. Print them with rich."""
        return tables(self._grids())

    def save_html(self, path: str | Path) -> Path:
        """Write one page that needs nothing else."""
        path, record = Path(path), self.runs[0].record
        body = [*self._body(), made((run.name, run.record) for run in self.runs)]
        path.write_text(document(f"{record['bench']}: {record['base_model']}", body), encoding="utf-8")
        return path

    @abstractmethod
    def _grids(self) -> list[Grid]:
        """The tables."""

    @abstractmethod
    def _body(self) -> list[str]:
        """The page, as parts that are HTML; how the runs were made follows it."""
