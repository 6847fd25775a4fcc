"""What the context benches share: which prompts are put to which model, their rows and the numbers made of them.

The unpatched model comes first, without a context too: what it says then is what should stay when the context is
another record's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from ...data.context import ContextRecord, others, read_context, swapped
from ...errors import BadInput
from ...models.lm import LM
from ...patches.patch import plain
from ...provenance import hash_json
from ..core import contract
from ..core.asking import beyond_window
from ..core.contract import Example, Measure, Scatter, Settings
from .prompts import ENDING, Wording, worded

When = Literal["context", "foreign", "bare"]
"""What the model read before the question: its own context, another record's, or none."""
ALL: tuple[When, ...] = ("bare", "context", "foreign")  # bare first: the others are compared with it
OWN = ("wording", "baselines", "irrelevant")
Wanted = Sequence[str] | None
"""The answers that are looked for in a text; None: all of it is wanted."""
WORD: Wanted = ()
"""Only its first word is."""


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
class Reply:
    """What a model answered."""

    text: str
    scores: tuple[float, ...] = ()
    flag: str = ""


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


@dataclass(frozen=True, kw_only=True)
class Row(contract.Row):
    """One record, asked once."""

    place: int
    """Which of the records asked it is."""
    id: str
    when: When
    answer: str
    """What the record's own context says."""
    memory: str
    """What is known without it; "" if the record does not say."""
    said: str | None
    """The answer, as far as it had to be generated to be judged; a letter where there are options. None: not asked."""
    closed: str | None
    """What the unpatched model says without a context. None: not asked."""
    kept: bool | None = None
    """``said`` is that answer; None with its own context, or where one of them was not asked."""
    scores: tuple[float, ...] = ()
    """One per option: its logit, or the log probability of the whole letter."""
    other: str = ""
    """Whose context was read."""

    def key(self) -> Hashable:
        """Place and context."""
        return self.place, self.when

    def unit(self) -> Hashable:
        """The record."""
        return self.place

    def where(self) -> str:
        """Which context was read."""
        return {"bare": "without", "context": "with its", "foreign": "with another's"}[self.when] + " context"

    def generation(self) -> tuple[str, Sequence[str]] | None:
        """The text; nothing where a letter was chosen."""
        if self.said is None or self.scores:
            return None
        return self.said, [text for text in (self.answer, self.memory) if text] if self.when == "context" else []

    def example(self) -> Example | None:
        """With its own context: what that says and what memory does."""
        if self.said is None or self.when != "context":
            return None
        wanted = f"{self.answer}, not {self.memory}" if self.memory else self.answer
        return Example(self.id or str(self.place), wanted, self.said, self.said == self.answer)


def load(path: Any, *, limit: int | None = None, seed: int | None = None) -> list[ContextRecord]:
    """Records with contexts from a file.

    Args:
        limit: at most this many, the first ones; with a seed those that it chooses.
    Raises:
        BadInput, BadRecord: as ``data.context.read_context``.
    """
    if seed is None or limit is None:
        return read_context(path, limit=limit)
    return _chosen(read_context(path), limit, seed)


def _chosen(records: Sequence[ContextRecord], n: int | None, seed: int) -> list[ContextRecord]:
    """n records, chosen by hash, in order."""
    ring = sorted(range(len(records)), key=lambda i: hash_json([seed, records[i].prompt, i]))
    return [records[i] for i in sorted(ring[:n])]


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
    kept = _chosen(records, cfg.n, cfg.seed)
    partners = others(kept, cfg.seed)
    return [Item(i, r, None if j is None else kept[j]) for i, (r, j) in enumerate(zip(kept, partners, strict=True))]


def identity(item: Item) -> Any:
    """The record."""
    return plain(item.record)


Functions = tuple[Callable[..., list[Row]], Callable[[Any], Mapping[str, Any]], Callable[..., tuple[list[str], int]]]


def asking(task: Callable[[Any], Task]) -> Functions:
    """``ask``, ``baselines`` and ``texts`` of the bench whose settings give this task."""

    def ask(lm: LM, items: Sequence[Item], cfg: Any, base: Sequence[Row] | None = None) -> list[Row]:
        """Everything about these records, from the model as it is now; ``base`` None: it is the unpatched one."""
        if base is None:
            return _rows(task(cfg), "plain", ALL, lm, items, None)
        return _rows(task(cfg), cfg.wording, ALL if cfg.irrelevant else ("context",), lm, items, base)

    def baselines(cfg: Any) -> Mapping[str, Any]:
        """The unpatched model in other words."""
        wordings = [wording for wording in cfg.baselines if wording != "plain"]
        return {f"none, {wording}": partial(_rows, task(cfg), wording, ALL[1:]) for wording in wordings}

    def texts(items: Sequence[Item], cfg: Any) -> tuple[list[str], int]:
        """The prompts, and the new tokens behind each."""
        return [item.record.prompt for item in items], task(cfg).new_tokens

    return ask, baselines, texts


