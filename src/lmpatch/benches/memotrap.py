"""``memotrap``: does a model follow an instruction that conflicts with a proverb it knows?

MemoTrap asks to end a well-known phrase in an unusual way. The model goes on freely; its text up to the first period
is the context's answer, the one of memory, or neither. What is measured, and how, stands in docs/benches.md.

Source: Shi et al. 2024 (arXiv:2406.18406), sec. 4, on Liu and Liu 2023, MemoTrap.
Differs: a prompt is cut behind its instruction, not at its last colon; an answer is compared without the blanks around
it. ``official`` does as released.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..data.context import ContextRecord, completion, one_line
from ..errors import BadInput
from ..inference.generate import generate
from ..models.lm import LM
from .context import bench
from .context.bench import JUDGED_BY, METRICS, OWN, PLOTS, Item, Reply, Row, Task, Wanted, identity, load
from .core.runner import bound

__all__ = [
    "CONTEXTS", "JUDGED_BY", "METRICS", "OWN", "PLOTS", "Config", "Row", "ask", "baselines", "identity", "load", "plan",
    "read_report", "run", "settle", "texts",
]  # fmt: skip

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


def _as_released(record: ContextRecord) -> ContextRecord:
    """The prompt cut at its last colon, which takes part of the phrase away where that has one too."""
    rest = record.prompt.rpartition(": ")[2]
    return replace(
        record, without_context=rest, question=rest, context=record.prompt.removesuffix(rest) or record.context
    )


def complete(
    lm: LM,
    records: Sequence[ContextRecord],
    wanted: Sequence[Wanted],
    *,
    limit: int,
    batch_size: int,
    official: bool = False,
) -> list[Reply]:
    """Continue each prompt greedily, and cut the text at its first period, behind a question also at its first line.

    An answer is not continued once it is settled: no further token could make it another one of the wanted answers, nor
    another first word.

    Args:
        wanted: for each prompt what is looked for in its answer.
        limit: new tokens at most.
    """

    def enough(i: int, text: str) -> bool:
        return settled(text, wanted[i], lines[i])

    prompts, lines = [record.asked for record in records], [one_line(record.prompt) for record in records]
    texts = generate(lm, prompts, max_new_tokens=limit, stop=(), batch_size=batch_size, enough=enough)
    return [Reply(cut(text, official, line)) for text, line in zip(texts, lines, strict=True)]


def cut(text: str, official: bool = False, line: bool = False) -> str:
    """The text up to its first period, without blanks around it; the released code leaves those before the period.

    Args:
        line: it ends at a new line, too.
    """
    head = completion(text, line)
    return head if official else head.strip()


def settled(text: str, wanted: Wanted, line: bool = False) -> bool:
    """Whatever follows, the text becomes none of the wanted answers; or the first word, if that is wanted, is whole."""
    start = text.lstrip()
    if "." in start or (line and "\n" in text):
        return True
    if wanted is None:
        return False
    if not wanted:
        return len(start.split()) > 1 or start[-1:].isspace()
    sure = start.rstrip("\ufffd").rstrip()  # a character of several tokens shows once its last one is there
    return not any(answer.startswith(sure) for answer in wanted)


def _task(cfg: Config) -> Task:
    reply = partial(complete, limit=cfg.max_new_tokens, batch_size=cfg.batch_size, official=cfg.official)
    return Task(reply, cfg.max_new_tokens, by_word=True, official=cfg.official)


ask, baselines, texts = bench.asking(_task)
run, read_report = bound(__name__)
