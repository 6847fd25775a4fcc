"""The log of a memory: one LanceDB table whose rows are only ever appended, under a lock, and flushed to the disk.

A commit is one append: a data file and a manifest that names it appear, or nothing does. Rows are numbered without
gaps in the order of their commits, because a writer holds the lock while it looks up the last number. Of all rows with
one key the last one holds; if it drops the fact, none does.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import BadInput, LmpatchError, MissingExtra
from ..files import sync
from ..provenance import now

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
Row = dict[str, Any]

FORMAT = 1
TABLE, LOCK = "facts", "lock"
TEXTS = ("seq", "version", "op", "key", "prompt", "target", "subject", "more", "source", "added")
PATIENCE = 600.0  # seconds to wait for another writer, who may be building an index
TRIES = 5  # a reader whose files were compacted away looks for the newer ones
FULL = ("No space left", "File too large", "quota exceeded", "os error 28", "os error 27", "os error 122")
EVERY, FEW = 16, 64  # commits between two looks at the number of data files; that many are always left alone
CHUNKS, BATCH = 64, 8192  # pieces the texts may be in; vectors read at a time


class Log:
    """The table of one folder, and what it holds, as of the last ``refresh``.

    The rows already read can never change, so only new ones are read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        connect = lancedb().connect
        if not _exists(path):
            raise BadInput(f"there is no memory at {path}. Give the folder of one, or make it first.")
        with lance(f"cannot open the memory at {path}"):
            self._table = connect(str(path)).open_table(TABLE)
        meta = json.loads((self._table.schema.metadata or {}).get(b"lmpatch", b"{}"))
        if meta.get("format") != FORMAT:
            raise BadInput(f"{path} has format {meta.get('format')!r}, this lmpatch reads {FORMAT}. Update lmpatch.")
        self.width: int = meta["width"]
        self.matched: int = meta["matched"]
        self.stamp: dict[str, str] = meta["stamp"]
        self._seen = self._latest()  # LanceDB's number of the last commit that was read
        self.texts: pa.Table = self.read(0)  # every row without its vector; row i is number i
        self.live: dict[str, int] = {}  # key -> number of the row that holds, oldest first
        self.ended = [*_replay(self.texts, self.live)]  # numbers of facts that no longer hold, as they ended

    @classmethod
    def create(cls, path: Path, width: int, matched: int, stamp: dict[str, str]) -> Log:
        """Make the folder. What a killed creation left there is written over."""
        begun = (path / f"{TABLE}.lance").is_dir()
        if path.exists() and not begun and (path.is_file() or {*os.listdir(path)} - {LOCK}):
            raise BadInput(f"{path} exists and is no memory. Give another path.")
        connect = lancedb().connect
        path.mkdir(parents=True, exist_ok=True)
        with writing(path):
            if _exists(path):
                raise BadInput(f"there is a memory at {path} already. Open it, or give another path.")
            meta = {"format": FORMAT, "width": width, "matched": matched, "stamp": stamp}
            schema = _schema(width).with_metadata({"lmpatch": json.dumps(meta)})
            start = time.time_ns()
            with lance(f"cannot make a memory at {path}", full="Nothing was made."):
                connect(str(path)).create_table(TABLE, schema=schema, mode="overwrite" if begun else "create")
            flush(path, start)
        return cls(path)

    # What it holds

    @property
    def count(self) -> int:
        """Rows of the log."""
        return len(self.texts)

    @property
    def version(self) -> int:
        """The number of the last commit; 0 before the first."""
        return self.texts["version"][-1].as_py() if self.count else 0

    def rows(self, seqs: Sequence[int]) -> list[Row]:
        """Rows by number."""
        return self.texts.take(list(seqs)).to_pylist() if len(seqs) else []

    def alive(self) -> np.ndarray:
        """[count] whether each row is a fact that holds."""
        alive = np.zeros(self.count, dtype=bool)
        alive[np.fromiter(self.live.values(), np.int64, len(self.live))] = True
        return alive

    def length(self, version: int) -> int:
        """How many rows the log had after a version. Raises ``BadInput`` where there is none."""
        if not 0 <= version <= self.version:
            raise BadInput(f"there is no version {version}. There are 0, which is empty, to {self.version}.")
        return int(np.searchsorted(self.texts["version"], version, side="right"))

    def live_after(self, version: int) -> dict[str, int]:
        """``live`` as it was after a version."""
        live: dict[str, int] = {}
        [*_replay(self.texts.slice(0, self.length(version)), live)]
        return live

    # Reading

    def refresh(self) -> Log:
        """Read what any process committed since the last look."""
        seen = self._latest()
        if seen != self._seen:
            self._take(self.read(self.count), seen)
        return self

    def read(self, since: int) -> pa.Table:
        """All columns but the vectors of rows ``since`` and later, in order."""
        where = f"seq >= {since}"
        return self._read(
            lambda: self._table.search().where(where).select(list(TEXTS)), lambda n: range(since, since + n)
        )

    def vectors(self, seqs: Sequence[int]) -> np.ndarray:
        """Vectors [n, width] float16 of these rows, which must be facts."""
        wanted = sorted({*seqs})
        if not wanted:
            return np.empty((0, self.width), np.float16)
        rows = self._read(lambda: self._table.take_offsets(wanted).select(["seq", "vector"]), lambda _: wanted)
        return matrix(rows["vector"])[np.searchsorted(wanted, seqs)]

    def live_batches(self, since: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers [n], what is compared of their vectors [n, M] float16) of the facts that hold, from a row on."""
        alive = self.alive()
        rows = f"seq >= {since} AND seq < {len(alive)} AND op = 'put'"
        with lance(f"cannot read the memory at {self.path}"):
            for batch in self._table.search().where(rows).select(["seq", "vector"]).to_batches(BATCH):
                seqs = batch["seq"].to_numpy()
                yield seqs[alive[seqs]], matrix(batch["vector"])[alive[seqs], : self.matched]

    def retry(self, read: Callable[[], T]) -> T:
        """What ``read`` returns; tried again where another process compacted its files away or replaced the index."""
        for _ in range(TRIES - 1):
            try:
                return read()
            except BadInput:
                raise
            except LmpatchError:
                self._latest()
        return read()

    # Writing: under ``writing`` alone

    def append(self, changes: Sequence[Row], vectors: np.ndarray | None) -> int:
        """Commit rows, of which the first have these vectors; returns the new version.

        Raises:
            LmpatchError: the disk is full or cannot be written. Nothing was stored.
        """
        version, start = self.version + 1, time.time_ns()
        stamp = {"version": version, "added": now()}
        rows = _table([{"seq": self.count + i, **stamp, **row} for i, row in enumerate(changes)], vectors, self.width)
        with lance(f"cannot add to the memory at {self.path}", full="Nothing was stored; the memory is as before."):
            self._table.add(rows)
            seen = int(self._table.version)
        flush(self.path / f"{TABLE}.lance", start)
        self._take(rows.drop_columns("vector"), seen)
        return version

    def tidy(self, *, always: bool = True) -> None:
        """Join small data files and delete what no row needs.

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

    def _latest(self) -> int:
        """Look at the newest commit of any process; its number in LanceDB."""
        with lance(f"cannot read the memory at {self.path}"):
            self._table.checkout_latest()
            return int(self._table.version)

    def _take(self, rows: pa.Table, seen: int) -> None:
        """Take in new rows of commits up to LanceDB's number ``seen``."""
        import pyarrow as pa

        self.ended.extend(_replay(rows, self.live))
        self.texts = pa.concat_tables([self.texts, rows])
        if self.texts["seq"].num_chunks > CHUNKS:
            self.texts = self.texts.combine_chunks()
        self._seen = seen

    def _read(self, query: Callable[[], Any], numbers: Callable[[int], Sequence[int]]) -> pa.Table:
        """The rows of a query, in their order; ``numbers`` says which so many must be."""

        def read() -> pa.Table:
            with lance(f"cannot read the memory at {self.path}"):
                return query().to_arrow().sort_by("seq")

        rows = self.retry(read)
        if not np.array_equal(rows["seq"], numbers(len(rows))):  # rows stand in the order of their numbers
            raise LmpatchError(f"the memory at {self.path} lacks rows of its log. Take a fresh copy of the folder.")
        return rows


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
        why = f"another process has been writing to {path} for {PATIENCE:.0f} s. Try again later."
        raise LmpatchError(why) from None
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
        why = f"the disk is full. {full}" if any(sign in text for sign in FULL) else text[:300]
        raise LmpatchError(f"{failed}: {why}") from error


