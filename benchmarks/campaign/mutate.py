"""Ways to damage a folder of files, each decided by a seeded draw."""

from __future__ import annotations

import gzip
import json
import os
import random
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Files = dict[str, bytes]
"""Path in the folder -> bytes."""
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345678\n"
PICKLE = b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s."
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, "", "x", [], {}, [1], {"x": 1}, "\ud83d", "\x1b]0;x\x07\x1b[2J", "\0", "../../x", "a" * 300,
    10**12, 10**30, -(10**15), float("nan"), float("inf"), [[[]]], "NaN", "é" * 50, ["x", None, 3],
)  # fmt: skip
DIGITS, DEEP = "@digits@", "@deep@"
RAW = {f'"{DIGITS}"': "9" * 5000, f'"{DEEP}"': "[" * 990 + "]" * 990, '"@deeper@"': "[" * 100_000}
VALUES = (*ODD, DIGITS, DEEP, "@deeper@")


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """The files, in a folder that has none."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def read(folder: Path) -> Files:
    """Every file of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Bytes


def flip(draw: random.Random, data: bytes) -> bytes:
    """One to three bits turned."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at = draw.randrange(len(out))
        out[at] ^= 1 << draw.randrange(8)
    return bytes(out)


def flip_head(draw: random.Random, data: bytes) -> bytes:
    """One bit turned near the beginning, where headers are."""
    out, at = bytearray(data), draw.randrange(min(len(data), 2000))
    out[at] ^= 1 << draw.randrange(8)
    return bytes(out)


def cut(draw: random.Random, data: bytes) -> bytes:
    """The end is missing."""
    return data[: draw.choice((0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, draw.randrange(len(data))))]


def grow(draw: random.Random, data: bytes) -> bytes:
    """Something stands behind it."""
    return data + draw.choice((b"\0", b"\n", b"{}", draw.randbytes(40), data[-50:], data))


def blank(draw: random.Random, data: bytes) -> bytes:
    """A span of zeros, or of noise."""
    at, size = draw.randrange(len(data)), draw.choice((1, 8, 100, 4096))
    filler = draw.choice((b"\0" * size, draw.randbytes(size)))
    return data[:at] + filler[: len(data) - at] + data[at + size :]


def lines(draw: random.Random, data: bytes) -> bytes:
    """A line missing, doubled, moved, or not a line."""
    parts = data.splitlines(keepends=True)
    i, j = draw.randrange(len(parts)), draw.randrange(len(parts))
    how = draw.randrange(5)
    if how == 0:
        del parts[i]
    elif how == 1:
        parts.insert(j, parts[i])
    elif how == 2:
        parts[i], parts[j] = parts[j], parts[i]
    elif how == 3:
        parts.insert(i, draw.choice((b"5\n", b"{}\n", b"[]\n", b"null\n", b'"x"\n', b"\xff\xfe\n", b"\n", b"{\n")))
    else:
        parts[i] = parts[i][: draw.randrange(len(parts[i]))] + b"\n"
    return b"".join(parts)


# JSON


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*at, key))
    return found


def bend(draw: random.Random, value: Any) -> tuple[Any, str]:
    """One value inside dropped, doubled or made something else; and what was done."""
    value = json.loads(json.dumps(value))
    paths = places(value)
    if not paths:
        return draw.choice(VALUES), "everything"
    *way, key = draw.choice(sorted(paths, key=lambda path: (len(path), str(path)))[: draw.choice((10, 40, len(paths)))])
    inner = value
    for step in way:
        inner = inner[step]
    where = "/".join(map(str, (*way, key)))
    how = draw.randrange(6)
    if how == 0:
        del inner[key]
        return value, f"{where} dropped"
    if how == 1 and isinstance(inner, dict):
        inner[f"{key}{draw.choice(('x', ' ', '_2'))}"] = inner.pop(key)
        return value, f"{where} renamed"
    if how == 2 and isinstance(inner[key], (int, float)) and not isinstance(inner[key], bool):
        n = inner[key]
        inner[key] = draw.choice((n + 1, -n, n * 10**9, 0, float(n), str(n)))
        return value, f"{where} = {inner[key]!r}"[:100]
    inner[key] = draw.choice(VALUES)
    return value, f"{where} = {inner[key]!r}"[:100]


def dumps(value: Any, **how: Any) -> bytes:
    """JSON with what ``json`` would not write: numbers of 5,000 digits, 990 and 100,000 levels, half an emoji."""
    text = json.dumps(value, **how)
    for mark, raw in RAW.items():
        text = text.replace(mark, raw)
    return text.encode("utf-8", "surrogatepass")


def bent_json(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    """A JSON file, one line of a file of JSON lines, or the header of a safetensors file, with one value bent."""
    if data[8:9] == b"{":
        size = int.from_bytes(data[:8], "little")
        head, done = bend(draw, json.loads(data[8 : 8 + size]))
        raw = dumps(head)
        return len(raw).to_bytes(8, "little") + raw + data[8 + size :], f"header: {done}"
    if data[:2] == b"\x1f\x8b":
        raw, done = bent_json(draw, gzip.decompress(data))
        return gzip.compress(raw, mtime=0), done
    try:
        value, done = bend(draw, json.loads(data))
        return dumps(value, indent=1, ensure_ascii=draw.random() < 0.5), done
    except ValueError:
        parts = data.splitlines(keepends=True)
        i = draw.randrange(len(parts))
        value, done = bend(draw, json.loads(parts[i]))
        parts[i] = dumps(value, ensure_ascii=draw.random() < 0.5) + b"\n"
        return b"".join(parts), f"line {i + 1}: {done}"


# Files

BYTES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "flip": flip, "flip_head": flip_head, "cut": cut, "grow": grow, "blank": blank, "lines": lines,
}  # fmt: skip
FILES = ("delete", "empty", "fifo", "folder", "device", "lfs", "pickle", "exchange", "swap", "link")


def damage(draw: random.Random, folder: Path, other: Files, ways: tuple[str, ...]) -> str | None:
    """Damage one file of the folder in one way.

    Args:
        other: files of another of the kind, for ``swap``.
        ways: keys of ``BYTES``, ``"json"``, members of ``FILES``.
    Returns:
        what was done; None: there was nothing to damage.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        return None
    path, way = draw.choice(paths), draw.choice(ways)
    name, data = path.relative_to(folder).as_posix(), path.read_bytes()
    if way in BYTES:
        if not data:
            return None
        new = BYTES[way](draw, data)
        path.write_bytes(new)
        return f"{name}: {way}" if new != data else None
    if way == "json":
        try:
            new, done = bent_json(draw, data)
        except (ValueError, IndexError, RecursionError, OSError, EOFError, zlib.error):  # it was damaged before
            return None
        path.write_bytes(new)
        return f"{name}: {done}"
    return _replace(draw, way, path, name, paths, other)


def _replace(draw: random.Random, way: str, path: Path, name: str, paths: list[Path], other: Files) -> str | None:
    """Something else in place of a file."""
    rest = [each for each in paths if each != path]
    if (way == "exchange" and not rest) or (way == "swap" and other.get(name) in (None, path.read_bytes())):
        return None
    if way == "exchange":
        second = draw.choice(rest)
        a, b = path.read_bytes(), second.read_bytes()
        path.write_bytes(b)
        second.write_bytes(a)
        return f"{name}: exchanged with {second.name}"
    path.unlink()
    if way == "fifo":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    elif way == "device":
        path.symlink_to("/dev/zero")
    elif way == "link":
        path.symlink_to(path.name)
    elif way != "delete":
        path.write_bytes({"empty": b"", "lfs": LFS, "pickle": PICKLE, "swap": other.get(name, b"")}[way])
    return f"{name}: {way}"
