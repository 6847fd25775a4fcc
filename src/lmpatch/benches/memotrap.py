"""``memotrap``: does a model follow an instruction against what it knows by heart?

MemoTrap asks to end a well-known phrase in an unusual way. The model goes on freely; its text up to the first period
is the context's answer, the one of memory, or neither. What is measured, and how, stands in docs/benches.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..data.context import ContextRecord, read_context
from ..errors import BadInput
from ..models.lm import LM
from ..patches.patch import Mount, Patch
from ..progress import Progress
from . import _context_run
from ._context_ask import Said, Wanted, complete
from ._context_report import Report, Run
from ._context_rows import Metric, Row
from ._context_run import Task, read_report

__all__ = ["Config", "Metric", "Report", "Row", "Run", "load", "read_report", "run"]


stacks = True
"""``run`` takes several patches and puts them on in order."""


@dataclass(frozen=True)
class Config(_context_run.Config):
    """The memotrap bench. What each number means: docs/benches.md."""

    max_new_tokens: int = 10
    """Length of an answer at most. IRCAN takes 10, and 20 with CAD."""


def load(path: str | Path, *, limit: int | None = None) -> list[ContextRecord]:
    """Read MemoTrap's completions, or any records with contexts and without options.

    Raises:
        BadInput: no such file, or an empty one.
        BadRecord: lines that cannot be read, or records without a context; names the file and the first ten of them.
    """
    return read_context(path, limit=limit)


def run(
    lm: LM,
    records: Sequence[ContextRecord],
    cfg: Config | None = None,
    *,
    patch: Patch | Sequence[Patch] | None = None,
    mount: Mount | None = None,
    run_id: str = "",
    data_name: str = "",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Ask the unpatched model, plainly and in other words, then the patched one, and restore it.

    Args:
        patch: one, or several that are put on in this order. None asks the unpatched model alone.
        run_id: the name in tables; empty: the patches' methods.
        out: folder for rows and records. A run that is there already goes on where it stopped, and the unpatched model
            is not asked again for another patch.
    Raises:
        BadInput: records with options, an answer that cannot be matched, a model that carries patches, or a folder
            that holds something else.
        NotEnoughMemory: asking would need more than is free.
        ForeignWrite: the model did not come back as it was.
    Source: Shi et al. 2024 (arXiv:2406.18406), sec. 4, on Liu and Liu 2023, MemoTrap.
    Differs: a prompt is cut behind its instruction, not at its last colon; an answer is compared without the blanks
    around it. ``official`` does as released.
    """
    cfg = cfg or Config()
    for i, record in enumerate(records):
        _check(record, record.id or str(i))
    if cfg.max_new_tokens < 1:
        raise BadInput(f"max_new_tokens is {cfg.max_new_tokens}; give 1 or more.")
    asked = [_as_released(record) for record in records] if cfg.official else records
    task = Task("memotrap", partial(_ask, cfg), cfg.max_new_tokens, by_word=True)
    return _context_run.run(
        lm, asked, cfg, task,
        patch=patch, mount=mount, run_id=run_id, data_name=data_name, out=out, progress=progress,
    )  # fmt: skip


def _ask(cfg: Config, lm: LM, told: Sequence[ContextRecord], wanted: Sequence[Wanted]) -> list[Said]:
    limit, size = cfg.max_new_tokens, cfg.batch_size
    return complete(lm, told, wanted, limit=limit, batch_size=size, official=cfg.official)


def _check(record: ContextRecord, name: str) -> None:
    if record.options:
        raise BadInput(f"record {name} has options. Ask it with the bench kre.")
    if "." in record.answer:
        raise BadInput(f"record {name}: texts are cut at their first period, so none matches {record.answer!r}.")


def _as_released(record: ContextRecord) -> ContextRecord:
    """The prompt cut at its last colon, which takes part of the phrase away where that has one too."""
    rest = record.prompt.rpartition(": ")[2]
    return replace(
        record, without_context=rest, question=rest, context=record.prompt.removesuffix(rest) or record.context
    )