def _rows(
    task: Task, wording: Wording, whens: Sequence[When], lm: LM, items: Sequence[Item], base: Sequence[Row] | None
) -> list[Row]:
    rows: list[Row] = []
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
) -> list[Row]:
    """One row per item, in order."""
    put = {item.place: _put(item, task, when, wording) for item in items}
    flags = {place: record for place, record in put.items() if isinstance(record, str)}
    records = {place: record for place, record in put.items() if not isinstance(record, str)}
    long = beyond_window(lm, [record.prompt for record in records.values()], new_tokens=task.new_tokens)
    flags |= {place: flag for place, flag in zip(records, long, strict=True) if flag}
    records = {place: record for place, record in records.items() if place not in flags}
    wanted = [_wanted(record, when, place in closed) for place, record in records.items()]
    replies = dict(zip(records, task.reply(lm, list(records.values()), wanted), strict=True)) if records else {}
    rows = []
    for item in items:
        record, reply, before, kept = item.record, replies.get(item.place), closed.get(item.place), None
        if reply is not None and before is not None and when != "context":
            kept = word(reply.text) == word(before) if task.by_word else reply.text == before
        row = Row(
            place=item.place,
            id=record.id,
            when=when,
            answer=record.answer,
            memory=record.memory,
            said=reply.text if reply else None,
            closed=before,
            kept=kept,
            scores=reply.scores if reply else (),
            other=item.other.id if when == "foreign" and item.other is not None else "",
            flag=flags.get(item.place, "") or (reply.flag if reply else ""),
        )
        rows.append(row)
    return rows


def word(text: str) -> str:
    """The first word of a text."""
    return next(iter(text.split()), "")


def _wanted(record: ContextRecord, when: When, known: bool) -> Wanted:
    if when == "context":
        return [answer for answer in (record.answer, record.memory) if answer]
    return WORD if known else None  # an answer that others will be compared with is kept whole


def _put(item: Item, task: Task, when: When, wording: Wording) -> ContextRecord | str:
    """What is put to the model, or why nothing is."""
    record = item.record
    if when == "foreign":
        other = item.other and swapped(record, item.other.context)
        if other is None:
            missing = "no unrelated context found for this record"
            return missing if item.other is None else "its prompt does not hold its context"
        record = other
    record = worded(record, "plain" if when == "bare" else wording, suffix=task.suffix, official=task.official)
    return replace(record, prompt=record.without_context) if when == "bare" else record


def _where(when: When, counts: Callable[[Row], bool] = lambda row: True) -> Callable[[Row], str | None]:
    """Rows with this context that count; those that were not asked are counted as dropped."""

    def member(row: Row) -> str | None:
        missing = row.said is None if when == "context" else row.kept is None
        return "" if row.when == when and (missing or counts(row)) else None

    return member


def _is(right: Callable[[Row], bool | None]) -> Callable[[Row], bool | None]:
    return lambda row: None if row.said is None else right(row)


def _chance(row: Row) -> float | None:
    return 1 / len(row.scores) if row.scores else None


ACC, MEMORY = _is(lambda row: row.said == row.answer), _is(lambda row: row.said == row.memory)
REST, KEPT = _is(lambda row: row.said not in (row.answer, row.memory)), _is(lambda row: row.kept)
CLOSED = _is(lambda row: None if row.closed is None else row.said == row.answer)
SIDE, OTHER = "With its context", "With another's context, or none"
FAITHFUL = "answers as the context says (faithfulness)"
CONFLICT = "acc over the records in conflict: without a context the unpatched model answers otherwise"
SR = "answers as memory says (stubbornness rate); over the records that name such an answer"
ROBUST = "with another record's context, the unpatched model's answer without any"
KNOWN = "robustness over the records the unpatched model knows"
BCU = "the middle of acc and robustness, record by record (balance of context use)"
METRICS = {
    "acc": Measure(FAITHFUL, ACC, _where("context"), SIDE, headline=True, chance=_chance),
    "sr": Measure(SR, MEMORY, _where("context", lambda r: bool(r.memory)), SIDE, better="less", headline=True),
    "rest": Measure("neither of them", REST, _where("context"), SIDE, better=""),
    "adherence": Measure(CONFLICT, CLOSED, _where("context", lambda r: r.closed is None or r.closed != r.answer), SIDE),
    "robustness": Measure(ROBUST, KEPT, _where("foreign"), OTHER, headline=True),
    "known_kept": Measure(KNOWN, KEPT, _where("foreign", lambda r: bool(r.memory) and r.closed == r.memory), OTHER),
    "closed_kept": Measure("without a context, the unpatched model's answer", KEPT, _where("bare"), OTHER),
    "bcu": Measure(BCU, group=OTHER, derived=("mean", "acc", "robustness"), headline=True),
}
JUDGED_BY = "bcu"
PLOTS = (Scatter("Faithfulness and robustness", "acc", "robustness"),)
