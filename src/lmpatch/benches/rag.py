"""``rag``: does a model use relevant documents, even against its own knowledge, and ignore irrelevant ones?

Held-out articles are asked under five conditions, of the unpatched model and of patched ones, on the same items. What
is measured, and how each number is defined, stands in docs/benches.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from ..data.context import InContext
from ..data.rag.reader import RagRecord, f1, holds, is_built, normalise, read_built, read_rag, whole
from ..errors import BadInput
from ..inference.closed_book import closed_book_answers
from ..inference.generate import generate
from ..inference.isolate import isolate
from ..models.lm import LM
from ..progress import Progress
from ..provenance import hash_json
from .context.examples import Pool, Records, behind, chosen, written
from .core import contract
from .core.asking import beyond_window
from .core.contract import Curve, Example, Json, Measure, Scatter, Settings
from .core.runner import bound

Condition = Literal["context", "conflict", "mixed", "irrelevant", "empty", "poison"]
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
POISON: Condition = "poison"
"""The condition of samples with hostile passages."""
PASSAGES = 10
"""Passages such a sample has."""
AGREES = 0.5
"""Token F1 of a closed-book answer with the context's from which the two do not conflict. Source: COIECD."""
CONTEXTS = True
OWN = ("few_shot",)


@dataclass(frozen=True)
class Config(Settings):
    """The RAG bench. What each number means: docs/benches.md."""

    n: int = 200
    """Items of each condition at most, half as many of ``mixed``, whose prompts are three times as long. They are
    chosen by the hash of their question; among irrelevant ones those the model knows come first."""
    conditions: tuple[str, ...] = tuple(CONDITIONS)
    """Conditions to ask: context, conflict, mixed, irrelevant, empty."""
    doses: tuple[int, ...] = ()
    """Ask also with so many hostile ones among ten passages, a quarter of ``n`` questions each: 0,1,5,9,10. Then the
    unpatched model is also asked passage by passage, with a vote on its answers."""
    shots: int = 0
    """Solved examples of the training articles, of both skills in turn, before each prompt of a further run of the
    unpatched model. The same ones for every question; ``seed`` chooses them."""
    few_shot: bool = True
    """With ``shots``: ask the patched model behind the examples, too."""
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
    dose: int | None = None
    """Hostile ones among its passages."""
    hostile: str = ""
    """What those say."""
    alone: tuple[InContext, ...] = ()
    """The prompts with one passage each, where there are several."""
    shown: str = ""
    """The solved examples of a few-shot prompt."""


def load(path: str | Path, *, limit: int | None = None, seed: int | None = None) -> Records:
    """The held-out records of a file of ``lmpatch data rag``, of a SQuAD-format file, or of logs; ``dev.jsonl`` too.

    Args:
        limit: at most this many records of each variant.
        seed: takes no part; ``Config.seed`` chooses the items.
    Raises:
        BadInput, BadRecord: as ``data.rag.read_rag``.
    """
    dev = is_built(path) and {r.part for r in read_built(path)} == {"dev"}
    return Records(read_rag(path, part="dev" if dev else "held_out", limit=limit), Pool(path))


def settle(cfg: Config, records: Sequence[RagRecord], fixed: bool) -> Config:
    """The settings as they are; refuses names that are none."""
    if odd := [name for name in cfg.conditions if name not in CONDITIONS]:
        raise BadInput(f"rag has no condition {odd[0]!r}. There are: {', '.join(CONDITIONS)}.")
    if cfg.n < 1:
        raise BadInput(f"n is {cfg.n}; give 1 or more.")
    if cfg.shots < 0:
        raise BadInput(f"shots is {cfg.shots}; give the number of examples, or 0 for none.")
    if cfg.shots and not isinstance(records, Records):
        raise BadInput("shots asks for examples, and plain records have none. Give what rag.load reads from a file.")
    if odd_doses := [dose for dose in cfg.doses if not 0 <= dose <= PASSAGES]:
        raise BadInput(f"a dose is {odd_doses[0]}; of {PASSAGES} passages 0 to {PASSAGES} can be hostile.")
    return cfg


