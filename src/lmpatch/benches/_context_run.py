"""What the context benches share: which prompts are put to which model, in an order that can be stopped and taken up.

A run is one model under one wording. The unpatched model comes first, without a context too: what it says then is what
should stay when the context is another record's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..data.context import ContextRecord
from ..errors import BadInput
from ..models.lm import LM
from ..patches.patch import Mount, Patch, plain
from ..progress import Progress
from ..provenance import hash_json
from ..resources import require_memory
from ._asking import BLOCK, beyond_window, finished, in_parts, split
from ._context_ask import WORD, Said, Wanted, word
from ._context_prompts import ENDING, Wording, others, swapped, worded
from ._context_report import Report, Run
from ._context_rows import Row, When
from ._health import working_memory
from ._record import shared
from ._runs import BASE
from ._store import Store
from ._writer import mounted, refuse_patched

ALL: tuple[When, ...] = ("bare", "context", "foreign")  # bare first: the others are compared with it
OWN = ("wording", "baselines", "irrelevant", "batch_size", "bootstrap")
"""Settings that leave the unpatched model's answers as they are."""


@dataclass(frozen=True)
class Config:
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
    seed: int = 0
    """Which records are chosen, and which context is read in place of another; resampling."""
    bootstrap: int = 1000
    """Resamples behind each interval."""
    batch_size: int = 64
    """Texts in one forward."""


Ask = Callable[[LM, Sequence[ContextRecord], Sequence[Wanted]], list[Said]]
"""Asks the records; for each stands what is looked for in its answer."""


@dataclass(frozen=True)
class Task:
    """What one bench does its own way."""

    name: str
    ask: Ask
    new_tokens: int
    """Behind each prompt."""
    suffix: str = ENDING
    by_word: bool = False
    """Two answers are the same if their first words are."""


@dataclass
class _Pass:
    """Everything that one call asks."""

    lm: LM
    records: list[ContextRecord]
    foreign: list[int | None]
    cfg: Config
    task: Task
    store: Store[Row]
    progress: Progress | None

    def score(self, record: dict[str, Any], wording: Wording, whens: Sequence[When]) -> None:
        """Ask what the store does not hold yet of this run, on the model as it is now."""
        parts = split(range(len(self.records)), BLOCK)
        ask = partial(self._rows, record["run_id"], wording, whens)
        in_parts(self.lm, self.store, record, parts, ask, self.progress)

    def _rows(self, name: str, wording: Wording, whens: Sequence[When], part: Sequence[int]) -> list[Row]:
        """Everything about these records."""
        rows: list[Row] = []
        closed = {row.place: row.said for row in self.store.rows_of(BASE) if row.when == "bare"}
        for when in whens:
            found = self._asked(part, when, wording, closed)
            if name == BASE and when == "bare":
                closed |= {row.place: row.said for row in found}
                found = [replace(row, closed=row.said, kept=None if row.said is None else True) for row in found]
            rows += found
        return rows

    def _asked(self, part: Sequence[int], when: When, wording: Wording, closed: dict[int, str | None]) -> list[Row]:
        """One row per record, in order."""
        told: dict[int, ContextRecord] = {}
        flags = dict.fromkeys(part, "")
        for i in part:
            found, flags[i] = self._told(i, when, wording)
            if found is not None:
                told[i] = found
        long = beyond_window(self.lm, [record.prompt for record in told.values()], new_tokens=self.task.new_tokens)
        for i, flag in zip(list(told), long, strict=True):
            if flag:
                flags[i] = flag
                del told[i]
        said: dict[int, Said] = dict(zip(told, self._ask(told, when, closed), strict=True)) if told else {}
        return [self._row(i, when, said.get(i), closed.get(i), flags[i]) for i in part]

    def _told(self, i: int, when: When, wording: Wording) -> tuple[ContextRecord | None, str]:
        """What is put to the model, or why nothing is."""
        record = self.records[i]
        if when == "foreign":
            j = self.foreign[i]
            if j is None:
                return None, "no other record's context says nothing about it"
            found = swapped(record, self.records[j].context)
            if found is None:
                return None, "its prompt does not hold its context"
            return self._worded(found, wording), ""
        if when == "bare":
            record = self._worded(record, "plain")
            return replace(record, prompt=record.without_context), ""
        return self._worded(record, wording), ""

    def _worded(self, record: ContextRecord, wording: Wording) -> ContextRecord:
        return worded(record, wording, suffix=self.task.suffix, official=self.cfg.official)

    def _ask(self, told: dict[int, ContextRecord], when: When, closed: dict[int, str | None]) -> list[Said]:
        wanted: list[Wanted] = []
        for i, record in told.items():
            if when == "context":
                wanted.append([answer for answer in (record.answer, record.memory) if answer])
            else:  # an answer that others will be compared with is kept whole
                wanted.append(WORD if i in closed else None)
        return self.task.ask(self.lm, list(told.values()), wanted)

    def _row(self, i: int, when: When, said: Said | None, closed: str | None, flag: str) -> Row:
        record, other = self.records[i], self.foreign[i]
        kept = None
        if said is not None and closed is not None and when != "context":
            kept = word(said.text) == word(closed) if self.task.by_word else said.text == closed
        return Row(
            run_id="",
            chunk=0,
            place=i,
            id=record.id,
            when=when,
            answer=record.answer,
            memory=record.memory,
            said=said.text if said else None,
            closed=closed,
            kept=kept,
            scores=said.scores if said else (),
            other=self.records[other].id if when == "foreign" and other is not None else "",
            flag=flag or (said.flag if said else ""),
        )


