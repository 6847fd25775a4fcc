"""Which rows of a log hold: a row ends the earlier ones of its prompt whose time overlaps its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..data.dates import bounds
from ..files import outside
from .entry import span_of

if TYPE_CHECKING:
    import pyarrow as pa

Bounds = tuple[float, float]
EVER: Bounds = (-math.inf, math.inf)


class Live:
    """The facts that were not retired, whether it is their time or not, as numbers of rows by key of the prompt.

    Args:
        spans: number → seconds from when to when a row counts; all others always do.
    """

    def __init__(self, spans: Mapping[int, Bounds]) -> None:
        self._spans = spans
        self._last: dict[str, int] = {}
        self._older: dict[str, list[int]] = {}  # further rows of prompts that have several, each for its own time
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: str) -> bool:
        return key in self._last

    def rows(self, key: str) -> list[int]:
        """The facts of one prompt, oldest first."""
        return [*self._older.get(key, ()), self._last[key]] if key in self._last else []

    def keys(self) -> set[str]:
        """The prompts that have a fact."""
        return {*self._last}

    def seqs(self) -> list[int]:
        """All facts, oldest first."""
        older = [seq for rows in self._older.values() for seq in rows]
        return sorted([*self._last.values(), *older])

    def act(self, seq: int, op: str, key: str) -> list[int]:
        """Let a row act; returns the facts that it ends."""
        start, end = self._spans.get(seq, EVER)
        held, left = self.rows(key), list[int]()
        if held and (start, end) != EVER:
            spans = {row: self._spans.get(row, EVER) for row in held}
            left = [row for row, (first, last) in spans.items() if last <= start or end <= first]
        ended = [row for row in held if row not in left]
        left += [seq] if op == "put" else []
        self._count += len(left) - len(held)
        self._last.pop(key, None)
        self._older.pop(key, None)
        if left:
            self._last[key] = left[-1]
        if left[1:]:
            self._older[key] = left[:-1]
        return ended


def replay(rows: pa.Table, live: Live) -> Iterator[int]:
    """Let rows act on ``live``; yields the numbers of facts that end."""
    for seq, op, key in zip(*(rows[name].to_pylist() for name in ("seq", "op", "key")), strict=True):
        yield from live.act(seq, op, key)


def spans_of(rows: pa.Table) -> dict[int, Bounds]:
    """The rows that do not count always, with the seconds from when to when they do."""
    from pyarrow.compute import match_substring

    timed = rows.filter(match_substring(rows["more"], '"valid_')).select(["seq", "more"])
    spans: dict[int, Bounds] = {}
    for row in timed.to_pylist():
        with outside(f"row {row['seq']} of the log of the memory"):
            spans[row["seq"]] = bounds(span_of(row))
    return {seq: span for seq, span in spans.items() if span != EVER}
