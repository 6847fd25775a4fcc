"""What the context benches share: which prompts are put to which model.

The unpatched model comes first, without a context too: what it says then is what should stay when the context is
another record's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ...data.context import ContextRecord, read_context
from ...errors import BadInput
from ...models.lm import LM
from ...patches.patch import plain
from ...provenance import hash_json
from ..core.asking import beyond_window
from ..core.contract import Settings
from .answers import WORD, Reply, Wanted, word
from .prompts import ENDING, Wording, others, swapped, worded
from .rows import ContextRow, When

ALL: tuple[When, ...] = ("bare", "context", "foreign")  # bare first: the others are compared with it
OWN = ("wording", "baselines", "irrelevant")


@dataclass(frozen=True)
class ContextSettings(Settings):
    """What the context benches share. What each number means: docs/benches.md."""

    n: int | None = None
    """Records asked, chosen by hash: the same on every model. None: all."""
    wording: Wording = "plain"
    """How the patched model is asked."""
    baselines: tuple[Wording, ...] = ("attr", "instr", "opin", "instr+opin")
    """Wordings in which the unpatched model is asked as well, beside the plain one."""
    irrelevant: bool = True
    """Ask the patched model also with another record's context, and without any."""
    official: bool = False
    """As released by the papers, flaws included; docs/benches.md lists them."""


@dataclass(frozen=True)
class Item:
    """One record in its place, and the one whose context stands in for its own."""

    place: int
    record: ContextRecord
    other: ContextRecord | None


@dataclass(frozen=True)
class Task:
    """What one bench does its own way."""

    reply: Callable[[LM, Sequence[ContextRecord], Sequence[Wanted]], list[Reply]]
    """Answers of the records; for each stands what is looked for in its answer."""
    new_tokens: int = 0
    """Behind each prompt."""
    suffix: str = ENDING
    by_word: bool = False
    """Two answers are the same if their first words are."""
    official: bool = False


def load(path: Any, *, limit: int | None = None, seed: int | None = None) -> list[ContextRecord]:
    """Records with contexts from a file.

    Args:
        limit: at most this many, the first ones; with a seed those that it chooses.
    Raises:
        BadInput: no such file, or an empty one.
        BadRecord: lines that cannot be read, or records without a context; names the file and the first ten of them.
    """
    if seed is None or limit is None:
        return read_context(path, limit=limit)
    records = read_context(path)
    return [records[i] for i in chosen(records, limit, seed)]


def chosen(records: Sequence[ContextRecord], n: int | None, seed: int) -> list[int]:
    """The places of n records, chosen by hash, in order."""
    ring = sorted(range(len(records)), key=lambda i: hash_json([seed, records[i].prompt, i]))
    return sorted(ring[:n])


def plan(lm: LM, records: Sequence[ContextRecord], cfg: ContextSettings, **how: Any) -> list[Item]:
    """The records the settings ask for, in their order, checked."""
    if not records or (cfg.n is not None and cfg.n < 1):
        raise BadInput(f"{len(records)} records and n = {cfg.n}: nothing is left to ask. Give at least one of each.")
    alone = lm.tokenizer([record.answer for record in records], add_special_tokens=False)["input_ids"]
    for i, (record, ids) in enumerate(zip(records, alone, strict=True)):
        if not ids:
            raise BadInput(
                f"record {record.id or i}: the answer {record.answer!r} tokenises to nothing. Give a visible one."
            )
    kept = [records[i] for i in chosen(records, cfg.n, cfg.seed)]
    partners = others(kept, cfg.seed)
    return [Item(i, r, None if j is None else kept[j]) for i, (r, j) in enumerate(zip(kept, partners, strict=True))]


def identity(item: Item) -> Any:
    """The record."""
    return plain(item.record)


def baselines(
    cfg: ContextSettings, task: Task
) -> Mapping[str, Callable[[LM, Sequence[Item], Sequence[ContextRow]], list[ContextRow]]]:
    """The unpatched model in other words."""
    wordings = [wording for wording in cfg.baselines if wording != "plain"]
    return {f"none, {wording}": partial(_rows, task, wording, ALL[1:]) for wording in wordings}


def ask(
    lm: LM, items: Sequence[Item], cfg: ContextSettings, task: Task, base: Sequence[ContextRow] | None
) -> list[ContextRow]:
    """Everything about these records, from the model as it is now; ``base`` None: it is the unpatched one."""
    if base is None:
        return _rows(task, "plain", ALL, lm, items, None)
    return _rows(task, cfg.wording, ALL if cfg.irrelevant else ("context",), lm, items, base)


def _rows(
    task: Task,
    wording: Wording,
    whens: Sequence[When],
    lm: LM,
    items: Sequence[Item],
    base: Sequence[ContextRow] | None,
) -> list[ContextRow]:
    rows: list[ContextRow] = []
    closed = {row.place: row.said for row in base or () if row.when == "bare"}
    for when in whens:
        part = _asked(lm, items, task, when, wording, closed)
        if base is None and when == "bare":
            closed = {row.place: row.said for row in part}
            part = [replace(row, closed=row.said, kept=None if row.said is None else True) for row in part]
        rows += part
    return rows


def _asked(
    lm: LM, items: Sequence[Item], task: Task, when: When, wording: Wording, closed: dict[int, str | None]
) -> list[ContextRow]:
    """One row per item, in order."""
    records: dict[int, ContextRecord] = {}
    flags: dict[int, str] = {}
    for item in items:
        record, flags[item.place] = _put(item, task, when, wording)
        if record is not None:
            records[item.place] = record
    long = beyond_window(lm, [record.prompt for record in records.values()], new_tokens=task.new_tokens)
    for place, flag in zip(list(records), long, strict=True):
        if flag:
            flags[place] = flag
            del records[place]
    wanted = [_wanted(record, when, place in closed) for place, record in records.items()]
    replies = dict(zip(records, task.reply(lm, list(records.values()), wanted), strict=True)) if records else {}
    return [
        _row(item, when, replies.get(item.place), closed.get(item.place), flags[item.place], task) for item in items
    ]


def _wanted(record: ContextRecord, when: When, known: bool) -> Wanted:
    if when == "context":
        return [answer for answer in (record.answer, record.memory) if answer]
    return WORD if known else None  # an answer that others will be compared with is kept whole


def _put(item: Item, task: Task, when: When, wording: Wording) -> tuple[ContextRecord | None, str]:
    """What is put to the model, or why nothing is."""

    def reworded(record: ContextRecord, wording: Wording) -> ContextRecord:
        return worded(record, wording, suffix=task.suffix, official=task.official)

    if when == "foreign":
        if item.other is None:
            return None, "no unrelated context found for this record"
        record = swapped(item.record, item.other.context)
        return (None, "its prompt does not hold its context") if record is None else (reworded(record, wording), "")
    if when == "bare":
        record = reworded(item.record, "plain")
        return replace(record, prompt=record.without_context), ""
    return reworded(item.record, wording), ""


def _row(item: Item, when: When, reply: Reply | None, closed: str | None, flag: str, task: Task) -> ContextRow:
    record, kept = item.record, None
    if reply is not None and closed is not None and when != "context":
        kept = word(reply.text) == word(closed) if task.by_word else reply.text == closed
    return ContextRow(
        place=item.place,
        id=record.id,
        when=when,
        answer=record.answer,
        memory=record.memory,
        said=reply.text if reply else None,
        closed=closed,
        kept=kept,
        scores=reply.scores if reply else (),
        other=item.other.id if when == "foreign" and item.other is not None else "",
        flag=flag or (reply.flag if reply else ""),
    )
