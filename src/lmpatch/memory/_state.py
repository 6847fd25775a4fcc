"""What a memory holds, read from its log as far as it was committed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ._log import Log

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

CHUNKS = 64  # pieces the texts may be in


class State:
    """The texts of every row and, by key, the number of the one that holds.

    Of all rows with one key the last one holds; if it drops the fact, none does. The rows already read can never
    change, so only new ones are read.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._seen = log.latest()  # LanceDB's number of the last commit that was read
        self.texts: pa.Table = log.read(0)  # every row without its vector; row i is number i
        self.live: dict[str, int] = {}  # key -> number of the row that holds, oldest first
        self.ended: list[int] = []  # numbers of facts that no longer hold, as they ended
        self._hold(self.texts)

    @property
    def count(self) -> int:
        """Rows of the log."""
        return len(self.texts)

    @property
    def version(self) -> int:
        """The number of the last commit; 0 before the first."""
        return self.texts["version"][-1].as_py() if self.count else 0

    def refresh(self) -> None:
        """Read what any process committed since the last look."""
        seen = self._log.latest()
        if seen != self._seen:
            self.append(self._log.read(self.count), seen)

    def append(self, rows: pa.Table, seen: int) -> None:
        """Take in new rows, without vectors, of commits up to LanceDB's number ``seen``."""
        import pyarrow as pa

        self._hold(rows)
        self.texts = pa.concat_tables([self.texts, rows])
        if self.texts["seq"].num_chunks > CHUNKS:
            self.texts = self.texts.combine_chunks()
        self._seen = seen

    def rows(self, seqs: Sequence[int]) -> list[dict[str, Any]]:
        """Rows by number."""
        return self.texts.take(list(seqs)).to_pylist() if len(seqs) else []

    def alive(self) -> np.ndarray:
        """[count] whether each row is a fact that holds."""
        import numpy as np

        alive = np.zeros(self.count, dtype=bool)
        alive[np.fromiter(self.live.values(), np.int64, len(self.live))] = True
        return alive

    def length(self, version: int) -> int:
        """How many rows the log had after a version.

        Raises:
            BadInput: there is no such version.
        """
        import numpy as np

        if not 0 <= version <= self.version:
            raise BadInput(f"there is no version {version}. There are 0, which is empty, to {self.version}.")
        return int(np.searchsorted(self.texts["version"], version, side="right"))

    def live_after(self, version: int) -> dict[str, int]:
        """``live`` as it was after a version."""
        live: dict[str, int] = {}
        for _ in _replay(self.texts.slice(0, self.length(version)), live):
            pass
        return live

    def _hold(self, rows: pa.Table) -> None:
        self.ended.extend(_replay(rows, self.live))


def _replay(rows: pa.Table, live: dict[str, int]) -> Iterator[int]:
    """Let rows act on ``live``; yields the numbers of facts that end."""
    for seq, op, key in zip(*(rows[name].to_pylist() for name in ("seq", "op", "key")), strict=True):
        old = live.pop(key, None)
        if op == "put":
            live[key] = seq
        if old is not None:
            yield old
