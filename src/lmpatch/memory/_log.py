"""The log of a memory: one LanceDB table whose rows are only ever appended, under a lock, and flushed to the disk.

A commit is one append: a data file and a manifest that names it appear, or nothing does. Rows are numbered without
gaps in the order of their commits, because a writer holds the lock while it looks up the last number. A row ends the
earlier ones with its key whose time overlaps its own; those without a time, which is most, are of all times.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from filelock import FileLock

from ..errors import BadInput, LmpatchError
from ..provenance import hash_json, now
from ._lance import flush, lance, lancedb, matrix, writing
from ._live import EVER, Bounds, Live, replay, spans_of

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
Row = dict[str, Any]

FORMAT = 1
TABLE, LOCK = "facts", "lock"
TEXTS = ("seq", "version", "op", "key", "prompt", "target", "subject", "more", "source", "added")
TRIES = 5  # a reader whose files were compacted away looks for the newer ones
EVERY, FEW = 16, 64  # commits between two looks at the number of data files; that many are always left alone
MARKED = 64  # last rows that tell one log from another
WIDEST = 2**20  # components of a key
CHUNKS, BATCH = 64, 8192  # pieces the texts may be in; vectors read at a time


class Log:
    """The table of one folder, and what it holds, as of the last ``refresh``.

    The rows already read can never change, so only new ones are read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, FileLock(path / LOCK)
        self._table: Any = None
        failed = f"cannot open the memory at {path}"
        with lance(failed):
            connect = lancedb().connect
            if not _exists(path):
                raise BadInput(f"there is no memory at {path}. Give the folder of one, or make it first.")
        self._table = self.retry(lambda: connect(str(path)).open_table(TABLE), failed)
        meta = _metadata(self._table.schema)
        if meta.get("format", FORMAT) != FORMAT:
            raise BadInput(f"{path} has format {meta['format']!r}, this lmpatch reads {FORMAT}. Update lmpatch.")
        if not meta:
            raise BadInput(f"the metadata of the memory at {path} is damaged. Take a fresh copy of the folder.")
        self.width: int = meta["width"]
        self.matched: int = meta["matched"]
        self.stamp: dict[str, str] = meta["stamp"]
        self._seen = self._latest()  # LanceDB's number of the last commit that was read
        self.texts: pa.Table = self.read(0)  # every row without its vector; row i is number i
        self.spans: dict[int, Bounds] = spans_of(self.texts)  # of the rows that have a time, in seconds since 1970
        self.live = Live(self.spans)
        self.ended = [*replay(self.texts, self.live)]  # numbers of facts that no longer hold, as they ended

    @classmethod
    def create(cls, path: Path, width: int, matched: int, stamp: dict[str, str]) -> Log:
        """Make the folder. What a killed creation left there is written over."""
        with lance(f"cannot make a memory at {path}", full="Nothing was made."):
            begun = (path / f"{TABLE}.lance").is_dir()
            if path.exists() and not begun and (path.is_file() or {*os.listdir(path)} - {LOCK}):
                raise BadInput(f"{path} exists and is no memory. Give another path.")
            connect = lancedb().connect
            path.mkdir(parents=True, exist_ok=True)
            with writing(FileLock(path / LOCK)):
                if _exists(path):
                    raise BadInput(f"there is a memory at {path} already. Open it, or give another path.")
                meta = {"format": FORMAT, "width": width, "matched": matched, "stamp": stamp}
                schema = _schema(width).with_metadata({"lmpatch": json.dumps(meta)})
                start = time.time_ns()
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

    def mark(self, count: int) -> str:
        """A hash that tells the first so many rows from those of another log."""
        return hash_json(self.rows(range(max(0, count - MARKED), count)))

    def alive(self) -> np.ndarray:
        """[count] whether each row is a fact that holds."""
        alive = np.zeros(self.count, dtype=bool)
        alive[self.live.seqs()] = True
        return alive

    def holds(self, seqs: np.ndarray, at: float | None) -> np.ndarray:
        """[n] whether each of these rows is a fact that holds, in seconds since 1970; None: at any time."""
        keys = self.texts["key"].take(seqs).to_pylist()
        spans = [self.spans.get(seq, EVER) for seq in seqs.tolist()]
        return np.array(
            [
                seq in self.live.rows(key) and (at is None or start <= at < end)
                for seq, key, (start, end) in zip(seqs.tolist(), keys, spans, strict=True)
            ],
            bool,
        )

    def length(self, version: int) -> int:
        """How many rows the log had after a version. Raises ``BadInput`` where there is none."""
        if not 0 <= version <= self.version:
            raise BadInput(f"there is no version {version}. There are 0, which is empty, to {self.version}.")
        return int(np.searchsorted(self.texts["version"], version, side="right"))

    def live_after(self, version: int) -> Live:
        """``live`` as it was after a version."""
        live = Live(self.spans)
        [*replay(self.texts.slice(0, self.length(version)), live)]
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
        from pyarrow.compute import utf8_normalize

        where = f"seq >= {since}"
        rows = self._read(
            lambda: self._table.search().where(where).select(list(TEXTS)), lambda n: range(since, since + n)
        )
        at = TEXTS.index("key")  # those of lmpatch 0.1 are not composed
        return rows.set_column(at, rows.schema.field(at), utf8_normalize(rows["key"], "NFC"))

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

    def retry(self, read: Callable[[], T], failed: str | None = None) -> T:
        """What ``read`` returns. Where it fails it is called again, since another process may have compacted or be
        writing what it reads; the last time no process writes.

        Args:
            failed: what to say of an error of LanceDB.
        """
        failed = failed or f"cannot read the memory at {self.path}"
        errors: list[LmpatchError] = []
        while True:
            last = len(errors) == TRIES - 1
            try:
                with self.writing() if last else nullcontext(), lance(failed):
                    if errors and self._table is not None:
                        self._table.checkout_latest()
                    return read()
            except BadInput:
                raise
            except LmpatchError as error:
                errors.append(error)
                if last:
                    raise errors[0] from None

    # Writing

    def writing(self) -> AbstractContextManager[None]:
        """Be the only writer: what follows is called under it alone."""
        return writing(self._lock)

    def append(self, changes: Sequence[Row], vectors: np.ndarray | None) -> int:
        """Commit rows, of which those that put a fact have these vectors; returns the new version.

        Raises:
            LmpatchError: the disk is full or cannot be written. Nothing was stored.
        """
        version, start = self.version + 1, time.time_ns()
        stamp = {"version": version, "added": now()}
        numbered = [{"seq": self.count + i, **stamp, **row} for i, row in enumerate(changes)]
        with lance(f"cannot add to the memory at {self.path}", full="Nothing was stored; the memory is as before."):
            rows = _table(numbered, vectors, self.width)
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

        def look() -> int:
            self._table.checkout_latest()
            return int(self._table.version)

        return self.retry(look)

    def _take(self, rows: pa.Table, seen: int) -> None:
        """Take in new rows of commits up to LanceDB's number ``seen``."""
        import pyarrow as pa

        self.spans.update(spans_of(rows))
        self.ended.extend(replay(rows, self.live))
        self.texts = pa.concat_tables([self.texts, rows])
        if self.texts["seq"].num_chunks > CHUNKS:
            self.texts = self.texts.combine_chunks()
        self._seen = seen

    def _read(self, query: Callable[[], Any], numbers: Callable[[int], Sequence[int]]) -> pa.Table:
        """The rows of a query, in their order; ``numbers`` says which so many must be."""
        rows = self.retry(lambda: query().to_arrow().sort_by("seq"))
        if not np.array_equal(rows["seq"], numbers(len(rows))):  # rows stand in the order of their numbers
            raise LmpatchError(f"the memory at {self.path} lacks rows of its log. Take a fresh copy of the folder.")
        return rows


