"""Where a bench keeps its rows: a folder of JSON lines that survives an interruption.

    rows.jsonl     one line per question
    chunks.jsonl   one line per finished chunk, with count and hash of its rows. Rows of other chunks do not count
    runs.jsonl     one line per run: what it was and its numbers

A run appends the rows of a chunk, then the chunk's line, each flushed to disk. What an interruption leaves behind, half
a line or rows without their chunk, is cleared when the folder is opened again; rows that are missing or doubled are
refused. Files may be packed as ``.jsonl.gz``; what is added later stands beside them.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from ...errors import BadInput, BadRecord
from ...files import replacing
from ...provenance import hash_json
from .contract import Json, Row

R = TypeVar("R", bound=Row)


class Store(Generic[R]):
    """The folder, or only memory without one. One process writes at a time."""

    def __init__(self, folder: Path | None, read: Callable[[Json], R]) -> None:
        """Open the folder, or begin it. ``read`` makes a row of its JSON form; TypeError: it is another bench's."""
        self.folder = folder
        self.runs: dict[str, Json] = {}
        self.chunks: dict[tuple[str, int], Json] = {}
        self.rows: dict[tuple[str, int], list[R]] = {}
        """Of finished chunks."""
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"{folder} is a file. Give a folder for the results.")
        folder.mkdir(parents=True, exist_ok=True)
        self.runs = {run["run_id"]: run for run in self._read("runs")}
        self.chunks = {(chunk["run_id"], chunk["chunk"]): chunk for chunk in self._read("chunks")}
        groups: dict[tuple[str, int], list[Json]] = {key: [] for key in self.chunks}
        records = self._read("rows")
        try:
            for record in records:
                groups.setdefault((record["run_id"], record["chunk"]), []).append(record)
            rows = {key: [read(record) for record in group] for key, group in groups.items()}
        except (TypeError, KeyError) as error:
            raise BadRecord(
                f"{folder}/rows.jsonl was written by another bench or another version ({error}). Choose another folder."
            ) from error
        for (name, number), chunk in self.chunks.items():
            seal, group = chunk.get("rows_hash"), groups[name, number]  # folders of the first release have none
            if seal and seal != hash_json(group):
                raise BadRecord(
                    f"{folder}/rows.jsonl holds {len(group)} rows of chunk {number} of the run {name!r}, and they "
                    f"are not the {chunk['rows']} that were written. Remove the chunk's line in chunks.jsonl to ask it "
                    "again, or choose another folder."
                )
        self.rows = {key: rows[key] for key in self.chunks}
        if len(self.rows) < len(rows):
            self._rewrite("rows", (asdict(row) for group in self.rows.values() for row in group))

    def open_run(self, identity: Json) -> None:
        """Begin or go on with the run of this record; ``BadInput`` where the folder holds runs that cannot be compared,
        or this run with other settings."""
        name, group = identity["run_id"], identity["comparable_group"]
        for other in self.runs.values():
            if other["comparable_group"] != group:
                raise BadInput(
                    f"{self.folder} holds the run {other['run_id']!r} made with {_differs(other, identity, identity)}. "
                    "Numbers of both cannot share a table. Choose another folder."
                )
        known = self.runs.get(name)
        if known and known["settings"] != identity["settings"]:
            raise BadInput(
                f"{self.folder} holds the run {name!r} with other settings: {_differs(known, identity, identity)}. "
                "Choose another run_id or another folder."
            )
        if not known:
            self.put_run(identity)

    def put_run(self, record: Json) -> None:
        """Write a run's record, in place of an older one."""
        self.runs[record["run_id"]] = record
        self._rewrite("runs", self.runs.values())

    def add(self, chunk: Json, rows: Sequence[R]) -> None:
        """Keep a finished chunk, sealed by count and hash of its rows."""
        records = [asdict(row) for row in rows]
        chunk = chunk | {"rows": len(rows), "rows_hash": hash_json(records)}
        self._append("rows", records)
        self._append("chunks", [chunk])
        key = chunk["run_id"], chunk["chunk"]
        self.chunks[key], self.rows[key] = chunk, list(rows)

    def rows_of(self, run_id: str) -> list[R]:
        """All rows of finished chunks, in order."""
        return [row for key in sorted(self.rows) if key[0] == run_id for row in self.rows[key]]

    def chunks_of(self, run_id: str) -> list[Json]:
        """Records of finished chunks, in order."""
        return [self.chunks[key] for key in sorted(self.chunks) if key[0] == run_id]

    def _read(self, name: str) -> list[Json]:
        assert self.folder is not None
        path, packed = self.folder / f"{name}.jsonl", self.folder / f"{name}.jsonl.gz"
        data = gzip.decompress(packed.read_bytes()) if packed.is_file() else b""
        if path.is_file():
            own = path.read_bytes()
            whole = own[: own.rfind(b"\n") + 1]
            if len(whole) < len(own):
                with path.open("r+b") as file:
                    file.truncate(len(whole))
            data += whole
        records = []
        for number, line in enumerate(data.splitlines(), 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise BadRecord(f"{path} line {number} is no JSON ({error}). Remove the line or the folder.") from error
        return records

    def _append(self, name: str, records: Iterable[Json]) -> None:
        if self.folder:
            with (self.folder / f"{name}.jsonl").open("ab") as file:
                _write(file, records)

    def _rewrite(self, name: str, records: Iterable[Json]) -> None:
        if self.folder:
            path = self.folder / f"{name}.jsonl"
            with replacing(path) as work, work.open("wb") as file:
                _write(file, records)
            path.with_suffix(".jsonl.gz").unlink(missing_ok=True)  # it is in the plain file now


def _write(file: Any, records: Iterable[Json]) -> None:
    file.writelines(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
    file.flush()
    os.fsync(file.fileno())


def _differs(known: Mapping[str, Any], asked: Mapping[str, Any], keys: Iterable[str]) -> str:
    """What of a run was asked otherwise, as a person reads it."""
    parts = []
    for key in sorted(keys):
        a, b = known.get(key), asked.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            parts += [_differs(a, b, {*a, *b})] if a != b else []
        elif a != b and key not in ("run_id", "comparable_group", "started", "versions", "hardware"):
            parts.append(f"{key} {a!r}, asked now {b!r}")
    return "; ".join(parts) or "other settings"
