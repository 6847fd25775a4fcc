"""``kre``: does a model choose the option its context supports, or the one it knows?

COSE_KRE and ECARE_KRE give a question, its options, and a context that argues for a wrong one. The option whose letter
has the highest logit is the answer. What is measured, and how, stands in docs/benches.md.
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
from ._context_ask import Letters, Said, Wanted, choose
from ._context_prompts import Wording
from ._context_report import Report, Run
from ._context_rows import Metric, Row
from ._context_run import Task, read_report

__all__ = ["Config", "Metric", "Report", "Row", "Run", "load", "read_report", "run"]


stacks = True
"""``run`` takes several patches and puts them on in order."""


@dataclass(frozen=True)
class Config(_context_run.Config):
    """The kre bench. What each number means: docs/benches.md."""

    baselines: tuple[Wording, ...] = ("base", "attr", "instr", "opin", "instr+opin")
    """Wordings in which the unpatched model is asked as well, beside the plain one."""
    suffix: str | None = None
    """What the plain prompt ends in. IRCAN chooses by model: ``Answer: ``, ``Answer: \\n``, ``The correct answer is ``,
    ``Answer: \\nThe correct option is \\n**``. A blank at its end is dropped unless ``official``. None: ``Answer:``, or
    as released ``Answer: ``."""
    letters: Letters | None = None
    """Which token of a letter counts: behind the prompt and a ``blank``, ``bare``, or ``auto``, whichever of the two
    holds more probability behind that prompt. IRCAN chooses by model. None: ``blank``, or as released ``bare``."""


def load(path: str | Path, *, limit: int | None = None) -> list[ContextRecord]:
    """Read COSE_KRE or ECARE_KRE, or any records with contexts and options.

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
        BadInput: records without options, a model that carries patches, or a folder that holds something else.
        NotEnoughMemory: asking would need more than is free.
        ForeignWrite: the model did not come back as it was.
    Source: Shi et al. 2024 (arXiv:2406.18406), sec. 4, on Ying et al. 2023 (arXiv:2309.17415).
    Differs: the prompt ends without a blank and each letter has the token it gets behind it; where letters share that
    token they are scored whole. ``official`` does as released.
    """
    cfg = cfg or Config()
    suffix, letters = cfg.suffix, cfg.letters
    if letters is None:
        letters = "bare" if cfg.official else "blank"
    if suffix is None:
        suffix = "Answer: " if cfg.official else "Answer:"
    cfg = replace(cfg, suffix=suffix, letters=letters)
    for i, record in enumerate(records):
        if len(record.options) < 2:
            raise BadInput(
                f"record {record.id or i} has {len(record.options)} options, and kre asks for one of several."
            )
    task = Task("kre", partial(_ask, cfg.batch_size, letters), 0, suffix=suffix)
    return _context_run.run(
        lm, records, cfg, task,
        patch=patch, mount=mount, run_id=run_id, data_name=data_name, out=out, progress=progress,
    )  # fmt: skip


def _ask(size: int, letters: Letters, lm: LM, told: Sequence[ContextRecord], wanted: Sequence[Wanted]) -> list[Said]:
    return choose(lm, told, batch_size=size, letters=letters)