def flush(folder: Path, since: int) -> None:
    """Have on the disk whatever was written below ``folder`` since this time (ns); LanceDB leaves it to the system."""
    since -= 50_000_000  # the clock of the file system is coarse
    for file in (folder, *folder.rglob("*")):
        if file.stat().st_mtime_ns >= since:
            sync(file)


def lancedb() -> Any:
    """The package, where it is installed."""
    try:
        import lancedb
    except ImportError as error:
        raise MissingExtra('a memory needs LanceDB. Run: pip install "lmpatch[memory]"') from error
    return lancedb


def matrix(column: Any) -> np.ndarray:
    """A column of vectors without nulls as [n, width]."""
    flat = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    made: np.ndarray = flat.flatten().to_numpy(zero_copy_only=False).reshape(-1, flat.type.list_size)
    return made


def _exists(path: Path) -> bool:
    """Whether a memory was made here; a killed creation leaves a folder without a manifest."""
    return any((path / f"{TABLE}.lance" / "_versions").glob("*.manifest"))


def _replay(rows: pa.Table, live: dict[str, int]) -> Iterator[int]:
    """Let rows act on ``live``; yields the numbers of facts that end."""
    for seq, op, key in zip(*(rows[name].to_pylist() for name in ("seq", "op", "key")), strict=True):
        old = live.pop(key, None)
        if op == "put":
            live[key] = seq
        if old is not None:
            yield old


def _table(rows: list[Row], vectors: np.ndarray | None, width: int) -> pa.Table:
    """Rows as the log takes them; those beyond the vectors have none."""
    import pyarrow as pa

    given = 0 if vectors is None else len(vectors)
    flat = np.zeros((len(rows), width), np.float16)
    flat[:given] = 0 if vectors is None else vectors
    without = pa.array(np.arange(len(rows)) >= given)
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), width, mask=without)
    return pa.table([*(pa.array([row[name] for row in rows]) for name in TEXTS), column], schema=_schema(width))


def _schema(width: int) -> pa.Schema:
    import pyarrow as pa

    numbers = {"seq": pa.int64(), "version": pa.int64()}
    fields = [pa.field(name, numbers.get(name, pa.string()), nullable=False) for name in TEXTS]
    return pa.schema([*fields, pa.field("vector", pa.list_(pa.float16(), width))])
