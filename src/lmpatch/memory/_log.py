"""The log of a memory: one LanceDB table whose rows are only ever appended, under a lock, and flushed to the disk.

A commit is one append: a data file and a manifest that names it appear, or nothing does. Rows are numbered without
gaps in the order of their commits, because a writer holds the lock while it looks up the last number.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, LmpatchError, MissingExtra
from ..files import sync

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

FORMAT = 1
TABLE, LOCK = "facts", "lock"
TEXTS = ("seq", "version", "op", "key", "prompt", "target", "subject", "more", "source", "added")
PATIENCE = 600.0  # seconds to wait for another writer, who may be building an index
TRIES = 5  # a reader whose files were compacted away looks for the newer ones
FULL = ("No space left", "File too large", "quota exceeded", "os error 28", "os error 27", "os error 122")
EVERY, FEW = 16, 64  # commits between two looks at the number of data files; that many are always left alone


class Log:
    """The table of one folder, as of the last call of ``latest``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._table = _open(path)
        meta = json.loads((self._table.schema.metadata or {}).get(b"lmpatch", b"{}"))
        if meta.get("format") != FORMAT:
            raise BadInput(f"{path} has format {meta.get('format')!r}, this lmpatch reads {FORMAT}. Update lmpatch.")
        self.width: int = meta["width"]
        self.matched: int = meta["matched"]
        self.stamp: dict[str, str] = meta["stamp"]

    @classmethod
    def create(cls, path: Path, width: int, matched: int, stamp: dict[str, str]) -> Log:
        """Make the folder. What a killed creation left there is written over.

        Raises:
            BadInput: something else is there.
        """
        if (
            path.exists()
            and not (path / f"{TABLE}.lance").is_dir()
            and (path.is_file() or {*os.listdir(path)} - {LOCK})
        ):
            raise BadInput(f"{path} exists and is no memory. Give another path.")
        connect = _lancedb().connect
        path.mkdir(parents=True, exist_ok=True)
        with writing(path):
            if _exists(path):
                raise BadInput(f"there is a memory at {path} already. Open it, or give another path.")
            meta = {
                b"lmpatch": json.dumps({"format": FORMAT, "width": width, "matched": matched, "stamp": stamp}).encode()
            }
            mode = "overwrite" if (path / f"{TABLE}.lance").exists() else "create"  # over what a kill left
            start = time.time_ns()
            with lance(f"cannot make a memory at {path}", full="Nothing was made."):
                connect(str(path)).create_table(TABLE, schema=_schema(width, meta), mode=mode)
            flush(path, start)
        return cls(path)

    def latest(self) -> int:
        """Look at the newest commit of any process; its number in LanceDB."""
        with lance(f"cannot read the memory at {self.path}"):
            self._table.checkout_latest()
            return int(self._table.version)

    def read(self, since: int) -> pa.Table:
        """All columns but the vectors of rows ``since`` and later, in order.

        Raises:
            LmpatchError: a row is missing.
        """
        import numpy as np

        rows = self._retry(
            lambda: self._table.search().where(f"seq >= {since}").select(list(TEXTS)).to_arrow().sort_by("seq")
        )
        if not np.array_equal(rows["seq"], np.arange(since, since + len(rows))):
            raise LmpatchError(f"the memory at {self.path} lacks rows of its log. Take a fresh copy of the folder.")
        return rows

    def vectors(self, seqs: Sequence[int]) -> np.ndarray:
        """Vectors [n, width] float16 of these rows, which must be facts."""
        import numpy as np

        wanted = sorted({*seqs})
        if not wanted:
            return np.empty((0, self.width), np.float16)
        rows = self._retry(lambda: self._table.take_offsets(wanted).select(["seq", "vector"]).to_arrow().sort_by("seq"))
        if not np.array_equal(rows["seq"], wanted):  # rows stand in the order of their numbers
            raise LmpatchError(f"the memory at {self.path} lacks rows of its log. Take a fresh copy of the folder.")
        return _matrix(rows["vector"], self.width)[np.searchsorted(wanted, seqs)]

    def batches(self, since: int, end: int, size: int = 8192) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers [n], vectors [n, width] float16) of the facts among rows ``since`` to ``end``, a batch at a time."""
        with lance(f"cannot read the memory at {self.path}"):
            rows = f"seq >= {since} AND seq < {end} AND op = 'put'"
            query = self._table.search().where(rows).select(["seq", "vector"])
            for batch in query.to_batches(size):
                yield batch["seq"].to_numpy(), _matrix(batch["vector"], self.width)

    def append(self, rows: pa.Table) -> int:
        """Commit rows; call it under ``writing`` alone. Returns the commit's number in LanceDB.

        Raises:
            LmpatchError: the disk is full or cannot be written. Nothing was stored.
        """
        start = time.time_ns()
        with lance(f"cannot add to the memory at {self.path}", full="Nothing was stored; the memory is as before."):
            self._table.add(rows)
            version = int(self._table.version)
        flush(self.path / f"{TABLE}.lance", start)
        return version

    def tidy(self, *, always: bool = True) -> None:
        """Join small data files and delete what no row needs; call it under ``writing`` alone.

        Args:
            always: ``False`` does so only when there are many files. Their number may grow with the log, since all
                of it is written again; so a commit's share of that work stays the same.
        """
        with lance(f"cannot compact the memory at {self.path}", full="No fact was lost. Free some space."):
            if not always:
                stats = self._table.stats() if self._table.version % EVERY == 0 else None
                if stats is None or stats["fragment_stats"]["num_fragments"] < max(FEW, stats["num_rows"] // 1000):
                    return
            start = time.time_ns()
            self._table.optimize(cleanup_older_than=timedelta(days=36500))
            flush(self.path / f"{TABLE}.lance", start)  # before the old files go
            self._table.optimize(cleanup_older_than=timedelta(milliseconds=1), delete_unverified=True)
            for left in (self.path / f"{TABLE}.lance").rglob(".tmp*"):  # by a kill; LanceDB does not know them
                left.unlink()

    def _retry(self, read: Any) -> Any:
        for left in reversed(range(TRIES)):
            try:
                with lance(f"cannot read the memory at {self.path}"):
                    return read()
            except LmpatchError:
                if not left:
                    raise
                self.latest()
        raise AssertionError


def table(rows: list[dict[str, Any]], vectors: np.ndarray | None, width: int) -> pa.Table:
    """Rows as the log takes them; those beyond the vectors have none."""
    import numpy as np
    import pyarrow as pa

    given = 0 if vectors is None else len(vectors)
    flat = np.zeros((len(rows), width), np.float16)
    if vectors is not None:
        flat[:given] = vectors
    without = pa.array(np.arange(len(rows)) >= given)
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), width, mask=without)
    columns = [pa.array([row[name] for row in rows]) for name in TEXTS]
    return pa.table([*columns, column], schema=_schema(width))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Be the only writer. The system frees the lock of a process that dies.

    Raises:
        LmpatchError: another process writes for minutes, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise LmpatchError(
            f"another process has been writing to {path} for {PATIENCE:.0f} s. Try again later."
        ) from None
    except OSError as error:
        raise LmpatchError(f"cannot write to {path}: {error.strerror}.") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def lance(failed: str, full: str = "") -> Iterator[None]:
    """LanceDB's errors as ``LmpatchError``: what failed, and after a full disk what is left."""
    try:
        yield
    except LmpatchError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        text = " ".join(str(error).split())
        if any(sign in text for sign in FULL):
            raise LmpatchError(f"{failed}: the disk is full. {full}") from error
        raise LmpatchError(f"{failed}: {text[:300]}") from error


