"""What can happen to a file that was written: damaged files of one kind, from a good one."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path


def _flips(data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    draw = random.Random(0)
    for place in {0, 8, 20, len(data) - 1, *(draw.randrange(len(data)) for _ in range(count))}:
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8)
        yield f"a bit at {place}", bytes(changed)


def damages(path: Path, flips: int = 12) -> Iterator[str]:
    """Damage the file in one way after the other, and say how each time. The last is a pipe."""
    data = path.read_bytes()
    cut = [(f"cut at {n}", data[:n]) for n in (0, 4, 8, len(data) // 2, len(data) - 1)]
    for what, content in [*cut, ("longer", data + b"x"), ("text", b"hello"), *_flips(data, flips)]:
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        yield what
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    yield "a pipe"


def each(path: Path, check: Callable[[], bool], flips: int = 12) -> None:
    """``check`` holds after every damage."""
    wrong = [what for what in damages(path, flips) if not check()]
    assert not wrong, wrong
