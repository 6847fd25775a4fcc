"""An approximate index of a memory's keys, for when there are too many to look at each.

It is LanceDB's IVF-RQ index over a copy of the keys that were live when it was made: a bit a dimension (RaBitQ, Gao and
Long 2024, arXiv:2405.12497) in lists around centroids. It can be lost and made again; the log is what is true. It is
built aside and renamed, and renamed before it is deleted: ``near-N.lance``, which covers the first N rows of the log,
is whole or not there, whenever a process is killed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._log import Log, _lancedb, flush, lance

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

BUILT, NAME, GONE = "building", "near-{}", "removed"
ROWS_A_LIST = 4096
PROBED = 0.5
"""Share of the lists a search looks into; see docs/memory.md for what it costs and finds."""
SAMPLES, ROUNDS = 64, 10  # rows per centroid and iterations of the clustering


class Near:
    """One index, opened."""

    def __init__(self, path: Path, covered: int) -> None:
        self.covered = covered
        with lance(f"cannot read the index of the memory at {path}"):
            self._table = _lancedb().connect(str(path)).open_table(NAME.format(covered))
            self._lists = _lists(self._table.count_rows())

    def search(self, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers [c] and vectors [c, M] float32 of the ``count`` best keys for a query [M], best first."""
        with lance("cannot read the index of the memory"):
            best = self._table.search(query, vector_column_name="vector").distance_type("dot").fast_search()
            best = best.nprobes(max(1, round(self._lists * PROBED))).refine_factor(1)
            rows = best.select(["seq", "vector", "_distance"]).limit(count).to_arrow().combine_chunks()
        vectors: np.ndarray = rows["vector"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
        return rows["seq"].to_numpy(), vectors


def newest(path: Path) -> int:
    """How many rows of the log the newest index covers; 0 without one."""
    return max((int(folder.stem.partition("-")[2]) for folder in path.glob(f"{NAME.format('*')}.lance")), default=0)


def build(log: Log, alive: np.ndarray) -> None:
    """Index the keys of these rows and remove older indexes. Does nothing while another process is at it.

    Args:
        alive: [n] whether each row of the log is a live fact.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(log.path / f"{BUILT}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return
    try:
        start = time.time_ns()
        work, final = (log.path / f"{name}.lance" for name in (BUILT, NAME.format(len(alive))))
        with lance(f"cannot index the memory at {log.path}", full="No fact was lost. Free some space."):
            shutil.rmtree(work, ignore_errors=True)  # what a killed build left
            _write(log, alive)
            flush(work, start)
            _remove(final)
            work.rename(final)
        for old in log.path.glob(f"{NAME.format('*')}.lance"):
            if old != final:
                _remove(old)
    finally:
        lock.release()


def _remove(folder: Path) -> None:
    """Delete an index at once: a kill in the middle leaves nothing that looks like one."""
    gone = folder.with_name(f"{GONE}.lance")
    shutil.rmtree(gone, ignore_errors=True)  # what a kill left
    if folder.exists():
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _write(log: Log, alive: np.ndarray) -> None:
    import pyarrow as pa
    from lancedb.index import IvfRq

    schema = pa.schema([("seq", pa.int64()), ("vector", pa.list_(pa.float32(), log.matched))])
    rows = pa.RecordBatchReader.from_batches(schema, _batches(log, alive, schema))
    table: Any = _lancedb().connect(str(log.path)).create_table(BUILT, data=rows)
    lists = _lists(table.count_rows())
    config = IvfRq(distance_type="dot", num_partitions=lists, sample_rate=SAMPLES, max_iterations=ROUNDS)
    table.create_index("vector", config=config)


def _batches(log: Log, alive: np.ndarray, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    import numpy as np
    import pyarrow as pa

    for seqs, vectors in log.batches(0, len(alive)):
        keep = alive[seqs]
        flat = pa.array(
            vectors[keep, : log.matched].astype(np.float32).reshape(-1)
        )  # LanceDB clusters float16 five times slower
        yield pa.record_batch([seqs[keep], pa.FixedSizeListArray.from_arrays(flat, log.matched)], schema=schema)


def _lists(rows: int) -> int:
    return max(1, rows // ROWS_A_LIST)
