"""Files of records: JSON lines, JSON lists and plain text, gzipped or not; all bad lines in one error."""

from __future__ import annotations

import difflib
import gzip
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BadInput, BadRecord

T = TypeVar("T")
Line = Mapping[str, Any]
Shapes = Mapping[str, tuple[tuple[str, ...], Callable[[Line, str], T]]]
"""Format → the keys it is known by, and what makes a record of a line and its place in the file."""

LISTED = 10  # bad lines named in one message


def read_text(path: str | Path, *, limit: int | None = None) -> list[str]:
    """The ``text`` of each JSON line, or the paragraphs of a ``.txt`` or ``.txt.gz`` file, at most ``limit``.

    Returns:
        texts without surrounding white space, empty ones left out.
    Raises:
        BadInput: no such file, or no text in it.
        BadRecord: a JSON line without ``text``.
    """
    path = Path(path)
    if _suffix(path) in (".jsonl", ".json"):
        texts = [text for _, text in read_records(path, lambda record, _: text_of(record, "text"))]
    else:
        texts = re.split(r"\n[ \t]*\n", "".join(line for _, line in _lines(path)))
    found = [stripped for text in texts if (stripped := text.strip())]
    if not found:
        raise BadInput(f"{path} holds no text.")
    return found[:limit]


def cut(records: list[T], limit: int | None, seed: int | None) -> list[T]:
    if limit is not None and limit < 1:
        raise BadInput(f"limit is {limit}; give 1 or more.")
    if seed is not None:
        random.Random(seed).shuffle(records)
    return records[:limit]


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line."""
    if not path.is_file():
        raise BadInput(f"there is no file {path}. Give the path of a data file.")
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield from enumerate(file, 1)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}. It must be UTF-8 text, gzipped if it ends in .gz.") from error


def read_records(path: Path, make: Callable[[Line, int], T]) -> list[tuple[int, T]]:
    """(line number, record) of every record; all bad lines are gathered into one ``BadRecord``."""
    made: list[tuple[int, T]] = []
    bad: list[str] = []
    for number, record in parsed(path):
        try:
            if isinstance(record, BadRecord):
                raise record
            if not isinstance(record, dict):
                raise BadRecord(f"a record must be an object, found {type(record).__name__}")
            made.append((number, make(record, len(made))))
        except BadInput as error:
            bad.append(f"line {number}: {error}")
    if bad:
        more = f"\n  ... and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        count = f"{len(bad)} bad line{'s' if len(bad) > 1 else ''}"
        raise BadRecord(f"{path} has {count}:\n  " + "\n  ".join(bad[:LISTED]) + more)
    if not made:
        raise BadInput(f"{path} holds no records. Write one JSON object a line.")
    return made


def read_shapes(path: str | Path, shapes: Shapes[T], need: str, format: str | None) -> list[tuple[int, T]]:
    """As ``read_records``, in this format; None: the first whose keys the first record has, else ``need`` is said."""
    if format is not None and format not in shapes:
        raise BadInput(f"no format is called {format!r}. There are: {', '.join(shapes)}.")

    def make(record: Line, place: int) -> T:
        nonlocal format
        format = format or next((name for name, (keys, _) in shapes.items() if record.keys() >= {*keys}), None)
        if format is None:
            raise BadRecord(f"unknown shape with keys {', '.join(record) or 'none'}. {need}")
        return shapes[format][1](record, str(place))

    return read_records(Path(path), make)


def parsed(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, parsed value, or a ``BadRecord`` that says why not); in a ``.json`` list the number counts records."""
    if _suffix(path) != ".json":
        yield from ((number, _parsed(line)) for number, line in _lines(path) if line.strip())
        return
    items = _parsed("".join(line for _, line in _lines(path)))
    yield from enumerate(items if isinstance(items, list) else [items], 1)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return BadRecord(f"no valid JSON ({error.msg}, character {error.pos + 1})")


def only(record: Line, known: Sequence[str]) -> None:
    """Raise ``BadRecord`` at a key that is not known."""
    for key in record:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}."
            raise BadRecord(f"unknown key {key!r}. {hint}")


def text_of(record: Line, key: str, default: str | None = None) -> str:
    value = record.get(key, default)
    if not isinstance(value, str):
        raise BadRecord(f"{key} is missing" if value is None else f"{key} must be a text, found {value!r}")
    return value


def texts_of(record: Line, key: str) -> tuple[str, ...]:
    value = record.get(key, [])
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise BadRecord(f"{key} must be a list of texts, found {value!r}")
    return tuple(value)
