"""What the context benches share: which prompts are put to which model, in an order that can be stopped and taken up.

A run is one model under one wording. The unpatched model comes first, without a context too: what it says then is what
should stay when the context is another record's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from ..data.context import ContextRecord
from ..errors import BadInput
from ..models.lm import LM
from ..models.run import Progress
from ..patches.patch import Mount, Patch, plain
from ..record import hash_json
from ..room import need_room
from ._context_ask import WORD, Said, Wanted, too_long, word
from ._context_prompts import Wording, others, swapped, worded
from ._context_report import BASE, Report, Run
from ._context_rows import Row, When
from ._health import synchronise, working_memory
from ._record import about
from ._store import Store
from ._writer import Fitted, Writer, refuse_patched

BLOCK = 64  # records that are kept as one, so an interrupted run loses little
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
    suffix: str = "Answer:"
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
        name, total = record["run_id"], len(self.records)
        self.store.open_run(record)
        for number, start in enumerate(range(0, total, BLOCK)):
            if (name, number) in self.store.chunks:
                continue
            began = perf_counter()
            rows: list[Row] = []
            block = range(start, min(start + BLOCK, total))
            closed = {row.place: row.said for row in self.store.rows_of(BASE) if row.when == "bare"}
            for when in whens:
                found = self._rows(block, when, wording, closed)
                if name == BASE and when == "bare":
                    closed |= {row.place: row.said for row in found}
                    found = [replace(row, closed=row.said, kept=None if row.said is None else True) for row in found]
                rows += [replace(row, run_id=name, chunk=number) for row in found]
            synchronise(self.lm)
            self.store.add({"run_id": name, "chunk": number, "seconds": perf_counter() - began}, rows)
            if self.progress:
                self.progress(block.stop, total, f"asking {name}")

    def _rows(self, block: range, when: When, wording: Wording, closed: dict[int, str | None]) -> list[Row]:
        """One row per record of the block, in order."""
        told: dict[int, ContextRecord] = {}
        flags = dict.fromkeys(block, "")
        for i in block:
            found, flags[i] = self._told(i, when, wording)
            if found is not None:
                told[i] = found
        long = too_long(self.lm, [record.prompt for record in told.values()], self.task.new_tokens)
        for i, flag in zip(list(told), long, strict=True):
            if flag:
                flags[i] = flag
                del told[i]
        said: dict[int, Said] = dict(zip(told, self._ask(told, when, closed), strict=True)) if told else {}
        return [self._row(i, when, said.get(i), closed.get(i), flags[i]) for i in block]

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
            return replace(record, prompt=record.bare), ""
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
    need_room(working_memory(lm, [r.prompt for r in chosen], task.new_tokens, cfg.batch_size), lm.device, task.name)
    store = Store(Path(out) if out is not None else None, Row.read)
    through = _Pass(lm, chosen, others(chosen, cfg.seed), cfg, task, store, progress)
    base = _identity(lm, chosen, cfg, task) | {"data_name": data_name}
    through.score(_of(base, BASE, "plain", ALL), "plain", ALL)
    for wording in cfg.baselines:
        if wording != "plain":
            through.score(_of(base, f"{BASE}, {wording}", wording, ALL[1:]), wording, ALL[1:])
    if patches:
        whens: tuple[When, ...] = ALL if cfg.irrelevant else ("context",)
        name = run_id or " + ".join(each.method for each in patches)
        record = _of(base, name, cfg.wording, whens, [(each, mount or each.mounts[0]) for each in patches])
        with _mounted(lm, patches, mount):
            through.score(record, cfg.wording, whens)
    return _finished(store)


def read_report(folder: str | Path) -> Report:
    """The report of a folder that ``run(..., out=folder)`` filled.

    Raises:
        BadInput: the folder holds no runs.
    """
    if not (Path(folder) / "runs.jsonl").is_file():
        raise BadInput(f"{folder} holds no runs. Give the folder passed as out=.")
    return _report(Store(Path(folder), Row.read))


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


def _identity(lm: LM, records: Sequence[ContextRecord], cfg: Config, task: Task) -> dict[str, Any]:
    """What all runs on these records share; only runs of one group stand in one table."""
    known = about(lm)
    group = plain({k: v for k, v in asdict(cfg).items() if k not in OWN})
    group |= {"data_hash": hash_json([asdict(record) for record in records]), "bench": task.name}
    group |= {key: known[key] for key in ("base_weights_hash", "dtype")}
    made = {"bench": task.name, "comparable_group": hash_json(group)[:16], "settings": group}
    shown = {"records": len(records), "bootstrap": cfg.bootstrap, "seed": cfg.seed}
    return known | made | shown | {"planned": -(-len(records) // BLOCK)}


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


@contextmanager
def _mounted(lm: LM, patches: Sequence[Patch], mount: Mount | None) -> Iterator[None]:
    """The patches on the model, in this order; every touched weight is proved to come back."""
    writer = Writer(lm, mount, {}, base_perplexity=None)
    try:
        for patch in patches:
            writer.write(Fitted(patch, 0.0), max(1, len(patch.edits)))
        yield
    finally:
        writer.close()


def _finished(store: Store[Row]) -> Report:
    """The report, its numbers and seconds written into the records too."""
    report = _report(store)
    for each in report.runs:
        numbers = {name: asdict(metric) for name, metric in report.metrics(each.name).items()}
        store.put_run(each.record | {"seconds": sum(part["seconds"] for part in each.parts), "metrics": numbers})
    return _report(store)


def _report(store: Store[Row]) -> Report:
    return Report(tuple(Run(record, store.rows_of(n), store.chunks_of(n)) for n, record in store.runs.items()))
