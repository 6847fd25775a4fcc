"""Search among the keys that hold: exactly in memory, beside an approximate index once there are many.

The index is LanceDB's IVF-RQ over a copy of the keys that were live when it was made: a bit a dimension (RaBitQ, Gao
and Long 2024, arXiv:2405.12497) in lists around centroids. It can be lost and made again: the log is what is true. It
is built aside and renamed, and renamed before it is deleted: ``near-N.lance``, which covers the first N rows of the
log, is whole or not there, whenever a process is killed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from ..errors import BadInput, LmpatchError
from ._lance import flush, lance, lancedb, matrix
from ._log import Log

if TYPE_CHECKING:
    import pyarrow as pa

    from ..retrieval.index import KeyBlock

MARK = b"log"  # in the metadata of an index: of which log it is
BUILT, NAME, GONE = "building", "near-{}", "removed"
ROWS_A_LIST = 4096
PROBED = 0.5
"""Share of the lists a search looks into; see docs/memory.md for what it costs and finds."""
SAMPLES, ROUNDS = 64, 10  # rows per centroid and iterations of the clustering
SPARE = 64  # rows of the index beyond k: all scores are computed again, since the index knows them roughly


Find = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""The scores [n] float64 and row numbers [n] of so many facts that are near to a query."""


class Search:
    """The live keys that no index covers, as one block, and the index. Both are brought up to date by a search."""

    def __init__(self, log: Log, exact: int) -> None:
        self._log, self._exact = log, exact
        self._block: KeyBlock | None = None
        self._index: Near | None = None
        self._foreign = 0  # rows covered by an index of another log, which a copy of files left here
        self._loaded = self._ended = 0  # rows, and ended facts, that the block has seen

    def __call__(self, queries: np.ndarray, k: int, at: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores [m, k'] float64 and row numbers [m, k'] int64, best first, the lower number of equals first.

        Args:
            at: only facts that hold then, in seconds since 1970; None: whatever their time is.
        """

        def search() -> tuple[np.ndarray, np.ndarray]:
            self._log.refresh()
            try:
                return self._search(queries, k, at if self._log.spans else None)
            except BadInput:
                raise
            except LmpatchError:  # another process has compacted, or replaced the index
                self._block = None
                raise

        return self._log.retry(search)

    def _search(self, queries: np.ndarray, k: int, at: float | None) -> tuple[np.ndarray, np.ndarray]:
        import torch

        block, index = self._ready(), self._index
        scores, seqs = (part.numpy() for part in block.search(torch.from_numpy(queries), k))
        if index is None and at is None:
            return scores, seqs
        lines = []
        for i, query in enumerate(queries):
            found = [(scores[i], seqs[i])] if at is None else [self._hold(_exact(block, query), k, at)]
            if index is not None:
                found.append(self._hold(_indexed(index, query), k, at))
            both = [np.concatenate(part) for part in zip(*found, strict=True)]
            best = np.lexsort((both[1], -both[0]))[:k]
            lines.append((both[0][best], both[1][best]))
        width = min((len(line) for line, _ in lines), default=0)  # an index may find fewer than k
        shape = (len(queries), width)
        return (
            np.array([line[:width] for line, _ in lines], np.float64).reshape(shape),
            np.array([line[:width] for _, line in lines], np.int64).reshape(shape),
        )

    def _hold(self, find: Find, k: int, at: float | None) -> tuple[np.ndarray, np.ndarray]:
        """The best ``k`` facts that hold, however many that do not score higher; possibly some more."""
        count = k + SPARE
        while True:
            scores, seqs = find(count)
            holds = self._log.holds(seqs, at)
            if holds.sum() >= k or len(seqs) < count:
                return scores[holds], seqs[holds]
            count *= 4

    def _ready(self) -> KeyBlock:
        import torch

        from ..retrieval.index import KeyBlock

        log = self._log
        covered = newest(log.path) if len(log.live) > self._exact else 0
        covered = 0 if covered == self._foreign else covered
        block = self._block
        if block is None or covered != (self._index.covered if self._index else 0):
            self._index = Near(log.path, covered) if covered else None
            if self._index and not self._index.of(log):
                self._index, self._foreign, covered = None, covered, 0
            self._block = block = KeyBlock(log.matched)
            self._loaded, self._ended = covered, len(log.ended)
        for seq in log.ended[self._ended :]:
            if seq in block:
                block.drop(seq)
        self._ended = len(log.ended)
        if self._loaded < log.count:
            for seqs, vectors in log.live_batches(self._loaded):
                block.add(torch.from_numpy(vectors), seqs.tolist())
            self._loaded = log.count
        return block


class Near:
    """One index, opened. ``covered`` is how many rows of the log it answers for."""

    def __init__(self, path: Path, covered: int) -> None:
        self.covered = covered
        with lance(f"cannot read the index of the memory at {path}"):
            self._table = lancedb().connect(str(path)).open_table(NAME.format(covered))
            self._probes = max(1, round(_lists(self._table.count_rows()) * PROBED))

    def of(self, log: Log) -> bool:
        """Whether it was made of this log. One of an earlier lmpatch does not say, and is believed."""
        mark = (self._table.schema.metadata or {}).get(MARK)
        return self.covered <= log.count and mark in (None, log.mark(self.covered).encode())

    def search(self, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers [c] and vectors [c, M] float32 of the ``count`` best keys for a query [M], best first."""
        with lance("cannot read the index of the memory"):
            best = self._table.search(query, vector_column_name="vector").distance_type("dot").fast_search()
            best = best.nprobes(self._probes).refine_factor(1).select(["seq", "vector", "_distance"])
            rows = best.limit(count).to_arrow()
        return rows["seq"].to_numpy(), matrix(rows["vector"])


def _exact(block: KeyBlock, query: np.ndarray) -> Find:
    import torch

    def find(count: int) -> tuple[np.ndarray, np.ndarray]:
        scores, seqs = block.search(torch.from_numpy(query[None]), count)
        return scores[0].numpy(), seqs[0].numpy()

    return find


def _indexed(index: Near, query: np.ndarray) -> Find:
    import torch

    from ..retrieval.index import inner

    def find(count: int) -> tuple[np.ndarray, np.ndarray]:
        seqs, vectors = index.search(query, count)
        return inner(torch.from_numpy(query), torch.tensor(vectors)).numpy(), seqs

    return find


def newest(path: Path) -> int:
    """How many rows of the log the newest index covers; 0 without one."""
    return max((int(folder.stem.partition("-")[2]) for folder in path.glob(f"{NAME.format('*')}.lance")), default=0)


def build(log: Log) -> None:
    """Index the keys of the facts that hold and remove older indexes. Does nothing while another process is at it."""
    start = time.time_ns()
    work, final = (log.path / f"{name}.lance" for name in (BUILT, NAME.format(log.count)))
    with suppress(Timeout), FileLock(log.path / f"{BUILT}.lock", timeout=0):
        with lance(f"cannot index the memory at {log.path}", full="No fact was lost. Free some space."):
            shutil.rmtree(work, ignore_errors=True)  # what a killed build left
            _write(log)
            flush(work, start)
            _remove(final)
            work.rename(final)
        for old in log.path.glob(f"{NAME.format('*')}.lance"):
            if old != final:
                _remove(old)


def _remove(folder: Path) -> None:
    """Delete an index at once: a kill in the middle leaves nothing that looks like one."""
    gone = folder.with_name(f"{GONE}.lance")
    shutil.rmtree(gone, ignore_errors=True)  # what a kill left
    if folder.exists():
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _write(log: Log) -> None:
    import pyarrow as pa
    from lancedb.index import IvfRq

    schema = pa.schema([("seq", pa.int64()), ("vector", pa.list_(pa.float32(), log.matched))])
    schema = schema.with_metadata({MARK: log.mark(log.count)})

    def batches() -> Iterator[pa.RecordBatch]:
        for seqs, vectors in log.live_batches(0):
            flat = pa.array(vectors.astype(np.float32).reshape(-1))  # LanceDB clusters float16 five times slower
            yield pa.record_batch([seqs, pa.FixedSizeListArray.from_arrays(flat, log.matched)], schema=schema)

    rows = pa.RecordBatchReader.from_batches(schema, batches())
    table: Any = lancedb().connect(str(log.path)).create_table(BUILT, data=rows)
    lists = _lists(table.count_rows())
    config = IvfRq(distance_type="dot", num_partitions=lists, sample_rate=SAMPLES, max_iterations=ROUNDS)
    table.create_index("vector", config=config)


def _lists(rows: int) -> int:
    return max(1, rows // ROWS_A_LIST)
