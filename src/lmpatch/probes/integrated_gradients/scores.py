"""What ``integrated_gradients`` finds, in memory and as a file of JSON lines that a stopped run goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import BadInput, BadRecord
from ...models.lm import LM
from ...patches.base import fingerprint
from ...patches.ledger import applied
from ...provenance import hash_json

SCHEMA = 1


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
        lines = [self.header, *map(asdict, self.records)]
        path = folder / "integrated_gradients.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read it.

        Raises:
            BadInput: no such file.
            BadRecord: a line that is none of its lines.
        """
        path = Path(path)
        if not path.is_file():
            raise BadInput(f"there is no file {path}. Give the path of saved scores.")
        header, credits, _ = _read(path)
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
    }


class Log:
    """Credits as they come, kept on disk if there is a path."""

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.credits: list[Credit] = []
        if path is None:
            return
        if path.exists():
            there, self.credits, whole = _read(path)
            if differ := differing(there, header):
                raise BadInput(
                    f"{path} holds scores of another run: {', '.join(differ)} differ. Give another file, or remove it."
                )
            with path.open("r+b") as file:
                file.truncate(whole)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def add(self, found: Sequence[Credit]) -> None:
        """Append a batch."""
        self.credits += found
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(credit)) + "\n" for credit in found)


def _read(path: Path) -> tuple[dict[str, Any], list[Credit], int]:
    """Header, credits, and the bytes they take; a last line that was cut off does not count."""
    text = path.read_bytes()
    lines = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)
    credits = []
    try:
        header: dict[str, Any] = json.loads(lines[0])
        if header.get("probe") != "integrated_gradients" or header.get("schema") != SCHEMA:
            raise ValueError("another header")
        for line in lines[1:]:
            found = json.loads(line)
            neurons = tuple((int(i), int(j), float(score)) for i, j, score in found["neurons"])
            credits.append(Credit(neurons, float(found["highest"]), found["gap"]))
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadRecord(f"{path} is no file of scores: line {len(credits) + 2} ({error}). Remove it.") from None
    return header, credits, sum(map(len, lines))
