"""``general``: does a patch leave the model's other abilities alone?

Public tasks are read from a folder the user gives and asked before and after, on the same records, so that every
difference is paired. Each task is asked under two protocols, which are never mixed: letters of options that stand in
the prompt, as RECIPE's paper does, and the likelihood of each option's own text, which says more of a small base
model. What is measured, and how each number is defined, stands in docs/benches.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from ..errors import BadInput
from ..models.lm import LM
from ..models.run import Progress
from ..models.tokens import join
from ..patches.patch import Mount, Patch, plain
from ..record import hash_json
from ..room import need_room
from . import _general_ask, _general_tasks
from ._general_report import BASE, Report, Run
from ._general_rows import Comparison, Mean, Row, compare
from ._general_tasks import PROTOCOLS, TASKS, Data, Sample, choose
from ._health import synchronise, working_memory
from ._record import about
from ._store import Store
from ._writer import Fitted, Writer, refuse_patched

__all__ = [
    "Comparison", "Config", "Data", "Mean", "Report", "Row", "Run", "Sample",
    "compare", "load", "read_report", "run", "score",
]  # fmt: skip

BLOCK = 64  # samples that are kept as one, so an interrupted run loses little


@dataclass(frozen=True)
class Config:
    """The general bench. What each number means: docs/benches.md."""

    n: int = 200
    """Records of each task, chosen by hash: the same before and after, and on every model."""
    windows: int = 64
    """Windows of 256 words of held-out text; 64 are about 20,000 tokens."""
    tasks: tuple[str, ...] | None = None
    """Tasks to ask. None: all that have files."""
    protocols: tuple[str, ...] = PROTOCOLS
    """recipe-general-v1: letters of options; cloze-v1: likelihood of their texts; perplexity-v1: held-out text."""
    seed: int = 0
    """Which records are chosen."""
    batch_size: int = 32
    """Texts in one forward."""


def load(path: str | Path, *, limit: int | None = None) -> Data:
    """Everything a folder holds for this bench, sub-folders included. docs/benches.md lists the files.

    Args:
        limit: at most this many records of each task, chosen by hash.
    Returns:
        the samples, why each missing task was skipped, and what was read.
    Raises:
        BadInput: no folder, or nothing in it that a task reads.
        BadRecord: lines that cannot be read; names the file and the first ten of them.
    """
    folder = Path(path)
    if limit is not None and limit < 1:
        raise BadInput(f"limit is {limit}; give 1 or more.")
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder. Give a folder with the tasks' files; docs/benches.md lists them.")
    data = _general_tasks.read(folder)
    if not data.samples:
        raise BadInput(f"{folder} holds no file that a task reads. docs/benches.md lists them.")
    return data if limit is None else replace(data, samples=tuple(choose(data.samples, lambda _: limit, 0)))


def score(
    lm: LM, samples: Sequence[Sample], cfg: Config | None = None, *, progress: Progress | None = None
) -> list[Row]:
    """Score the model as it is now, patches included.

    Returns:
        one row per sample, in their order.
    """
    cfg, made = cfg or Config(), []
    for start in range(0, len(samples), BLOCK):
        made += _general_ask.ask(lm, samples[start : start + BLOCK], cfg.batch_size)
        if progress:
            progress(len(made), len(samples), "scoring")
    return made


def run(
    lm: LM,
    data: Data,
    cfg: Config | None = None,
    *,
    patch: Patch | None = None,
    mount: Mount | None = None,
    run_id: str = "",
    data_name: str = "",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Score the unpatched model, then the patched one on the same records, and restore it.

    Args:
        patch: None scores the unpatched model alone.
        run_id: the name in tables; empty: the patch's method.
        out: folder for rows and records. A run that is there already goes on where it stopped, and the unpatched
            model is not asked again for another patch.
    Raises:
        BadInput: the model carries patches, nothing is left to ask, or the folder holds something else.
        NotEnoughMemory: scoring would need more than is free.
        ForeignWrite: the model did not come back as it was.
    """
    cfg = cfg or Config()
    refuse_patched(lm)
    samples = _chosen(data, cfg)
    _need(lm, samples, cfg)
    store = Store(Path(out) if out is not None else None, Row.read)
    through = _Pass(lm, cfg, store, _blocks(samples), progress)
    base = _identity(lm, data, samples, cfg) | {"data_name": data_name, "planned": len(through.blocks)}
    through.score(base | {"run_id": BASE, "baseline": True})
    if patch is not None:
        own = {"mount": mount or patch.mounts[0], "patch": patch.hash()}
        record = base | {"run_id": run_id or patch.method, "baseline": False, "settings": base["settings"] | own}
        record |= {"method": patch.method, "mount": own["mount"], "patch_hash": own["patch"]}
        writer = Writer(lm, mount, {}, base_perplexity=None)
        try:
            writer.write(Fitted(patch, 0.0), len(patch.edits))
            through.score(record)
        finally:
            writer.close()
    return _finished(store)


