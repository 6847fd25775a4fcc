"""The settings of the bench, and what they make of a list of facts: the order of writing, what is asked, what collides.

A chunk is written and scored on one model, then taken off. Facts of one chunk can collide: one prompt with two
targets, or a locality prompt that is itself edited. Such questions get a flag and are not asked, so every count
of what is missing can be made from the rows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ...data.edits import Ask, Edit, read_asks, read_edits
from ...data.matching import first, normalise
from ...errors import BadInput
from ...inference.tokens import premise
from ..core.contract import Settings
from . import pack
from .questions import Question

SUPERSEDED, REPEATED, COLLIDED, DUPLICATE = "superseded", "repeated", "collided", "duplicate"


@dataclass(frozen=True)
class Config(Settings):
    """The facts bench. What each number means: docs/benches.md."""

    n: int = 1
    """Edits that are in the model together; after them it is restored."""
    commit_size: int | None = None
    """Edits written by one call of the method. None: all n."""
    chunks: int | None = None
    """Groups of n edits to run at most. None: as many as the data fills."""
    max_new_tokens: int = 32
    """Length of an answer at most; a new line ends it earlier."""
    em_rule: Literal["prefix", "full"] = "prefix"
    """An answer is right if it begins with an accepted spelling, or (full, for chat models) if it is one."""
    immediate: bool = True
    """Also score each edit right after its commit, where a chunk has several."""
    retention: bool = False
    """Follow a tenth of the edits while later ones are written."""
    teacher_forced: bool = True
    """Also the tf_ numbers of older papers. They are easier than the generated ones and stand apart."""
    per_kind: int = 5
    """Prompts of one kind a case may ask."""
    distractor: bool = True
    """Also ask one locality prompt of each case behind the edit sentence."""
    sample: int = 1000
    """Edits of a larger chunk that are scored."""
    pack: int = 30
    """Facts of a run that are asked the probe pack: negation, the old fact mentioned, true or false, ... 0: none."""
    raw: bool = False
    """No rules for colliding facts, to reproduce others' numbers."""
    health: bool = True
    """Perplexity of fixed text after each commit; a chunk stops at twice the base's."""
    latency: bool = True
    """Time a prompt and a token with and without the first chunk's patches."""
    fit_batch: int = 32
    """Independent single edits fitted in one call, by methods that can."""


OWN = ("immediate", "retention")
COSTS = ("fit_batch", "latency", "health", "pack")


def load(
    path: str | Path, *, limit: int | None = None, seed: int | None = None, unrelated: str | Path | None = None
) -> list[Edit]:
    """Facts from a file, see ``data.edits``.

    Args:
        unrelated: a file of questions; one of them joins each edit as locality kind ``unrelated``.
    """
    edits = read_edits(path, limit=limit, seed=seed)
    return edits if unrelated is None else with_unrelated(edits, read_asks(unrelated))


def with_unrelated(edits: Sequence[Edit], asks: Sequence[Ask]) -> list[Edit]:
    """The edits, each with one of the questions as locality kind ``unrelated``, in turn."""
    return [
        replace(edit, locality=(*edit.locality, ("unrelated", (asks[i % len(asks)],)))) for i, edit in enumerate(edits)
    ]


def settle(cfg: Config, edits: Sequence[Edit], fixed: bool) -> Config:
    """The settings; a patch that is there already is scored on all edits as one chunk."""
    if fixed:
        return replace(cfg, n=len(edits), commit_size=None, chunks=None)
    if cfg.n < 1 or (cfg.commit_size is not None and cfg.commit_size < 1):
        raise BadInput(f"n is {cfg.n} and commit_size {cfg.commit_size}; both must be 1 or more.")
    return cfg


