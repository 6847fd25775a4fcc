"""One fact as a memory keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ..data.dates import Span
from ..data.edits import ORIGIN, Edit, edit_from, prompt_key
from ..files import outside

COLUMNS = ("prompt", "target", "subject")  # fields of an edit with columns of their own
MORE = (*ORIGIN, "id", "relation", "old", "aliases", "rephrases", "locality", "portability")  # those that share one


@dataclass(frozen=True)
class Entry:
    """A fact that is or was in a memory."""

    edit: Edit
    version: int
    """The version that wrote it."""
    added: str
    """When: UTC, ISO 8601."""
    source: dict[str, Any] = field(default_factory=dict)
    """Where it came from, as the caller said of all that were added with it."""
    seq: int = 0
    """Its row in the log."""
    ended: int | None = None
    """The version since which it no longer holds; None: it is live."""
    dropped: bool = False
    """It ended because it was dropped, not because a newer fact took its place."""

    @property
    def origin(self) -> str:
        """Where it came from: what the fact says of itself, else what was told as it was added, else its file."""
        return self.edit.source or str(self.source.get("told") or self.source.get("file") or "")

    @property
    def state(self) -> str:
        """``live``, ``superseded in 7`` or ``dropped in 7``."""
        return "live" if self.ended is None else f"{'dropped' if self.dropped else 'superseded'} in {self.ended}"


@dataclass(frozen=True)
class Conflict:
    """A new fact, and one that holds for some of its time and gives the same question another answer."""

    new: Edit
    old: Edit
    version: int | None
    """The version that wrote the old one; None: it stands further up among the new ones."""
    superseded: bool
    """The new one took its place: both have one prompt, or it was asked for."""


class Added(int):
    """The version that holds what was added."""

    conflicts: tuple[Conflict, ...] = ()
    """What the new facts contradict."""

    @classmethod
    def of(cls, version: int, conflicts: tuple[Conflict, ...]) -> Added:
        """The version with its conflicts."""
        added = cls(version)
        added.conflicts = conflicts
        return added


@dataclass(frozen=True)
class Version:
    """One commit."""

    number: int
    time: str
    put: int
    """Facts it wrote."""
    dropped: int
    """Facts it dropped."""
    live: int
    """Facts that held after it."""


def record(edit: Edit) -> dict[str, Any]:
    """An edit as a line of a facts file, without what it leaves empty."""
    values: dict[str, Any] = {name: getattr(edit, name) for name in (*COLUMNS, *MORE)}
    for name in MORE[-2:]:
        values[name] = {kind: [asdict(ask) for ask in asks] for kind, asks in values[name]}
    return {name: value for name, value in values.items() if value}


def columns(edit: Edit) -> dict[str, str]:
    """An edit as the text columns of the log."""
    more = record(edit)
    own = {name: more.pop(name, "") for name in COLUMNS}
    return {**own, "key": prompt_key(edit.prompt), "more": json.dumps(more, ensure_ascii=False) if more else ""}


def span_of(row: dict[str, Any]) -> Span:
    """From when to when a row of the log counts."""
    more = json.loads(row["more"]) if '"valid_' in row["more"] else {}
    return more.get("valid_from", ""), more.get("valid_to", "")


def edit_of(row: dict[str, Any]) -> Edit:
    """The inverse of ``columns``."""
    more = json.loads(row["more"]) if row["more"] else {}
    return edit_from({"id": "", **{name: row[name] for name in COLUMNS}, **more}, "")


def entry_of(row: dict[str, Any]) -> Entry:
    """A row of the log that adds a fact."""
    with outside(f"row {row['seq']} of the log of the memory"):
        return Entry(edit_of(row), row["version"], row["added"], json.loads(row["source"]), row["seq"])
