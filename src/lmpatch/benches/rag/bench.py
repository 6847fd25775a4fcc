"""The RAG bench itself: settings, data, and what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.rag.reader import RagRecord, is_built, read_built, read_rag
from ...errors import BadInput
from ...inference.closed_book import closed_book_answers
from ...inference.generate import generate
from ...models.lm import LM
from ...progress import Progress
from ...provenance import hash_json
from ..core.asking import beyond_window
from ..core.contract import Json, Settings
from .rows import CONDITIONS, RagRow, Sample, judged, samples


@dataclass(frozen=True)
class Config(Settings):
    """The RAG bench. What each number means: docs/benches.md."""

    n: int = 200
    """Items of each condition at most, half as many of ``mixed``, whose prompts are three times as long. They are
    chosen by the hash of their question; among irrelevant ones those the model knows come first."""
    conditions: tuple[str, ...] = tuple(CONDITIONS)
    """Conditions to ask: context, conflict, mixed, irrelevant, empty."""
    max_new_tokens: int = 16
    """Length of an answer at most; a new line ends it earlier."""
    batch_size: int = 32
    """Prompts in one forward."""


def load(path: str | Path, *, limit: int | None = None, seed: int | None = None) -> list[RagRecord]:
    """The held-out records of a file of ``lmpatch data rag``, of a SQuAD-format file, or of logs; ``dev.jsonl`` too.

    Args:
        limit: at most this many records of each variant.
        seed: takes no part; ``Config.seed`` chooses the items.
    Raises:
        BadInput, BadRecord: as ``data.rag.read_rag``.
    """
    dev = is_built(path) and {r.part for r in read_built(path)} == {"dev"}
    return read_rag(path, part="dev" if dev else "held_out", limit=limit)


def settle(cfg: Config, records: Sequence[RagRecord], fixed: bool) -> Config:
    """The settings as they are; refuses names that are none."""
    if odd := [name for name in cfg.conditions if name not in CONDITIONS]:
        raise BadInput(f"rag has no condition {odd[0]!r}. There are: {', '.join(CONDITIONS)}.")
    if cfg.n < 1:
        raise BadInput(f"n is {cfg.n}; give 1 or more.")
    return cfg


def plan(
    lm: LM, records: Sequence[RagRecord], cfg: Config, *, fixed: bool = False, progress: Progress | None = None
) -> list[Sample]:
    """The items of a run. The unpatched model is asked for its own answers first, which decide what conflicts.

    Raises:
        BadInput: nothing is left to ask.
    """
    questions = [r.question for r in records]
    answers = closed_book_answers(lm, questions, progress=progress)
    own = {question: answer.text for question, answer in zip(questions, answers, strict=True)}
    items: list[Sample] = []
    everything = samples(records, own)
    for condition in cfg.conditions:
        group = [s for s in everything if s.condition == condition]
        first = condition in ("irrelevant", "empty")
        group.sort(key=lambda s: (first and not s.known, hash_json([cfg.seed, s.id.partition(":")[0]])))
        items += group[: (cfg.n + 1) // 2 if condition == "mixed" else cfg.n]
    if not items:
        raise BadInput("nothing is left to ask: no record conflicts with the model's memory or has a true answer.")
    return items


def ask(lm: LM, items: Sequence[Sample], cfg: Config) -> list[RagRow]:
    """One row per item, in their order, from the model as it is now; one that is longer than the window is flagged."""
    flags = beyond_window(lm, [s.asked.prompt for s in items], new_tokens=cfg.max_new_tokens)
    prompts = [s.asked for s, flag in zip(items, flags, strict=True) if not flag]
    texts = iter(generate(lm, prompts, max_new_tokens=cfg.max_new_tokens, batch_size=cfg.batch_size))
    return [judged(s, "" if flag else next(texts).strip(), flag) for s, flag in zip(items, flags, strict=True)]


def identity(item: Sample) -> Any:
    """What is read, and the closed-book answer it is judged by."""
    return [item.condition, item.id, item.asked.prompt, item.own]


def texts(items: Sequence[Sample], cfg: Config) -> tuple[list[str], int]:
    """The prompts, and the new tokens behind each."""
    return [item.asked.prompt for item in items], cfg.max_new_tokens


def record(items: Sequence[Sample], records: Any, cfg: Config) -> Json:
    """How many items each condition has."""
    return {"conditions": {c: sum(item.condition == c for item in items) for c in cfg.conditions}}