@dataclass(frozen=True)
class Chunk:
    """Edits that are in the model together when they are scored."""

    index: int
    edits: tuple[Edit, ...]
    commits: tuple[tuple[int, ...], ...]
    """Places of the edits each commit writes; superseded ones of the same commit and repeats are left out."""
    questions: tuple[Question, ...]
    counts: dict[str, int]
    """Collisions: flag → edits, or flag/kind → questions."""

    def after_commit(self, commit: int) -> list[Question]:
        """What is asked right after a commit: its own edits and their rephrases, later superseded ones too."""
        cases = set(self.commits[commit])
        own = [q for q in self.questions if q.case in cases and q.kind in ("edit", "rephrase")]
        return [replace(q, flag="" if q.flag == SUPERSEDED else q.flag) for q in own]

    def with_fact(self) -> list[Question]:
        """The questions, each behind its own edit sentence; distractor prompts have it already."""
        return [with_fact(self.edits[q.case], q) for q in self.questions if q.kind != "loc/distractor"]

    def every(self) -> list[Question]:
        """Everything the unpatched model is asked about the chunk."""
        early = [q for c in range(len(self.commits)) for q in self.after_commit(c)] if len(self.commits) > 1 else []
        return [*self.questions, *early, *self.with_fact()]

    def probes(self) -> set[int]:
        """Edits whose retention is followed: a tenth, 10 at least and 300 at most, spread over the order of writing."""
        cases = sorted({q.case for q in self.questions if q.kind == "edit" and not q.flag})
        count = min(len(cases), max(10, min(300, len(cases) // 10)))
        return {cases[i * (len(cases) - 1) // max(1, count - 1)] for i in range(count)}


def plan_chunks(edits: Sequence[Edit], cfg: Config, *, shuffled: bool = True) -> list[Chunk]:
    """Shuffle once, cut consecutive chunks of ``n`` edits, and decide what is asked.

    Raises:
        BadInput: fewer than ``n`` edits.
    """
    if len(edits) < cfg.n:
        raise BadInput(f"a chunk needs n={cfg.n} edits, found {len(edits)}. Give more facts or a smaller n.")
    order, seen = [], Counter[str]()
    for place, edit in enumerate(edits):
        name = edit.id or str(place)
        seen[name] += 1
        order.append(replace(edit, id=name if seen[name] == 1 else f"{name}#{seen[name]}"))
    if shuffled:
        random.Random(cfg.seed).shuffle(order)
    starts = range(0, len(order) - cfg.n + 1, cfg.n)[: cfg.chunks]
    chunks = [_chunk(i, order[start : start + cfg.n], cfg) for i, start in enumerate(starts)]
    return _with_pack(chunks, cfg)


def _with_pack(chunks: list[Chunk], cfg: Config) -> list[Chunk]:
    """The chunks, the probe pack asked about some of their edits."""
    asked = [(c.index, q.case) for c in chunks for q in c.questions if q.kind == "edit" and not q.flag]
    chosen = pack.drawn(asked, cfg.pack, cfg.seed)
    every = [edit for chunk in chunks for edit in chunk.edits] if chosen else []
    made: dict[int, list[Question]] = {}
    for index, case in sorted(chosen):
        edit = chunks[index].edits[case]
        made.setdefault(index, []).extend(pack.questions(case, edit, pack.contrast(edit, every)))
    return [
        replace(c, questions=tuple(sorted([*c.questions, *made[c.index]], key=lambda q: q.case)))
        if c.index in made else c
        for c in chunks
    ]  # fmt: skip


def with_fact(edit: Edit, question: Question) -> Question:
    """The same question, asked after the edit as a statement: ``The Eiffel Tower is in Rome.``"""
    fact = premise(edit.prompt, edit.target)
    against = fact + question.against if question.against else ""
    return replace(question, whole=fact + question.prompt, against=against)


def _chunk(index: int, edits: list[Edit], cfg: Config) -> Chunk:
    size = cfg.commit_size or cfg.n
    places = [tuple(range(s, min(s + size, len(edits)))) for s in range(0, len(edits), size)]
    questions = [q for i, edit in enumerate(edits) for q in _questions(i, edit, cfg.per_kind)]
    if not cfg.raw:
        fate, places = _fates(edits, places)
        questions = _flagged(edits, questions, fate)
    if cfg.distractor:  # the first locality question of each case that may be asked, behind the edit sentence
        firsts = {q.case: q for q in reversed(questions) if q.kind.startswith("loc/") and not q.flag}
        behind = [replace(q, prompt=with_fact(edits[q.case], q).text) for q in firsts.values()]
        questions += [replace(q, kind="loc/distractor") for q in behind]
    questions.sort(key=lambda q: q.case)
    counts: Counter[str] = Counter()
    for q in questions:
        if q.flag in (SUPERSEDED, REPEATED):
            counts[q.flag] += q.kind == "edit"
        elif q.flag:
            counts[f"{q.flag}/{q.kind}"] += 1
    if len(edits) > cfg.sample:
        cases = set(random.Random(cfg.seed).sample(range(len(edits)), cfg.sample))
        questions = [q for q in questions if q.case in cases]
    return Chunk(index, tuple(edits), tuple(filter(None, places)), tuple(questions), dict(sorted(counts.items())))


def _questions(case: int, edit: Edit, per_kind: int) -> list[Question]:
    questions = [Question(case, "edit", edit.prompt, edit.answers, edit.old)]
    questions += [Question(case, "rephrase", text, edit.answers, edit.old) for text in edit.rephrases[:per_kind]]
    for prefix, groups in (("loc", edit.locality), ("port", edit.portability)):
        for kind, asks in groups:
            questions += [Question(case, f"{prefix}/{kind}", ask.prompt, ask.answers) for ask in asks[:per_kind]]
    return questions


def _fates(edits: Sequence[Edit], places: Sequence[tuple[int, ...]]) -> tuple[dict[int, str], list[tuple[int, ...]]]:
    """Edits that lose to a later one of the same prompt, and the commits without those that need no writing.

    The same prompt and target twice is one edit. With another target the later one supersedes; the earlier is
    still written if its commit comes first, and is then scored right after it only.
    """
    commit_of = {i: c for c, commit in enumerate(places) for i in commit}
    fate: dict[int, str] = {}
    unwritten: set[int] = set()
    live: dict[str, int] = {}
    for i, edit in enumerate(edits):
        key = normalise(edit.prompt)
        j = live.get(key)
        if j is not None and normalise(edits[j].target) == normalise(edit.target):
            fate[i] = REPEATED
            unwritten.add(i)
            continue
        if j is not None:
            fate[j] = SUPERSEDED
            if commit_of[j] == commit_of[i]:
                unwritten.add(j)
        live[key] = i
    return fate, [tuple(i for i in commit if i not in unwritten) for commit in places]


def _flagged(edits: Sequence[Edit], questions: Sequence[Question], fate: dict[int, str]) -> list[Question]:
    edited = {normalise(edit.prompt) for edit in edits}
    subjects: dict[str, dict[str, set[int]]] = {}  # relation -> subject -> live edits
    for i, edit in enumerate(edits):
        if edit.subject and i not in fate:
            subjects.setdefault(_relation(edit), {}).setdefault(normalise(edit.subject), set()).add(i)
    seen: set[tuple[str, str]] = set()
    flagged = []
    for q in questions:
        key, edit = normalise(q.prompt), edits[q.case]
        flag = fate.get(q.case, "")
        if not flag and q.kind != "edit" and (key in edited or _same_fact(q, key, edit, subjects)):
            flag = COLLIDED
        if not flag and q.kind.startswith("loc/"):
            flag = DUPLICATE if (q.kind, key) in seen else ""
            seen.add((q.kind, key))
        flagged.append(replace(q, flag=flag))
    return flagged


def _same_fact(q: Question, key: str, edit: Edit, subjects: dict[str, dict[str, set[int]]]) -> bool:
    """Whether the question asks for the subject and relation of another edit, in other words."""
    near = subjects.get(_relation(edit), {})
    own = normalise(edit.subject)
    if q.kind == "rephrase":
        return bool(near.get(own, set()) - {q.case})
    if q.kind != "loc/same_relation":
        return False
    return any(subject in key and first(key, [subject]) is not None for subject in near if subject != own)


def _relation(edit: Edit) -> str:
    return edit.relation or normalise(edit.prompt.replace(edit.subject, "{}", 1))
