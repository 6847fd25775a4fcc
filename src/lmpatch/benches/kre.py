"""``kre``: does a model choose the option its context supports, or that of its own knowledge?

COSE_KRE and ECARE_KRE give a question, its options, and a context that argues for a wrong one. The option whose letter
has the highest logit is the answer. What is measured, and how, stands in docs/benches.md.

Source: Shi et al. 2024 (arXiv:2406.18406), sec. 4, on Ying et al. 2023 (arXiv:2309.17415).
Differs: the prompt ends without a blank and each letter has the token it gets behind it; where letters share that token
they are scored whole. ``official`` does as released.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data.context import ContextRecord
from ..errors import BadInput
from ..models.lm import LM
from .context import bench
from .context.answers import Letters, Reply, Wanted, choose
from .context.bench import OWN, Item, Task, identity, load, plan
from .context.prompts import Wording
from .context.rows import METRICS, PLOTS, ContextRow
from .core.runner import bound

__all__ = [
    "CONTEXTS", "METRICS", "OWN", "PLOTS", "Config", "Row", "ask", "baselines", "identity", "load", "plan",
    "read_report", "run", "settle", "texts",
]  # fmt: skip

Row = ContextRow
CONTEXTS = True


@dataclass(frozen=True)
class Config(bench.ContextSettings):
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


def settle(cfg: Config, records: Sequence[ContextRecord], fixed: bool) -> Config:
    """The settings with suffix and letters; refuses records without options."""
    for i, record in enumerate(records):
        if len(record.options) < 2:
            raise BadInput(
                f"record {record.id or i} has {len(record.options)} options, and kre asks for one of several."
            )
    letters: Letters = cfg.letters or ("bare" if cfg.official else "blank")
    suffix = ("Answer: " if cfg.official else "Answer:") if cfg.suffix is None else cfg.suffix
    return replace(cfg, suffix=suffix, letters=letters)


def ask(lm: LM, items: Sequence[Item], cfg: Config, base: Sequence[ContextRow] | None = None) -> list[ContextRow]:
    """Everything about these records, from the model as it is now."""
    return bench.ask(lm, items, cfg, _task(cfg), base)


def baselines(cfg: Config) -> Mapping[str, Any]:
    """The unpatched model in other words."""
    return bench.baselines(cfg, _task(cfg))


def texts(items: Sequence[Item], cfg: Config) -> tuple[list[str], int]:
    """The prompts; nothing is generated."""
    return [item.record.prompt for item in items], 0


def _task(cfg: Config) -> Task:
    def reply(lm: LM, records: Sequence[ContextRecord], wanted: Sequence[Wanted]) -> list[Reply]:
        return choose(lm, records, batch_size=cfg.batch_size, letters=cfg.letters or "blank")

    return Task(reply, suffix=cfg.suffix or "", official=cfg.official)


run, read_report = bound(__name__)
