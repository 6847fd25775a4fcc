"""What ``integrated_gradients`` finds, in memory and as a file of JSON lines that a stopped run goes on from.

Each line holds the hash of itself and of the line before, so none can be altered, lost, doubled or moved unseen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import BadInput, BadRecord
from ...files import outside, read_bytes
from ...models.lm import LM
from ...patches.base import fingerprint
from ...patches.ledger import applied
from ...provenance import hash_json

SCHEMA = 2
SEAL = "sha256"


@dataclass(frozen=True)
class Credit:
    """The neurons that one record names."""

    neurons: tuple[tuple[int, int, float], ...]
    """(layer, index, score), the highest score first."""
    highest: float
    """The highest score of all neurons. Not positive: the record names none."""
    gap: float | None = None
    """How far credits are from adding up, |p_cq - p_q - sum| in the worst layer; None for ``endpoint``."""


@dataclass(frozen=True, repr=False)
class Scores:
    """One ``Credit`` a record."""

    header: dict[str, Any]
    """What was asked of which model: equal headers, equal scores."""
    records: tuple[Credit, ...]

    def __repr__(self) -> str:
        return f"Scores({len(self.records)} records, {sum(len(r.neurons) for r in self.records)} neurons)"

    def table(self) -> tuple[list[str], list[tuple[object, ...]]]:
        """Column names, and one row a record."""
        rows: list[tuple[object, ...]] = []
        for i, credit in enumerate(self.records):
            best = credit.neurons[0][:2] if credit.neurons else ("", "")
            rows.append((i, len(credit.neurons), credit.highest, *best, "" if credit.gap is None else credit.gap))
        return ["record", "neurons", "highest score", "in layer", "at index", "gap"], rows

    def save(self, folder: Path) -> None:
        """Write the file that ``run(..., out=path)`` writes, as ``integrated_gradients.jsonl`` of the folder."""
        lines = [line for line, _ in _sealed([self.header, *map(asdict, self.records)])]
        (folder / "integrated_gradients.jsonl").write_text("".join(lines), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read it.

        Raises:
            BadRecord: there is none, it was altered, or its run was stopped.
        """
        header, credits, _, _ = _read(Path(path))
        if len(credits) < header["count"]:
            raise BadRecord(
                f"{path} holds {len(credits)} of {header['count']} records: its run was stopped. Finish it."
            )
        return cls(header, tuple(credits))


def differing(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What scores that are there were made of otherwise."""
    return [key for key in asked if there.get(key) != asked[key]]


def header(lm: LM, data: Sequence[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the scores depend on: settings, model, patches on it, prompts and answers."""
    return {
        "schema": SCHEMA,
        "probe": "integrated_gradients",
        "config": dict(settings),
        "model": fingerprint(lm),
        "dtype": str(lm.dtype),
        "patches": [on.patch.hash() for on in applied(lm)],
        "records": hash_json([(r.prompt, r.without_context, r.answer) for r in data]),
        "count": len(data),
    }


class Log:
    """Credits as they come, kept on disk if there is a path."""

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.credits: list[Credit] = []
        self.seal = ""  # of the last line
        if path and path.exists():
            there, self.credits, self.seal, size = _read(path)
            if differ := differing(there, header):
                raise BadInput(
                    f"{path} holds scores of another run: {', '.join(differ)} differ. Give another file, or remove it."
                )
            with path.open("r+b") as file:
                file.truncate(size)
        elif path:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append([header])

    def add(self, found: Sequence[Credit]) -> None:
        """Append a batch."""
        self.credits += found
        if self.path:
            self._append(map(asdict, found))

    def _append(self, values: Iterable[Mapping[str, Any]]) -> None:
        assert self.path
        with self.path.open("a", encoding="utf-8") as file:
            for line, seal in _sealed(values, self.seal):
                file.write(line)
                self.seal = seal


def _sealed(values: Iterable[Mapping[str, Any]], before: str = "") -> Iterator[tuple[str, str]]:
    """Each value as a line, and the line's hash."""
    for value in values:
        before = hash_json([before, value])
        yield json.dumps({**value, SEAL: before}) + "\n", before


def _read(path: Path) -> tuple[dict[str, Any], list[Credit], str, int]:
    """Header, credits, the last line's hash, and the bytes they take; a last line that was cut off does not count."""
    text = read_bytes(path, error=BadRecord)
    lines = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)
    values: list[dict[str, Any]] = []
    before = ""
    for number, line in enumerate(lines, 1):
        with outside(f"line {number} of {path}", BadRecord):
            value = dict(json.loads(line))
            seal, before = value.pop(SEAL, None), hash_json([before, value])
        if seal != before:
            raise BadRecord(f"line {number} of {path} was altered, or is no line of scores. Remove the file.")
        values.append(value)
    if not values or (values[0].get("probe"), values[0].get("schema")) != ("integrated_gradients", SCHEMA):
        raise BadRecord(f"{path} is no file of scores. Remove it.")
    credits = [Credit(tuple((i, j, s) for i, j, s in v["neurons"]), v["highest"], v["gap"]) for v in values[1:]]
    return values[0], credits, before, sum(map(len, lines))
