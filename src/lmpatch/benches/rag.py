"""``rag``: does a model use relevant documents, even against its own knowledge, and ignore irrelevant ones?

Held-out articles are asked under five conditions, of the unpatched model and of patched ones, on the same items. What
is measured, and how each number is defined, stands in docs/benches.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from ..data.context import InContext
from ..data.rag.reader import RagRecord, f1, holds, is_built, normalise, read_built, read_rag, whole
from ..errors import BadInput
from ..inference.closed_book import closed_book_answers
from ..inference.generate import generate
from ..models.lm import LM
from ..progress import Progress
from ..provenance import hash_json
from .core import contract
from .core.asking import beyond_window
from .core.contract import Example, Json, Measure, Scatter, Settings
from .core.runner import bound

Condition = Literal["context", "conflict", "mixed", "irrelevant", "empty"]
CONDITIONS: dict[Condition, str] = {
    "context": "the document that answers",
    "conflict": "that document with another answer",
    "mixed": "the same among noise of its own and of another article",
    "irrelevant": "a document of another article",
    "empty": "no document",
}
VARIANTS: dict[str, tuple[Condition, ...]] = {
    "original": ("context",),
    "substituted": ("conflict",),
    "mixed": ("mixed",),
    "foreign": ("irrelevant", "empty"),
}
"""Variant of a record → the conditions it is asked under."""
AGREES = 0.5
"""Token F1 of a closed-book answer with the context's from which the two do not conflict. Source: COIECD."""
CONTEXTS = True


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


