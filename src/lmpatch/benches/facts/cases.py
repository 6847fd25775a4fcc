"""From a list of facts to chunks of questions: the order of writing, what is asked, and what collides.

A chunk is written and scored on one model, then taken off. Facts of one chunk can collide: one prompt with two
targets, or a locality prompt that is itself edited. Such questions get a flag and are not asked, so every count
of what is missing can be made from the rows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ...data.edits import Edit
from ...data.matching import first, normalise
from ...errors import BadInput
from ...inference.tokens import statement

SUPERSEDED, REPEATED, COLLIDED, DUPLICATE = "superseded", "repeated", "collided", "duplicate"


@dataclass(frozen=True)
class Question:
    """One prompt to score for one case."""

    case: int
    """Place of the edit in its chunk."""
    kind: str
    """``edit``, ``rephrase``, ``loc/<kind>`` or ``port/<axis>``."""
    prompt: str
    answers: tuple[str, ...]
    old: tuple[str, ...] = ()
    whole: str = ""
    """What the model reads, where that is more than ``prompt``."""
    flag: str = ""
    """Why it is not asked: superseded, repeated, collided or duplicate."""

    @property
    def text(self) -> str:
        """What the model reads."""
        return self.whole or self.prompt


@dataclass(frozen=True)
class Chunk:
    """Edits that are in the model together when they are scored."""

    index: int
    edits: tuple[Edit, ...]
    commits: tuple[tuple[int, ...], ...]
    """Places of the edits each commit writes; superseded ones of the same commit and repeats are left out."""
    questions: tuple[Question, ...]
    counts: dict[str, int] = field(default_factory=dict)
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


def plan_chunks(
    edits: Sequence[Edit],
    *,
    n: int,
    commit_size: int,
    seed: int | None = 0,
    chunks: int | None = None,
    per_kind: int = 5,
    distractor: bool = True,
    sample: int = 1000,
    raw: bool = False,
) -> tuple[list[Chunk], int]:
    """Shuffle once, cut consecutive chunks of ``n`` edits, and decide what is asked.

    Args:
        seed: order of writing; None keeps the order given.
        chunks: at most this many chunks.
        per_kind: prompts of one kind a case may ask, the first ones.
        distractor: also ask each case's first locality prompt with the edit sentence in front.
        sample: a larger chunk asks about this many of its edits, drawn at random once.
        raw: no collision rules.
    Returns:
        the chunks, and how many edits were left over in a last partial chunk.
    Raises:
        BadInput: fewer than ``n`` edits.
    """
    if len(edits) < n:
        raise BadInput(f"a chunk needs n={n} edits, found {len(edits)}. Give more facts or a smaller n.")
    order = list(_named(edits))
    if seed is not None:
        random.Random(seed).shuffle(order)
    parts = [order[start : start + n] for start in range(0, len(order) - n + 1, n)]
    whole = [_chunk(i, part, commit_size, per_kind, distractor, raw) for i, part in enumerate(parts[:chunks])]
    return [_sampled(chunk, sample, seed or 0) for chunk in whole], len(order) % n


def sentence(edit: Edit) -> str:
    """The edit as a statement: ``The Eiffel Tower is in Rome.``"""
    return statement(edit.prompt, edit.target)


def with_fact(edit: Edit, question: Question) -> Question:
    """The same question, asked after the edit sentence."""
    return replace(question, whole=f"{sentence(edit)} {question.prompt}")


def _named(edits: Sequence[Edit]) -> list[Edit]:
    """Edits with an id each that no other has."""
    seen: Counter[str] = Counter()
    named = []
    for place, edit in enumerate(edits):
        name = edit.id or str(place)
        seen[name] += 1
        named.append(replace(edit, id=name if seen[name] == 1 else f"{name}#{seen[name]}"))
    return named


def _chunk(index: int, edits: list[Edit], commit_size: int, per_kind: int, distractor: bool, raw: bool) -> Chunk:
    places = [tuple(range(s, min(s + commit_size, len(edits)))) for s in range(0, len(edits), commit_size)]
    questions = [q for i, edit in enumerate(edits) for q in _questions(i, edit, per_kind)]
    if not raw:
        fate, places = _fates(edits, places)
        questions = _flagged(edits, questions, fate)
    if distractor:
        questions += _distractors(edits, questions)
    questions.sort(key=lambda q: q.case)
    return Chunk(index, tuple(edits), tuple(filter(None, places)), tuple(questions), _counts(questions))


def _sampled(chunk: Chunk, size: int, seed: int) -> Chunk:
    if len(chunk.edits) <= size:
        return chunk
    cases = set(random.Random(seed).sample(range(len(chunk.edits)), size))
    return replace(chunk, questions=tuple(q for q in chunk.questions if q.case in cases))


def _questions(case: int, edit: Edit, per_kind: int) -> list[Question]:
    questions = [Question(case, "edit", edit.prompt, edit.answers, edit.old)]
    questions += [Question(case, "rephrase", text, edit.answers, edit.old) for text in edit.rephrases[:per_kind]]
    for prefix, groups in (("loc", edit.locality), ("port", edit.portability)):
        for kind, asks in groups:
            questions += [Question(case, f"{prefix}/{kind}", ask.prompt, ask.answers) for ask in asks[:per_kind]]
    return questions


def _distractors(edits: Sequence[Edit], questions: Sequence[Question]) -> list[Question]:
    """The first locality question of each case that may be asked, behind the edit sentence."""
    firsts: dict[int, Question] = {}
    for question in questions:
        if question.kind.startswith("loc/") and not question.flag:
            firsts.setdefault(question.case, question)
    return [
        replace(question, kind="loc/distractor", prompt=with_fact(edits[case], question).text)
        for case, question in firsts.items()
    ]


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


def _counts(questions: Sequence[Question]) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for q in questions:
        if q.flag in (SUPERSEDED, REPEATED):
            counted[q.flag] += q.kind == "edit"
        elif q.flag:
            counted[f"{q.flag}/{q.kind}"] += 1
    return dict(sorted(counted.items()))