def run(
    lm: LM,
    records: Sequence[ContextRecord],
    cfg: Config,
    task: Task,
    *,
    patch: Patch | Sequence[Patch] | None,
    mount: Mount | None,
    run_id: str,
    data_name: str,
    out: str | Path | None,
    progress: Progress | None,
) -> Report:
    """See ``memotrap.run`` and ``kre.run``."""
    refuse_patched(lm)
    patches = [patch] if isinstance(patch, Patch) else list(patch or ())
    chosen = _chosen(lm, records, cfg)
    require_memory(
        working_memory(lm, [r.prompt for r in chosen], task.new_tokens, cfg.batch_size), lm.device, task.name
    )
    store = Store(Path(out) if out is not None else None, Row.read)
    through = _Pass(lm, chosen, others(chosen, cfg.seed), cfg, task, store, progress)
    base = _shared(lm, chosen, cfg, task) | {"data_name": data_name}
    through.score(_of(base, BASE, "plain", ALL), "plain", ALL)
    for wording in cfg.baselines:
        if wording != "plain":
            through.score(_of(base, f"{BASE}, {wording}", wording, ALL[1:]), wording, ALL[1:])
    if patches:
        whens: tuple[When, ...] = ALL if cfg.irrelevant else ("context",)
        name = run_id or " + ".join(each.method for each in patches)
        record = _of(base, name, cfg.wording, whens, [(each, mount or each.mounts[0]) for each in patches])
        with mounted(lm, patches, mount):
            through.score(record, cfg.wording, whens)
    return finished(store, Report, _numbers)


read_report = Report.read


def _chosen(lm: LM, records: Sequence[ContextRecord], cfg: Config) -> list[ContextRecord]:
    """The records the settings ask for, in their order, checked."""
    if not records or (cfg.n is not None and cfg.n < 1):
        raise BadInput(f"{len(records)} records and n = {cfg.n}: nothing is left to ask. Give at least one of each.")
    alone = lm.tokenizer([record.answer for record in records], add_special_tokens=False)["input_ids"]
    for i, (record, ids) in enumerate(zip(records, alone, strict=True)):
        if not ids:
            raise BadInput(
                f"record {record.id or i}: the answer {record.answer!r} tokenises to nothing. Give a visible one."
            )
    ring = sorted(range(len(records)), key=lambda i: hash_json([cfg.seed, records[i].prompt, i]))
    return [records[i] for i in sorted(ring[: cfg.n])]


def _shared(lm: LM, records: Sequence[ContextRecord], cfg: Config, task: Task) -> dict[str, Any]:
    settings = plain({k: v for k, v in asdict(cfg).items() if k not in OWN})
    settings |= {"data_hash": hash_json([asdict(record) for record in records]), "bench": task.name}
    shown = {"records": len(records), "bootstrap": cfg.bootstrap, "seed": cfg.seed}
    return shared(lm, task.name, settings) | shown | {"planned": -(-len(records) // BLOCK)}


def _of(
    base: dict[str, Any],
    name: str,
    wording: Wording,
    whens: Sequence[When],
    patches: Sequence[tuple[Patch, Mount]] = (),
) -> dict[str, Any]:
    """The record of one run before it starts."""
    own: dict[str, Any] = {"wording": wording, "asked": list(whens)}
    own["patches"] = [{"method": p.method, "hash": p.hash(), "mount": mount} for p, mount in patches]
    return base | {"run_id": name, "baseline": not patches, "settings": base["settings"] | own} | own


def _numbers(report: Report, run: Run) -> dict[str, Any]:
    if run.record.get("seconds") == sum(part["seconds"] for part in run.parts):  # no part is new: no need to resample
        kept: dict[str, Any] = run.record["metrics"]
        return kept
    return {name: asdict(metric) for name, metric in report.metrics(run.name).items()}
