"""Records from files, and from tables in Python: JSON lines and lists, CSV and plain text, gzipped or not.

What a file holds is told from its content, not from its name. All that is bad in it comes in one error.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import math
import os
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BadInput, BadRecord

T = TypeVar("T")
Line = Mapping[str, Any]
Source = str | Path | Iterable[Any]
"""A file, or its records: dicts, a ``datasets.Dataset``, a pandas ``DataFrame``."""
Shapes = Mapping[str, tuple[tuple[str, ...], Callable[[Line, str], T]]]
"""Format → the keys it is known by, and what makes a record of a line and its place in the file."""
Item = tuple[int, str, Any]
"""Line, how messages name the record, and its value, or a ``BadRecord`` that says why there is none."""

LISTED, LONGEST = 10, 400  # bad lines named in one message, and characters of each
DEEP = "it is nested too deeply"


def read_text(source: Source, *, limit: int | None = None) -> list[str]:
    """The ``text`` of each record, or the paragraphs of a ``.txt`` or ``.txt.gz`` file, at most ``limit``.

    Returns:
        texts without surrounding white space, empty ones left out.
    Raises:
        BadInput: no such file, or no text in it.
        BadRecord: a record without ``text``.
    """
    if isinstance(source, (str, Path)) and _suffix(Path(source)) not in (".jsonl", ".json", ".csv", ".tsv"):
        whole = "".join(line for _, line in _lines(Path(source))).replace("\r\n", "\n")
        texts = re.split(r"\n[ \t]*\n", whole)
    else:
        texts = [text for _, text in read_records(source, lambda record, _: text_of(record, "text"))]
    found = [stripped for text in texts if (stripped := text.strip())]
    if not found:
        raise BadInput(f"{name_of(source)} holds no text.")
    return found[:limit]


def cut(records: list[T], limit: int | None, seed: int | None) -> list[T]:
    if limit is not None and limit < 1:
        raise BadInput(f"limit is {limit}; give 1 or more.")
    if seed is not None:
        random.Random(seed).shuffle(records)
    return records[:limit]


def read_records(source: Source, make: Callable[[Line, int], T]) -> list[tuple[int, T]]:
    """(line number, record) of every record; all bad lines are gathered into one ``BadRecord``."""
    made: list[tuple[int, T]] = []
    bad: dict[str, list[str]] = {}  # what is wrong → where
    for number, name, record in parsed(source):
        try:
            if isinstance(record, BadRecord):
                raise record
            if not isinstance(record, Mapping):
                raise BadRecord(f"a record must be an object, found {type(record).__name__}")
            check_text(record)
            made.append((number, make(record, len(made))))
        except (ValueError, RecursionError) as error:
            why = DEEP if isinstance(error, RecursionError) else str(error)
            bad.setdefault("".join(c if c.isprintable() else " " for c in why[:LONGEST]), []).append(name)
    if bad:
        n, whole = sum(map(len, bad.values())), not made and len(bad) == 1
        said = [f"{_where(names, whole)}: {why}" for why, names in [*bad.items()][:LISTED]]
        more = sum(map(len, [*bad.values()][LISTED:]))
        said += [f"... and {more} more"] if more else []
        raise BadRecord(f"{name_of(source)} has {n} bad line{'s' if n > 1 else ''}:\n  " + "\n  ".join(said))
    if not made:
        raise BadInput(f"{name_of(source)} holds no records. Write one JSON object a line.")
    return made


def _where(names: Sequence[str], whole: bool) -> str:
    """Lines with one complaint; ``whole``: they are all there are."""
    if whole and len(names) > 1:
        return f"all {len(names)} lines"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_shapes(source: Source, shapes: Shapes[T], need: str, format: str | None) -> list[tuple[int, T]]:
    """As ``read_records``, in this format; None: the first whose keys the first record has, else ``need`` is said."""
    if format is not None and format not in shapes:
        raise BadInput(f"no format is called {format!r}. There are: {', '.join(shapes)}.")

    def make(record: Line, place: int) -> T:
        nonlocal format
        format = format or next((name for name, (keys, _) in shapes.items() if record.keys() >= {*keys}), None)
        if format is None and record.keys() >= {"prompt", "target"}:
            raise BadRecord(f"it is a fact, as rome, memit or recipe read it. {need}")
        if format is None:
            raise BadRecord(f"unknown shape with keys {', '.join(map(str, record)) or 'none'}. {need}")
        return shapes[format][1](record, str(place))

    return read_records(source, make)


def parsed(source: Source) -> Iterator[Item]:
    """Every record of a source, as far as it can be read; the list under ``data`` of an object is records, too."""
    if not isinstance(source, (str, Path)):
        yield from ((i, f"record {i}", record) for i, record in enumerate(_table(source), 1))
        return
    path = Path(source)
    for number, name, record in _rows(path) if _suffix(path) in (".csv", ".tsv") else _json(path):
        if isinstance(record, dict) and isinstance(record.get("data"), list):
            yield from ((number, f"{name}, record {i}", each) for i, each in enumerate(record["data"], 1))
        else:
            yield number, name, record


def name_of(source: Source) -> str:
    """How messages name a source."""
    return str(source) if isinstance(source, (str, Path)) else f"the {type(source).__name__} of records"


def _table(source: Any) -> Iterable[Any]:
    if hasattr(source, "convert_dtypes"):  # a DataFrame: None where a cell is empty, whole numbers without a point
        return source.convert_dtypes().astype(object).where(source.notna(), None).to_dict("records")  # type: ignore[no-any-return]
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise BadInput(f"a {type(source).__name__} is no list of records. Give one split of a set, or a list of dicts.")
    return source


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line. Only an ordinary file is opened, and never read as a whole."""
    if not os.path.isfile(path):
        what = f"{path} is no ordinary file" if os.path.lexists(path) else f"there is no file {path}"
        raise BadInput(f"{what}. Give the path of a data file.")
    number, opener = 0, gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        line = number if isinstance(error, UnicodeDecodeError) else number + 1
        raise BadInput(
            f"cannot read line {line} of {path}: {error}. It must be UTF-8 text, gzipped if it ends in .gz. Other "
            "formats are read by pandas or datasets, whose tables are taken, too."
        ) from error