def plan(
    lm: LM, records: Sequence[RagRecord], cfg: Config, *, fixed: bool = False, progress: Progress | None = None
) -> list[Sample]:
    """The items of a run. The unpatched model is asked for its own answers first, which decide what conflicts."""
    questions = [r.question for r in records]
    answers = closed_book_answers(lm, questions, progress=progress)
    own = {q: answer.text for q, answer in zip(questions, answers, strict=True)}
    everything = samples(records, own)
    items: list[Sample] = []
    for condition in cfg.conditions:
        group = [s for s in everything if s.condition == condition]
        first = condition in ("irrelevant", "empty")
        group.sort(key=lambda s: (first and not s.known, hash_json([cfg.seed, s.id.partition(":")[0]])))
        items += group[: (cfg.n + 1) // 2 if condition == "mixed" else cfg.n]
    items += poisoned(records, own, cfg)
    if isinstance(records, Records) and cfg.shots:
        shown = written(chosen(records.pool.records, cfg.shots, cfg.seed))
        items = [replace(item, shown=shown) for item in items]
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


def poisoned(records: Sequence[RagRecord], own: Mapping[str, str], cfg: Config) -> list[Sample]:
    """Questions with ten passages, some of them hostile: the answering document with the true answer or, in the same
    form, with a wrong one that answers another question of the data; behind it a sentence from elsewhere, so that no
    two passages are alike. Which ones are hostile the seed decides; those of a smaller dose are so in a larger one.
    """
    pairs: dict[str, dict[str, RagRecord]] = {}
    for r in records:
        pairs.setdefault(r.id.partition(":")[0], {})[r.variant] = r
    both = [(two["original"], two["substituted"]) for two in pairs.values() if {"original", "substituted"} <= {*two}]
    both.sort(key=lambda two: hash_json([cfg.seed, two[0].id]))
    texts = sorted({document for r in records for document in r.documents if r.variant == "foreign"})
    items = []
    for right, wrong in both[: (cfg.n + 3) // 4] if cfg.doses else ():
        answers = (*right.gold, right.answer, wrong.answer)
        fill = sorted((t for t in texts if not holds(t, answers)), key=lambda t: hash_json([cfg.seed, right.id, t]))
        ends = [re.split(r"(?<=[.!?])\s", text)[0] for text in fill[:PASSAGES]] or [""]
        order = sorted(range(PASSAGES), key=lambda i: hash_json([cfg.seed, right.id, i]))
        closed, question = own[right.question], right.id.partition(":")[0]
        for dose in cfg.doses:
            bad = {*order[:dose]}
            passages = [
                f"{(wrong if i in bad else right).documents[0]} {ends[i % len(ends)]}".rstrip() for i in range(PASSAGES)
            ]
            whole_, *alone = (
                replace(right, documents=tuple(some), prompt="", without_context="").asked
                for some in (passages, *([p] for p in passages))
            )
            wanted, known = tuple(dict.fromkeys((right.answer, *right.gold))), holds(closed, right.gold)
            items.append(
                Sample(
                    f"{question}:dose{dose}", right.title or question, POISON, whole_, right.question, wanted, closed,
                    known, dose, wrong.answer, tuple(alone),
                )
            )  # fmt: skip
    return items


def ask(lm: LM, items: Sequence[Sample], cfg: Config, base: Sequence[Row] | None = None) -> list[Row]:
    """One row per item, in their order, from the model as it is now; one that is longer than the window is flagged.

    Args:
        base: the unpatched model's rows; None: it is the one that is asked, and sees no examples.
    """
    asked = [behind(s.shown, s.asked) if base is not None and cfg.few_shot else s.asked for s in items]
    flags = beyond_window(lm, [one.prompt for one in asked], new_tokens=cfg.max_new_tokens)
    prompts = [one for one, flag in zip(asked, flags, strict=True) if not flag]
    answers = iter(generate(lm, prompts, max_new_tokens=cfg.max_new_tokens, batch_size=cfg.batch_size))
    return [judged(s, "" if flag else next(answers).strip(), flag) for s, flag in zip(items, flags, strict=True)]


def baselines(cfg: Config) -> Mapping[str, Any]:
    """The unpatched model behind solved examples, and reading a question's passages one at a time, see ``isolate``."""
    few: dict[str, Any] = {f"none, {cfg.shots} shots": partial(_few_shot, cfg)} if cfg.shots else {}
    return few | ({"none, isolated": partial(_isolated, cfg)} if cfg.doses else {})


def _few_shot(cfg: Config, lm: LM, items: Sequence[Sample], base: Sequence[Row] | None) -> list[Row]:
    return ask(lm, items, replace(cfg, few_shot=True), base or ())


def _isolated(cfg: Config, lm: LM, items: Sequence[Sample], base: Sequence[Row] | None) -> list[Row]:
    """Where there is one passage or none, as the unpatched model was asked already."""
    rows = {row.key(): row for row in base or ()}
    asked = [s for s in items if s.alone and not rows[s.condition, s.id].flag]  # what fits together also fits alone
    votes = isolate(lm, [s.alone for s in asked], max_new_tokens=cfg.max_new_tokens, batch_size=cfg.batch_size)
    rows |= {(s.condition, s.id): judged(s, one.text) for s, one in zip(asked, votes, strict=True)}
    return [rows[s.condition, s.id] for s in items]


def identity(item: Sample) -> Any:
    """What is read, and the closed-book answer it is judged by."""
    return [item.condition, item.id, item.asked.prompt, item.own, *([item.shown] if item.shown else [])]


def texts(items: Sequence[Sample], cfg: Config) -> tuple[list[str], int]:
    """The prompts, and the new tokens behind each."""
    return [item.shown + item.asked.prompt for item in items], cfg.max_new_tokens


def record(items: Sequence[Sample], records: Any, cfg: Config) -> Json:
    """How many items each condition has."""
    names = (*cfg.conditions, *([POISON] if cfg.doses else []))
    return {"conditions": {c: sum(item.condition == c for item in items) for c in names}}


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
    """It has a wanted answer; under ``context``, ``conflict`` and ``mixed`` the model's own is not beside it, nor under
    ``poison`` the hostile one."""
    exact: bool
    """It is a wanted answer, normalised."""
    kept: bool
    """It is the model's own closed-book answer, or nearly."""
    dose: int | None = None
    """Hostile ones among ten passages."""
    hostile: str = ""
    """What those say."""
    lured: bool = False
    """It says so."""

    def key(self) -> Hashable:
        """Condition and record."""
        return self.condition, self.id

    def cluster(self) -> str | None:
        """The article."""
        return self.article

    def where(self) -> str:
        """The condition."""
        return self.condition if self.dose is None else f"{self.condition} {self.dose}"

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
    lured = bool(sample.hostile) and holds(text, [sample.hostile])
    names = ("id", "article", "condition", "question", "wanted", "own", "known", "dose", "hostile")
    asked = {name: getattr(sample, name) for name in names}
    return Row(
        **asked,
        text=text,
        hit=has and not lured and not (reads and _beside(text, sample)),
        lured=lured,
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


def _dosed(row: Row) -> str | None:
    return None if row.dose is None or row.flag else str(row.dose)


def _had_own(row: Row) -> str | None:
    return "" if row.condition == "irrelevant" and not row.flag and normalise(row.own) else None


HIT, EXACT, KEPT, LURED = (attrgetter(name) for name in ("hit", "exact", "kept", "lured"))
AD, RO = "Adherence: follows its documents", "Robustness: only where they help"
DOSE = "Poison: hostile passages among ten"
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
    "right": Measure("has the true answer and not the hostile one, by hostile passages of ten", HIT, _dosed, DOSE,
                     headline=True),
    "hostile": Measure("has the hostile answer, by hostile passages of ten", LURED, _dosed, DOSE, better="less",
                       headline=True),
    **{f"exact/{name}": Measure(f"is a wanted answer, normalised; {what}", EXACT, _of(name), "Exact answers")
       for name, what in CONDITIONS.items()},
}  # fmt: skip


def _by_dose(value: Callable[[Row], bool]) -> Callable[[Sequence[Row]], list[tuple[str, float]]]:
    def points(rows: Sequence[Row]) -> list[tuple[str, float]]:
        found: dict[int, list[bool]] = {}
        for row in rows:
            if _dosed(row) is not None and row.dose is not None:
                found.setdefault(row.dose, []).append(value(row))
        return [(str(dose), sum(values) / len(values)) for dose, values in sorted(found.items())]

    return points


DOSES, HOSTILE = tuple(map(str, range(PASSAGES + 1))), f"hostile passages of {PASSAGES}"
PLOTS = (
    Scatter("Robustness against adherence", "R_Ad", "R_Ro"),
    Curve("True answers by poison dose", HOSTILE, "has the true answer alone", _by_dose(HIT), DOSES),
    Curve("Hostile answers by poison dose", HOSTILE, "has the hostile answer", _by_dose(LURED), DOSES),
)

run, read_report = bound(__name__)
