"""The rows of one commit: what is added, and what is left of the facts that it takes the place of."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ..data.dates import ALWAYS, Span, outside, overlap
from ..data.edits import Edit, prompt_key
from ._log import Log, Row
from .entry import span_of

Held = tuple[Row, np.ndarray]


class Changes:
    """Rows in the order in which they act, and the keys of those that put a fact.

    A fact that holds longer than what supersedes it is put again for the rest of its time. So a log says by its rows
    alone what holds when, and an export says the same.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self.rows: list[Row] = []
        self.keys: list[np.ndarray] = []  # [width] float16 each
        self._held: dict[str, list[Held]] = {}  # facts of the prompts looked at, as they are after these rows

    def put(self, row: Row, key: np.ndarray, span: Span) -> None:
        """Add a fact; what has its prompt holds outside its time alone."""
        name = row["key"]
        if span == ALWAYS:
            self._held[name] = []
        else:
            self._cut(name, span)
        self._append(row, key)
        self._held[name].append((row, key))

    def retire(self, old: Edit, new: Edit) -> None:
        """End a fact, whose prompt is another, for the time of a new one."""
        self._cut(prompt_key(old.prompt), new.span, old.target, new.prompt)

    def _cut(self, name: str, span: Span, target: str | None = None, by: str = "") -> None:
        """Leave of the facts of a prompt what is outside of a span.

        Args:
            target: only of those that state it; None: of all.
            by: the other prompt they are superseded by. A row must end what is gone; one of the same prompt does.
        """
        kept: list[Held] = []
        for row, key in self._facts(name):
            own = span_of(row)
            left = [own] if target not in (None, row["target"]) else outside(own, span)
            pieces = [(row, key)] if left == [own] else [(_within(row, piece), key) for piece in left]
            kept += pieces
            for piece in pieces if left != [own] else ():
                self._append(*piece)
            if by and not left:
                self.rows.append(ends(row["prompt"], own, by))
        self._held[name] = kept

    def _facts(self, name: str) -> list[Held]:
        if name not in self._held:
            seqs = self._log.live.rows(name)
            self._held[name] = list(zip(map(_content, self._log.rows(seqs)), self._log.vectors(seqs), strict=True))
        return self._held[name]

    def _append(self, row: Row, key: np.ndarray) -> None:
        self.rows.append(row)
        self.keys.append(key)


WRITTEN = ("seq", "version", "added")
"""What ``Log.append`` writes of a row."""


def ends(prompt: str, span: Span = ALWAYS, by: str = "") -> Row:
    """The row that ends the facts of a prompt whose time overlaps a span.

    Args:
        by: the prompt of the fact that supersedes it; "": it is dropped.
    """
    more = {"valid_from": span[0], "valid_to": span[1], "by": by}
    more = {name: text for name, text in more.items() if text}
    return {
        "op": "drop", "key": prompt_key(prompt), "prompt": prompt, "target": "", "subject": "",
        "more": json.dumps(more, ensure_ascii=False) if more else "", "source": "{}",
    }  # fmt: skip


def _within(row: Row, span: Span) -> Row:
    """The row of a fact with another time."""
    more: dict[str, Any] = json.loads(row["more"]) if row["more"] else {}
    more |= {"valid_from": span[0], "valid_to": span[1]}
    return row | {"more": json.dumps({k: v for k, v in more.items() if v}, ensure_ascii=False)}


def difference(log: Log, version: int) -> tuple[list[Row], np.ndarray]:
    """The rows, and the keys of those that put a fact, that let hold what held after a version."""
    now, then = log.live, log.live_after(version)
    moved = [name for name in now.keys() | then.keys() if now.rows(name) != then.rows(name)]
    both = [seq for name in moved if name in now and name in then for seq in (*now.rows(name), *then.rows(name))]
    told = {row["seq"]: _content(row) for row in log.rows(both)}
    said = {seq: (told[seq], key.tobytes()) for seq, key in zip(both, log.vectors(both), strict=True)}
    moved = [
        name for name in moved
        if name not in now or name not in then or [*map(said.get, now.rows(name))] != [*map(said.get, then.rows(name))]
    ]  # fmt: skip
    puts = log.rows(sorted(seq for name in moved for seq in then.rows(name)))
    taken: dict[str, list[Span]] = {}
    for row in puts:
        taken.setdefault(row["key"], []).append(span_of(row))
    gone = [
        ends(row["prompt"], span_of(row))
        for row in log.rows(sorted(seq for name in moved for seq in now.rows(name)))
        if not any(overlap(span_of(row), span) for span in taken.get(row["key"], ()))
    ]
    return [*map(_content, puts), *gone], log.vectors([row["seq"] for row in puts])


def _content(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in WRITTEN}
