"""Rows of a run: kept small and read again. A row answers one prompt; every printed number is a mean over rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results"
"""What is committed."""
WORK = HERE / "work"
"""Where runs are made and resumed; git ignores it."""
Row = dict[str, Any]

KEYS: dict[str, tuple[str, ...]] = {
    "case_id": ("case_id", "kind", "prompt"),
    "place": ("place", "when"),
    "task": ("task", "protocol", "id"),
    "condition": ("condition", "id"),
}
"""Field by which a bench is told -> fields that name one prompt, whoever answers it."""
SHARED: dict[str, tuple[str, ...]] = {
    "case_id": ("aliases", "old_aliases"),
    "place": ("answer", "memory", "closed", "id", "other"),
    "task": ("source", "gold"),
    "condition": ("article", "question", "wanted", "own", "known"),
}
"""Fields that are written once, with the unpatched model's row."""
DIGITS = {"tf_acc": 5, "tf_same": 5, "tf_new": 5, "tf_old": 5, "kl": 5, "value": 6}
"""Significant digits of the numbers that a model gives."""
KEPT_EMPTY = {
    "text", "said", "em", "contains", "old_first", "was_right", "kept", "value", "tf_acc", "tf_same", "kl",
    "hit", "exact",
}  # fmt: skip
"""Fields in which empty, false or 0 is an answer. Others are left out where they are so, and null always is."""


def keep(work: Path, kept: Path) -> None:
    """Write the rows and records of a run's folder to where they are committed.

    ``rows.jsonl.gz`` has the same bytes for the same rows; ``runs.jsonl`` loses the numbers, which rows give.
    """
    kept.mkdir(parents=True, exist_ok=True)
    lines = (work / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    text = "".join(_line(row) for row in _small([json.loads(line) for line in lines]))
    (kept / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    runs = [json.loads(line) for line in (work / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    bare = [{key: value for key, value in run.items() if key != "metrics"} for run in runs]
    (kept / "runs.jsonl").write_text("".join(_line(run) for run in bare), encoding="utf-8")


def write_lines(path: Path, lines: Iterable[Row]) -> None:
    """Whole or not at all; the same lines give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(_line(line) for line in lines)
    part = path.with_suffix(".part")
    part.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    part.replace(path)


def read_lines(path: Path) -> list[Row]:
    """The lines of a file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def _line(value: Row) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"


def _small(rows: list[Row]) -> Iterable[Row]:
    name = _bench(rows)
    base = {_key(row, name): row for row in rows if row["run_id"] == "none"}
    for row in rows:
        row, own = dict(row), base.get(_key(row, name), {})
        if row["run_id"] != "none":
            row = {k: v for k, v in row.items() if k not in SHARED[name] or v != own.get(k)}
        if row.get("base_text") == own.get("text"):
            row.pop("base_text", None)
        if name == "place":
            row.pop("scores")  # the letter with the highest one is what was said
        if "scores" in row:
            row["scores"] = [round(score, 3) for score in row["scores"]]
        for key in DIGITS.keys() & row.keys():
            row[key] = row[key] if row[key] is None else float(f"{row[key]:.{DIGITS[key]}g}")
        yield {k: v for k, v in row.items() if v is not None and (v not in ("", [], 0) or k in KEPT_EMPTY)}


@lru_cache
def read(name: str, folder: Path = RESULTS) -> tuple[Row, ...]:
    """Every row of a run's folder, with the fields it shares with the unpatched model's.

    Args:
        name: below ``folder``, e.g. ``facts-single``.
    """
    with gzip.open(folder / name / "rows.jsonl.gz", "rt", encoding="utf-8") as file:
        rows: list[Row] = [json.loads(line) for line in file]
    bench = _bench(rows)
    base = {_key(row, bench): row for row in rows if row["run_id"] == "none"}
    for row in rows:
        own = base.get(_key(row, bench), {})
        for key in SHARED[bench]:
            if key in own:
                row.setdefault(key, own[key])
        if bench == "case_id" and "text" in own:
            row.setdefault("base_text", own["text"])
    return tuple(rows)


def of(name: str, run: str) -> list[Row]:
    """The rows of one run.

    Raises:
        KeyError: there is none.
    """
    found = [row for row in read(name) if row["run_id"] == run]
    if not found:
        raise KeyError(f"no run {run} in {name}; there are {', '.join({row['run_id'] for row in read(name)})}")
    return found


@lru_cache
def runs(name: str, folder: Path = RESULTS) -> dict[str, Row]:
    """Run -> how it was made: settings, versions, hardware, seconds."""
    lines = (folder / name / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    return {run["run_id"]: run for run in map(json.loads, lines)}


@lru_cache
def summary(name: str, folder: Path = RESULTS) -> Row:
    """A committed summary, e.g. ``speed.json``."""
    found: Row = json.loads((folder / name).read_text(encoding="utf-8"))
    return found


def _bench(rows: list[Row]) -> str:
    return next(name for name in KEYS if name in rows[0] or any(name in row for row in rows))


def _key(row: Row, name: str) -> tuple[Any, ...]:
    return tuple(row.get(key, 0 if key == "place" else "") for key in KEYS[name])