def _exists(path: Path) -> bool:
    """Whether a memory was made here; a killed creation leaves a folder without a manifest."""
    return any(file.is_file() for file in (path / f"{TABLE}.lance" / "_versions").glob("*.manifest"))


def _metadata(schema: pa.Schema) -> dict[str, Any]:
    """What ``create`` wrote; of another format as it is, and nothing where it is damaged."""
    meta: Any = None
    with suppress(ValueError, RecursionError):
        meta = json.loads((schema.metadata or {}).get(b"lmpatch", b""))
    if not isinstance(meta, dict) or meta.get("format", FORMAT) != FORMAT:
        return meta if isinstance(meta, dict) else {}
    width, matched, stamp = (meta.get(name) for name in ("width", "matched", "stamp"))
    numbers = isinstance(width, int) and isinstance(matched, int) and 0 < matched <= width <= WIDEST
    texts = isinstance(stamp, dict) and all(isinstance(text, str) for text in stamp.values())
    return meta if numbers and texts and schema.equals(_schema(meta["width"])) else {}


def _table(rows: list[Row], vectors: np.ndarray | None, width: int) -> pa.Table:
    """Rows as the log takes them; those that put no fact have no vector."""
    import pyarrow as pa

    puts = np.array([row["op"] == "put" for row in rows], bool)
    flat = np.zeros((len(rows), width), np.float16)
    if vectors is not None:
        flat[puts] = vectors
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), width, mask=pa.array(~puts))
    return pa.table([*(pa.array([row[name] for row in rows]) for name in TEXTS), column], schema=_schema(width))


def _schema(width: int) -> pa.Schema:
    import pyarrow as pa

    numbers = {"seq": pa.int64(), "version": pa.int64()}
    fields = [pa.field(name, numbers.get(name, pa.string()), nullable=False) for name in TEXTS]
    return pa.schema([*fields, pa.field("vector", pa.list_(pa.float16(), width))])
