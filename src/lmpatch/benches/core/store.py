"""Where a bench keeps its rows: a folder of JSON lines that survives an interruption.

    rows.jsonl     one line per question
    chunks.jsonl   one line per finished chunk, with count and hash of its rows. Rows of other chunks do not count
    runs.jsonl     one line per run: what it was and its numbers, with count and hash of its chunks so far

A run appends the rows of a chunk, then the chunk's line, each flushed to disk. Lines of chunks and runs end in a hash
of themselves. An interruption can leave only half a last line, or behind all others the rows of one chunk without its
line: they are cleared before the next line is written. Whatever else is missing, doubled or changed is refused, and
nothing is written. Files may be packed as ``.jsonl.gz``; what is added later stands beside them.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock, Timeout

from ...errors import BadInput, BadRecord
from ...files import outside, read_bytes, replacing
from ...provenance import hash_json
from .contract import Json, Row

R = TypeVar("R", bound=Row)
FIELDS: Mapping[str, Mapping[str, type]] = {
    "runs": {"run_id": str, "comparable_group": str, "settings": dict, "chunks": int, "chunks_hash": str},
    "chunks": {"run_id": str, "chunk": int, "rows": int, "rows_hash": str},
    "rows": {"run_id": str, "chunk": int},
}
SEAL = "sha256"
OTHER = {"data_hash": "other records", "base_weights_hash": "another model", "patches": "other patches"}
LOCK = ".lock"


@contextmanager
def alone(folder: Path | None) -> Iterator[None]:
    """No other run is at work in the folder inside the block. The system frees the lock of a process that dies.

    Raises:
        BadInput: another is, in this process or in another.
    """
    with ExitStack() as stack:
        try:
            if folder is not None and not folder.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(folder / LOCK, timeout=0))
        except Timeout:
            raise BadInput(f"another run is at work in {folder}. Wait for its end, or choose another folder.") from None
        except OSError:  # nobody can write there, which the store says where it matters
            pass
        yield


class Store(Generic[R]):
    """The folder, or only memory without one. Who writes is ``alone`` there."""

    def __init__(self, folder: Path | None, read: Callable[[Json], R]) -> None:
        """Open the folder. ``read`` makes a row of its JSON form.

        Raises:
            BadInput: the folder is none; ``BadRecord`` where its files are damaged, or another bench's.
        """
        self.folder = folder
        self.runs: dict[str, Json] = {}
        self.chunks: dict[tuple[str, int], Json] = {}
        self.rows: dict[tuple[str, int], list[R]] = {}
        """Of finished chunks."""
        self._unclean = False
        if folder is not None:
            with outside(f"the folder of results {folder}", BadRecord):
                if folder.exists() and not folder.is_dir():
                    raise BadInput(f"{folder} is a file. Give a folder for the results.")
                self._load(read)

    def _load(self, read: Callable[[Json], R]) -> None:
        runs, chunks, records = (self._read(name) for name in FIELDS)
        self.runs = {run["run_id"]: run for run in runs}
        self.chunks = {_key(chunk): chunk for chunk in chunks}
        groups: dict[tuple[str, int], list[Json]] = {key: [] for key in self.chunks}
        for record in records:
            groups.setdefault(_key(record), []).append(record)
        with outside(f"{self.folder}/rows.jsonl, written by another bench or another version,", BadRecord):
            rows = {key: [read(record) for record in group] for key, group in groups.items()}
        self.rows = {key: rows.pop(key) for key in self.chunks}
        self._unclean |= bool(rows)  # what is left was being written
        ends = [_key(record) for record in records[len(records) - sum(map(len, rows.values())) :]]
        if len(runs) + len(chunks) > len(self.runs) + len(self.chunks):
            raise self._damaged("a line of runs.jsonl or chunks.jsonl stands there twice")
        if missing := {name for name, _ in groups} - self.runs.keys():
            raise self._damaged(f"the run {missing.pop()!r} has no line in runs.jsonl")
        if len({*rows, *ends}) > 1:
            raise self._damaged("rows.jsonl holds rows of chunks that have no line in chunks.jsonl")
        for (name, number), chunk in self.chunks.items():
            if hash_json(group := groups[name, number]) != chunk["rows_hash"]:
                raise self._damaged(
                    f"rows.jsonl holds {len(group)} rows of chunk {number} of the run {name!r}, and they are not the "
                    f"{chunk['rows']} that were written"
                )
        for name, run in self.runs.items():
            if self._sealed(name, run["chunks"])["chunks_hash"] != run["chunks_hash"]:
                raise self._damaged(f"chunks.jsonl lacks some of the {run['chunks']} chunks of the run {name!r}")

    def _damaged(self, why: str) -> BadRecord:
        return BadRecord(f"{self.folder} was damaged: {why}. Restore it from a copy, or choose another folder.")

    def _sealed(self, name: str, count: int | None = None) -> Json:
        """Number and hash of a run's chunks, of the first ones where more were added later."""
        chunks = [chunk for (run, _), chunk in self.chunks.items() if run == name][:count]
        return {"chunks": len(chunks), "chunks_hash": hash_json(chunks)}

    def open_run(self, identity: Json) -> None:
        """Begin or go on with the run of this record; ``BadInput`` where the folder holds runs that cannot be compared,
        or this run with other settings."""
        name, group = identity["run_id"], identity["comparable_group"]
        for other in self.runs.values():
            if other["comparable_group"] != group:
                raise BadInput(
                    f"{self.folder} holds the run {other['run_id']!r} made with {_differs(other, identity)}. "
                    "Numbers of both cannot share a table. Choose another folder."
                )
        known = self.runs.get(name)
        if known and known["settings"] != identity["settings"]:
            raise BadInput(
                f"{self.folder} holds the run {name!r} with other settings: {_differs(known, identity)}. "
                "Choose another run_id or another folder."
            )
        if not known:
            self.put_run(identity)

    def put_run(self, record: Json) -> None:
        """Write a run's record, in place of an older one."""
        name = record["run_id"]
        self.runs[name] = _plain(record | self._sealed(name))
        self._write("runs", self.runs.values(), anew=True)

    def add(self, chunk: Json, rows: Sequence[R]) -> None:
        """Keep a finished chunk, sealed by count and hash of its rows."""
        records = [asdict(row) for row in rows]
        chunk = _plain(chunk | {"rows": len(rows), "rows_hash": hash_json(records)})
        self._write("rows", records)
        self._write("chunks", [chunk])
        self.chunks[_key(chunk)], self.rows[_key(chunk)] = chunk, list(rows)

    def rows_of(self, run_id: str) -> list[R]:
        """All rows of finished chunks, in order."""
        return [row for key in sorted(self.rows) if key[0] == run_id for row in self.rows[key]]

    def chunks_of(self, run_id: str) -> list[Json]:
        """Records of finished chunks, in order."""
        return [self.chunks[key] for key in sorted(self.chunks) if key[0] == run_id]

    def _read(self, name: str) -> list[Json]:
        assert self.folder is not None
        path, packed, data = self.folder / f"{name}.jsonl", self.folder / f"{name}.jsonl.gz", b""
        if os.path.lexists(packed):
            with outside(str(packed), BadRecord):
                data = gzip.decompress(read_bytes(packed, error=BadRecord))
        if os.path.lexists(path):
            own = read_bytes(path, error=BadRecord)
            data = own if name == "runs" or own.startswith(data) else data + own  # a kill may leave both
        whole = data[: data.rfind(b"\n") + 1]
        self._unclean |= whole != data
        records = []
        for number, line in enumerate(whole.splitlines(), 1):
            with outside(f"{path} line {number}", BadRecord):
                record = json.loads(line)
                seal = record.pop(SEAL, None) if isinstance(record, dict) and name != "rows" else None
                if not isinstance(record, dict) or (name != "rows" and seal != hash_json(record)):
                    raise self._damaged(
                        f"{name}.jsonl line {number} does not match its own hash, or has none, as in release 0.1"
                    )
                if wrong := [key for key, form in FIELDS[name].items() if not isinstance(record.get(key), form)]:
                    raise self._damaged(f"{name}.jsonl line {number} has no right {', '.join(wrong)}")
            records.append(record)
        return records

    def _write(self, name: str, records: Iterable[Json], anew: bool = False) -> None:
        if self.folder is None:
            return
        if self._unclean:
            self._unclean = False
            self._write("chunks", self.chunks.values(), anew=True)
            self._write("rows", (asdict(row) for group in self.rows.values() for row in group), anew=True)
        path = self.folder / f"{name}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, BadInput) if anew else nullcontext(path) as work, work.open("ab") as file:
                for record in records:
                    whole = record if name == "rows" else {**record, SEAL: hash_json(record)}
                    file.write(json.dumps(whole, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if anew:
                path.with_suffix(".jsonl.gz").unlink(missing_ok=True)  # it is in the plain file now
        except BadInput:
            raise
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} cannot be written ({error}). Choose another folder, or make room.") from error


def _key(record: Json) -> tuple[str, int]:
    return record["run_id"], record["chunk"]


def _plain(record: Json) -> Json:
    """As it is read back, so that its hash is the same."""
    return dict(json.loads(json.dumps(record)))


def _differs(known: Json, asked: Json) -> str:
    """What was asked otherwise, as a person reads it; a hash tells a person nothing."""
    before, now, parts = known["settings"], asked["settings"], []
    for key in now:
        if (a := before.get(key)) != (b := now[key]):
            parts.append(OTHER.get(key) or "; ".join(_changes(key, a, b)))
    return "; ".join(parts) or "other settings"


def _changes(key: str, a: Any, b: Any) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [text for k in {**a, **b} if a.get(k) != b.get(k) for text in _changes(k, a.get(k), b.get(k))]
    return [f"{key} {a!r}, asked now {b!r}"]
