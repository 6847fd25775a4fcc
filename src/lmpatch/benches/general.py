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
from typing import Any

from ..errors import BadInput
from ..inference.tokens import join
from ..models.lm import LM
from ..patches.patch import Mount, Patch, plain
from ..progress import Progress
from ..provenance import hash_json
from ..resources import require_memory
from . import _general_ask, _general_tasks
from ._asking import BLOCK, finished, in_parts, split
from ._general_report import Report, Run
from ._general_rows import Comparison, Mean, Row, compare
from ._general_tasks import PROTOCOLS, TASKS, Data, Sample, choose
from ._health import working_memory
from ._record import of_patch, shared
from ._runs import BASE
from ._store import Store
from ._writer import mounted, refuse_decode, refuse_patched

__all__ = [
    "Comparison", "Config", "Data", "Mean", "Report", "Row", "Run", "Sample",
    "compare", "load", "read_report", "run", "score",
]  # fmt: skip


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
    for part in split(samples, BLOCK):
        made += _general_ask.ask(lm, part, cfg.batch_size)
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
        BadInput: the model carries patches, ``patch`` is a decode patch, nothing is left to ask, or the folder holds
            something else.
        NotEnoughMemory: scoring would need more than is free.
        ForeignWrite: the model did not come back as it was.
    """
    cfg = cfg or Config()
    refuse_patched(lm)
    refuse_decode(patch)
    samples = _chosen(data, cfg)
    _need(lm, samples, cfg)
    store = Store(Path(out) if out is not None else None, Row.read)
    parts = _parts(samples)
    base = _shared(lm, data, samples, cfg) | {"data_name": data_name, "planned": len(parts)}

    def ask(record: dict[str, Any]) -> None:
        in_parts(lm, store, record, parts, lambda part: score(lm, part, cfg), progress, "scoring", _about)

    ask(base | {"run_id": BASE, "baseline": True})
    if patch is not None:
        with mounted(lm, [patch], mount):
            ask(of_patch(base, run_id, patch, mount))
    return finished(store, Report, _numbers)


read_report = Report.read


def _shared(lm: LM, data: Data, samples: Sequence[Sample], cfg: Config) -> dict[str, Any]:
    settings = plain({k: v for k, v in asdict(cfg).items() if k != "batch_size"})
    settings |= {"data_hash": hash_json([[s.task, s.protocol, s.id] for s in samples])}
    return shared(lm, "general", settings) | {"files": data.files, "skipped": _skipped(data, cfg)}


def _about(part: Sequence[Sample]) -> dict[str, Any]:
    return {"task": part[0].task, "protocol": part[0].protocol}


def _numbers(report: Report, run: Run) -> list[dict[str, Any]]:
    return [asdict(found) | {"within": found.within} for found in report.comparisons(run.name)]


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


def _parts(samples: Sequence[Sample]) -> list[Sequence[Sample]]:
    """At most ``BLOCK`` samples of one task and protocol each."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.protocol, sample.task), []).append(sample)
    return [part for group in groups.values() for part in split(group, BLOCK)]


def _need(lm: LM, samples: Sequence[Sample], cfg: Config) -> None:
    fits = [s for s, flag in zip(samples, _general_ask.too_long(lm, samples), strict=True) if not flag]
    texts = [join(prompt, behind) for sample in fits for prompt, behind in _general_ask.pairs(sample)]
    if texts:
        require_memory(working_memory(lm, texts, 0, cfg.batch_size), lm.device, "scoring")
