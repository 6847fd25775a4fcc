"""The general bench itself: settings, data, and what is asked."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ...inference.tokens import join
from ...models.lm import LM
from ..core.contract import Json, Settings
from . import asking, tasks
from .rows import PROTOCOLS, TaskRow
from .tasks import TASKS, Data, Sample, choose


@dataclass(frozen=True)
class Config(Settings):
    """The general bench. What each number means: docs/benches.md."""

    n: int = 200
    """Records of each task, chosen by hash: the same before and after, and on every model."""
    windows: int = 64
    """Windows of 256 words of held-out text; 64 are about 20,000 tokens."""
    tasks: tuple[str, ...] | None = None
    """Tasks to ask. None: all that have files."""
    protocols: tuple[str, ...] = PROTOCOLS
    """recipe-general-v1: letters of options; cloze-v1: likelihood of their texts; perplexity-v1: held-out text."""
    batch_size: int = 32
    """Texts in one forward."""


def load(path: str | Path, *, limit: int | None = None, seed: int | None = None) -> Data:
    """Everything a folder holds for this bench, sub-folders included. docs/benches.md lists the files.

    Args:
        limit: at most this many records of each task, chosen by hash, with the seed in it.
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
    data = tasks.read(folder)
    if not data.samples:
        raise BadInput(f"{folder} holds no file that a task reads. docs/benches.md lists them.")
    return data if limit is None else replace(data, samples=tuple(choose(data.samples, lambda _: limit, seed or 0)))


def settle(cfg: Config, data: Data, fixed: bool) -> Config:
    """The settings as they are; refuses names that are none."""
    for what, names, known in (("task", cfg.tasks or (), [*TASKS]), ("protocol", cfg.protocols, [*PROTOCOLS])):
        if odd := [name for name in names if name not in known]:
            raise BadInput(f"general has no {what} {odd[0]!r}. There are: {', '.join(known)}.")
    if cfg.n < 1 or cfg.windows < 1:
        raise BadInput(f"n is {cfg.n} and windows {cfg.windows}; both must be 1 or more.")
    return cfg


def plan(lm: LM, data: Data, cfg: Config, **how: Any) -> list[Sample]:
    """The samples the settings ask for."""
    wanted = [s for s in data.samples if s.protocol in cfg.protocols and (cfg.tasks is None or s.task in cfg.tasks)]
    if not wanted:
        reasons = "; ".join(f"{task}: {why}" for task, why in _skipped(data, cfg).items())
        raise BadInput(f"nothing is left to ask. {reasons or 'No task that was found knows these protocols.'}")
    return choose(wanted, lambda sample: cfg.windows if sample.form == "text" else cfg.n, cfg.seed)


def ask(lm: LM, samples: Sequence[Sample], cfg: Config | None = None) -> list[TaskRow]:
    """One row per sample, in their order, from the model as it is now.

    Prompts are read as they stand, also by a chat model: these are the protocols of base models.
    """
    return asking.ask(lm.plain, samples, (cfg or Config()).batch_size)


def group(sample: Sample) -> Hashable:
    """Its protocol and task."""
    return sample.protocol, sample.task


def identity(sample: Sample) -> Any:
    """Its task, protocol and the hash of its record."""
    return [sample.task, sample.protocol, sample.id]


def texts(samples: Sequence[Sample], cfg: Config) -> tuple[list[str], int]:
    """Prompts with what is scored behind them."""
    return [join(prompt, behind) for sample in samples for prompt, behind in asking.pairs(sample)], 0


def record(samples: Sequence[Sample], data: Data, cfg: Config) -> Json:
    """What was read, and which tasks have no file."""
    return {"files": data.files, "skipped": _skipped(data, cfg)}


def _skipped(data: Data, cfg: Config) -> dict[str, str]:
    return {task: why for task, why in data.skipped.items() if cfg.tasks is None or task in cfg.tasks}