def flush(folder: Path, since: int) -> None:
    """Have on the disk whatever was written below ``folder`` since this time (ns); LanceDB leaves it to the system."""
    since -= 50_000_000  # the clock of the file system is coarse
    for file in (folder, *folder.rglob("*")):
        if file.stat().st_mtime_ns >= since:
            sync(file)


def _exists(path: Path) -> bool:
    """Whether a memory was made here; a killed creation leaves a folder without a manifest."""
    return any((path / f"{TABLE}.lance" / "_versions").glob("*.manifest"))


def _open(path: Path) -> Any:
    connect = _lancedb().connect
    if not _exists(path):
        raise BadInput(f"there is no memory at {path}. Give the folder of one, or make it first.")
    with lance(f"cannot open the memory at {path}"):
        return connect(str(path)).open_table(TABLE)


def _lancedb() -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise MissingExtra('a memory needs LanceDB. Run: pip install "lmpatch[memory]"') from error
    return lancedb


def _schema(width: int, metadata: dict[bytes, bytes] | None = None) -> pa.Schema:
    import pyarrow as pa

    numbers = {"seq": pa.int64(), "version": pa.int64()}
    fields = [pa.field(name, numbers.get(name, pa.string()), nullable=False) for name in TEXTS]
    return pa.schema([*fields, pa.field("vector", pa.list_(pa.float16(), width))], metadata=metadata)


def _matrix(column: Any, width: int) -> np.ndarray:
    """A column of vectors without nulls as [n, width]."""
    flat = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    matrix: np.ndarray = flat.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return matrix