def read_report(folder: str | Path) -> Report:
    """The report of a folder that ``run(..., out=folder)`` filled.

    Raises:
        BadInput: the folder holds no runs.
    """
    if not (Path(folder) / "runs.jsonl").is_file():
        raise BadInput(f"{folder} holds no runs. Give the folder passed as out=.")
    return _report(Store(Path(folder), Row.read))


@dataclass
class _Pass:
    """One model's way through all samples, block by block."""

    lm: LM
    cfg: Config
    store: Store[Row]
    blocks: list[list[Sample]]
    progress: Progress | None

    def score(self, record: dict[str, Any]) -> None:
        """Score what the store does not hold yet of this run, on the model as it is now."""
        self.store.open_run(record)
        name, total, done = record["run_id"], sum(map(len, self.blocks)), 0
        for number, block in enumerate(self.blocks):
            done += len(block)
            if (name, number) in self.store.chunks:
                continue
            start = perf_counter()
            rows = [replace(row, run_id=name, chunk=number) for row in score(self.lm, block, self.cfg)]
            synchronise(self.lm)
            part = {"run_id": name, "chunk": number, "task": block[0].task, "protocol": block[0].protocol}
            self.store.add(part | {"seconds": perf_counter() - start}, rows)
            if self.progress:
                self.progress(done, total, f"scoring {name}")


def _identity(lm: LM, data: Data, samples: Sequence[Sample], cfg: Config) -> dict[str, Any]:
    """What all runs on these samples record; only runs of one ``settings`` share a table."""
    known = about(lm)
    settings = plain({k: v for k, v in asdict(cfg).items() if k != "batch_size"})
    settings |= {"data_hash": hash_json([[s.task, s.protocol, s.id] for s in samples])}
    settings |= {key: known[key] for key in ("base_weights_hash", "dtype")}
    made = {"bench": "general", "comparable_group": hash_json(settings)[:16], "settings": settings}
    return known | made | {"files": data.files, "skipped": _skipped(data, cfg)}


def _finished(store: Store[Row]) -> Report:
    """The report, its numbers and seconds written into the records too."""
    report = _report(store)
    for each in report.runs:
        metrics = [asdict(found) | {"within": found.within} for found in report.comparisons(each.name)]
        store.put_run(each.record | {"seconds": sum(part["seconds"] for part in each.parts), "metrics": metrics})
    return _report(store)


def _report(store: Store[Row]) -> Report:
    return Report(tuple(Run(record, store.rows_of(n), store.chunks_of(n)) for n, record in store.runs.items()))


def _chosen(data: Data, cfg: Config) -> list[Sample]:
    """The samples the settings ask for."""
    for what, names, known in (("task", cfg.tasks or (), [*TASKS]), ("protocol", cfg.protocols, [*PROTOCOLS])):
        if odd := [name for name in names if name not in known]:
            raise BadInput(f"general has no {what} {odd[0]!r}. There are: {', '.join(known)}.")
    if cfg.n < 1 or cfg.windows < 1:
        raise BadInput(f"n is {cfg.n} and windows {cfg.windows}; both must be 1 or more.")
    wanted = [s for s in data.samples if s.protocol in cfg.protocols and (cfg.tasks is None or s.task in cfg.tasks)]
    if not wanted:
        reasons = "; ".join(f"{task}: {why}" for task, why in _skipped(data, cfg).items())
        raise BadInput(f"nothing is left to ask. {reasons or 'No task that was found knows these protocols.'}")
    return choose(wanted, lambda sample: cfg.windows if sample.form == "text" else cfg.n, cfg.seed)


def _skipped(data: Data, cfg: Config) -> dict[str, str]:
    return {task: why for task, why in data.skipped.items() if cfg.tasks is None or task in cfg.tasks}


def _blocks(samples: Sequence[Sample]) -> list[list[Sample]]:
    """At most ``BLOCK`` samples of one task and protocol each."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.protocol, sample.task), []).append(sample)
    return [group[i : i + BLOCK] for group in groups.values() for i in range(0, len(group), BLOCK)]


def _need(lm: LM, samples: Sequence[Sample], cfg: Config) -> None:
    fits = [s for s, flag in zip(samples, _general_ask.too_long(lm, samples), strict=True) if not flag]
    texts = [join(prompt, behind) for sample in fits for prompt, behind in _general_ask.pairs(sample)]
    if texts:
        need_room(working_memory(lm, texts, 0, cfg.batch_size), lm.device, "scoring")