def _json(path: Path) -> Iterator[Item]:
    """JSON lines, unless the first line says that all lines are one value."""
    head = next((line.lstrip() for _, line in _lines(path) if line.strip()), "")
    if head.startswith("[") or isinstance(_parsed(head), BadRecord):
        text = "".join(line for _, line in _lines(path))
        if head.startswith("["):
            yield from _elements(text)
            return
        if not isinstance(value := _parsed(text), BadRecord):
            yield 1, "line 1", value
            return
    yield from ((number, f"line {number}", _parsed(line)) for number, line in _lines(path) if line.strip())


def _elements(text: str) -> Iterator[Item]:
    """The records of a JSON list, one after the other, so that each is known by its line."""
    at, counted, line, i, value = text.index("[") + 1, 0, 1, 0, None
    while text[(at := _behind_space(text, at)) : at + 1] != "]" and not isinstance(value, BadRecord):
        line, counted, i = line + text.count("\n", counted, at), at, i + 1
        try:
            value, at = json.JSONDecoder().raw_decode(text, at)
            if text[(at := _behind_space(text, at)) : at + 1] == ",":
                at += 1
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        except (ValueError, RecursionError) as error:
            line, value = getattr(error, "lineno", line), _why(error)
        yield line, f"line {line}, record {i}", value
    if text[at + 1 :].strip() and not isinstance(value, BadRecord):
        yield line, f"line {line}", BadRecord("no valid JSON (there is text behind the list)")


def _behind_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return _why(error)


def _why(error: Exception) -> BadRecord:
    if isinstance(error, json.JSONDecodeError):
        return BadRecord(f"no valid JSON ({error.msg}, character {error.colno})")
    return BadRecord(DEEP if isinstance(error, RecursionError) else "a number has more digits than can be read")


def _rows(path: Path) -> Iterator[Item]:
    """CSV with a header; empty cells are left out, and a cell in brackets is JSON."""
    lines = (line for _, line in _lines(path))
    header = next(lines, "")
    mark = max(",;\t", key=header.count)
    rows = csv.DictReader(chain([header], lines), delimiter=mark, strict=True, skipinitialspace=True)
    try:
        names = rows.fieldnames or []
        if len({*names}) < len(names):
            raise BadInput(f"{path} has two columns of one name. Its first line must name the columns.")
        for row in rows:
            record: Any = {name: _cell(text) for name, text in row.items() if name != "" and text not in (None, "")}
            bad = [value for value in record.values() if isinstance(value, BadRecord)]
            if None in record:
                bad = [BadRecord("it has more cells than the first line names columns")]
            yield rows.line_num, f"line {rows.line_num}", bad[0] if bad else record
    except csv.Error as error:
        yield rows.line_num, f"line {rows.line_num}", BadRecord(f"no valid CSV ({error})")


def _cell(text: Any) -> Any:
    return _parsed(text) if text[:1] + text[-1:] in ("[]", "{}") else text


def only(record: Line, known: Sequence[str]) -> None:
    """Raise ``BadRecord`` at a key that is not known."""
    for key in record:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}."
            raise BadRecord(f"unknown key {key!r}. {hint}")


def check_text(values: Any) -> None:
    """Raise ``BadRecord`` where a text in values holds half a character: JSON writes such, but they are no Unicode."""
    try:
        json.dumps(values, ensure_ascii=False, skipkeys=True, default=str).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise BadRecord(f"a text holds half a character ({half}). It was cut there: write it whole.") from None


def as_text(value: Any) -> Any:
    """A number as text; anything else as it is, what is no finite number too."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return str(value) if number and value == value and value not in (math.inf, -math.inf) else value


def text_of(record: Line, key: str, default: str | None = None, *, numbers: bool = False) -> str:
    """The text under a key; ``null`` is as good as none. With ``numbers``, a number is a text as well."""
    value = record.get(key)
    value = default if value is None else as_text(value) if numbers else value
    if not isinstance(value, str):
        raise BadRecord(f"{key} is missing" if value is None else f"{key} must be a text, found {value!r}")
    return value


def texts_of(record: Line, key: str) -> tuple[str, ...]:
    """The list of texts under a key, where it is given."""
    value = record.get(key)
    texts = [as_text(text) for text in value] if isinstance(value, list | tuple) else None
    if value is not None and (texts is None or not all(isinstance(text, str) for text in texts)):
        raise BadRecord(f"{key} must be a list of texts, found {value!r}")
    return tuple(texts or ())
