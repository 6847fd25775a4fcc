"""``memotrap``: does a model follow an instruction that conflicts with a proverb it knows?

MemoTrap asks to end a well-known phrase in an unusual way. The model goes on freely; its text up to the first period
is the context's answer, the one of memory, or neither. What is measured, and how, stands in docs/benches.md.

Source: Shi et al. 2024 (arXiv:2406.18406), sec. 4, on Liu and Liu 2023, MemoTrap.
Differs: a prompt is cut behind its instruction, not at its last colon; an answer is compared without the blanks around
it. ``official`` does as released.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data.context import ContextRecord
from ..errors import BadInput
from ..models.lm import LM
from .context import bench
from .context.answers import Reply, Wanted, complete
from .context.bench import OWN, Item, Task, identity, load
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
    """The memotrap bench. What each number means: docs/benches.md."""

    max_new_tokens: int = 10
    """Length of an answer at most. IRCAN takes 10, and 20 with CAD."""


def settle(cfg: Config, records: Sequence[ContextRecord], fixed: bool) -> Config:
    """The settings as they are; refuses records that cannot be asked here."""
    if cfg.max_new_tokens < 1:
        raise BadInput(f"max_new_tokens is {cfg.max_new_tokens}; give 1 or more.")
    for i, record in enumerate(records):
        if record.options:
            raise BadInput(f"record {record.id or i} has options. Ask it with the bench kre.")
        if "." in record.answer:
            raise BadInput(
                f"record {record.id or i}: texts are cut at their first period, so none matches {record.answer!r}."
            )
    return cfg


def plan(lm: LM, records: Sequence[ContextRecord], cfg: Config, **how: Any) -> list[Item]:
    """The items, as released where that is wanted."""
    return bench.plan(lm, [_as_released(record) for record in records] if cfg.official else records, cfg)


def ask(lm: LM, items: Sequence[Item], cfg: Config, base: Sequence[ContextRow] | None = None) -> list[ContextRow]:
    """Everything about these records, from the model as it is now."""
    return bench.ask(lm, items, cfg, _task(cfg), base)


def baselines(cfg: Config) -> Mapping[str, Any]:
    """The unpatched model in other words."""
    return bench.baselines(cfg, _task(cfg))


def texts(items: Sequence[Item], cfg: Config) -> tuple[list[str], int]:
    """The prompts, and the new tokens behind each."""
    return [item.record.prompt for item in items], cfg.max_new_tokens


def _task(cfg: Config) -> Task:
    def reply(lm: LM, records: Sequence[ContextRecord], wanted: Sequence[Wanted]) -> list[Reply]:
        limit, size = cfg.max_new_tokens, cfg.batch_size
        return complete(lm, records, wanted, limit=limit, batch_size=size, official=cfg.official)

    return Task(reply, cfg.max_new_tokens, by_word=True, official=cfg.official)


def _as_released(record: ContextRecord) -> ContextRecord:
    """The prompt cut at its last colon, which takes part of the phrase away where that has one too."""
    rest = record.prompt.rpartition(": ")[2]
    return replace(
        record, without_context=rest, question=rest, context=record.prompt.removesuffix(rest) or record.context
    )


run, read_report = bound(__name__)