@dataclass(frozen=True)
class Sample:
    """One question under one condition."""

    id: str
    article: str
    condition: Condition
    asked: InContext
    question: str
    wanted: tuple[str, ...]
    """What the document says; the true answers where it says nothing."""
    own: str
    """The unpatched model's closed-book answer."""
    known: bool
    """A true answer stands in it: repeated, it is a hit where the document does not answer."""


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
    """The items of a run. The unpatched model is asked for its own answers first, which decide what conflicts."""
    questions = [r.question for r in records]
    answers = closed_book_answers(lm, questions, progress=progress)
    everything = samples(records, {q: answer.text for q, answer in zip(questions, answers, strict=True)})
    items: list[Sample] = []
    for condition in cfg.conditions:
        group = [s for s in everything if s.condition == condition]
        first = condition in ("irrelevant", "empty")
        group.sort(key=lambda s: (first and not s.known, hash_json([cfg.seed, s.id.partition(":")[0]])))
        items += group[: (cfg.n + 1) // 2 if condition == "mixed" else cfg.n]
    if not items:
        raise BadInput("nothing is left to ask: no record conflicts with the model's memory or has a true answer.")
    return items


def samples(records: Sequence[RagRecord], own: Mapping[str, str]) -> list[Sample]:
    """Everything that can be asked about records. Without a conflict or a true answer there is nothing to ask.

    Args:
        own: question → closed-book answer.
    """
    items = []
    without_context: set[str] = set()  # questions asked without a document: once, however many records they have
    for r in records:
        closed, question = own[r.question], r.id.partition(":")[0]
        for condition in VARIANTS.get(r.variant, ()):
            if condition == "empty":
                if (key := question or r.question) in without_context:
                    continue
                without_context.add(key)
            changed = condition in ("conflict", "mixed")
            if changed and (f1(closed, r.answer) >= AGREES or holds(closed, [r.answer])):
                continue
            wanted = (r.answer,) if changed else r.gold or ((r.answer,) if r.answer else ())
            if wanted:
                asked = InContext(r.without_context, r.without_context) if condition == "empty" else r.asked
                right = holds(closed, r.gold)
                items.append(Sample(r.id, r.title or question, condition, asked, r.question, wanted, closed, right))
    return items


def ask(lm: LM, items: Sequence[Sample], cfg: Config) -> list[Row]:
    """One row per item, in their order, from the model as it is now; one that is longer than the window is flagged."""
    flags = beyond_window(lm, [s.asked.prompt for s in items], new_tokens=cfg.max_new_tokens)
    prompts = [s.asked for s, flag in zip(items, flags, strict=True) if not flag]
    answers = iter(generate(lm, prompts, max_new_tokens=cfg.max_new_tokens, batch_size=cfg.batch_size))
    return [judged(s, "" if flag else next(answers).strip(), flag) for s, flag in zip(items, flags, strict=True)]


def identity(item: Sample) -> Any:
    """What is read, and the closed-book answer it is judged by."""
    return [item.condition, item.id, item.asked.prompt, item.own]


def texts(items: Sequence[Sample], cfg: Config) -> tuple[list[str], int]:
    """The prompts, and the new tokens behind each."""
    return [item.asked.prompt for item in items], cfg.max_new_tokens


def record(items: Sequence[Sample], records: Any, cfg: Config) -> Json:
    """How many items each condition has."""
    return {"conditions": {c: sum(item.condition == c for item in items) for c in cfg.conditions}}


@dataclass(frozen=True, kw_only=True)
class Row(contract.Row):
    """One sample, answered by one model."""

    id: str
    article: str
    """Its title; the question where there is none. Items of one article are not independent."""
    condition: Condition
    question: str
    wanted: tuple[str, ...]
    own: str
    known: bool
    text: str
    """What was generated."""
    hit: bool
    """It has a wanted answer; under ``context``, ``conflict`` and ``mixed`` the model's own is not beside it."""
    exact: bool
    """It is a wanted answer, normalised."""
    kept: bool
    """It is the model's own closed-book answer, or nearly."""

    def key(self) -> Hashable:
        """Condition and record."""
        return self.condition, self.id

    def cluster(self) -> str | None:
        """The article."""
        return self.article

    def where(self) -> str:
        """The condition."""
        return self.condition

    def generation(self) -> tuple[str, Sequence[str]] | None:
        """The text."""
        return None if self.flag else (self.text, self.wanted)

    def example(self) -> Example | None:
        """With the closed-book answer beside the question."""
        if self.flag:
            return None
        return Example(f"{self.question} [without documents: {self.own}]", self.wanted[0], self.text, self.hit)


def judged(sample: Sample, text: str, flag: str = "") -> Row:
    """The row of an answer, or of none where a flag says why."""
    has = holds(text, sample.wanted)
    reads = sample.condition in ("context", "conflict", "mixed")
    asked = {
        name: getattr(sample, name) for name in ("id", "article", "condition", "question", "wanted", "own", "known")
    }
    return Row(
        **asked,
        text=text,
        hit=has and not (reads and _beside(text, sample)),
        exact=normalise(text) in {normalise(w) for w in sample.wanted},
        kept=bool(normalise(sample.own)) and f1(text, sample.own) >= AGREES,
        flag=flag,
    )


def _beside(text: str, sample: Sample) -> bool:
    """The model's own answer stands in what is left of the text without the wanted one."""
    rest = normalise(text)
    for wanted in sorted(map(normalise, sample.wanted), key=len, reverse=True):
        rest = re.sub(whole(wanted), " ", rest) if wanted else rest
    return holds(rest, [sample.own])


def _of(*conditions: str, known: bool = False) -> Callable[[Row], str | None]:
    return lambda r: "" if r.condition in conditions and not r.flag and (r.known or not known) else None


def _had_own(row: Row) -> str | None:
    return "" if row.condition == "irrelevant" and not row.flag and normalise(row.own) else None


HIT, EXACT, KEPT = (attrgetter(name) for name in ("hit", "exact", "kept"))
AD, RO = "Adherence: follows its documents", "Robustness: only where they help"
FOLLOWED = "conflict items answered from the document and not from memory (adherence)"
HELD = "irrelevant items still right, of those right without documents (robustness)"
RIGHT = "has the document's answer, or the true one where it has none"
METRICS = {
    "R_Ad": Measure(FOLLOWED, HIT, _of("conflict"), AD, headline=True),
    "R_Ad/known": Measure("of these, those that memory has right", HIT, _of("conflict", known=True), AD),
    "R_Ad/mixed": Measure("the same among noise", HIT, _of("mixed"), AD),
    "R_Ro": Measure(HELD, HIT, _of("irrelevant", known=True), RO, headline=True),
    "R_Ro/empty": Measure("the same without a document", HIT, _of("empty", known=True), RO),
    "kept": Measure("irrelevant items with the model's own answer, right or wrong", KEPT, _had_own, RO),
    **{f"accuracy/{name}": Measure(f"{RIGHT}; {what}", HIT, _of(name), "Accuracy", headline=True)
       for name, what in CONDITIONS.items()},
    **{f"exact/{name}": Measure(f"is a wanted answer, normalised; {what}", EXACT, _of(name), "Exact answers")
       for name, what in CONDITIONS.items()},
}  # fmt: skip
PLOTS = (Scatter("Robustness against adherence", "R_Ad", "R_Ro"),)

run, read_report = bound(__name__)
