"""Sets for Parenting from questions with documents: deterministic, offline, split by article.

Every choice is u(x) = SHA-256(seed, x): equal over runs, machines and Python's own hash seeds.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from ...errors import BadInput
from .record import LABELS, Part, Question, RagRecord
from .types import SPAN, Type, answer_type, has_words, holds, normalise, replaced


@dataclass(frozen=True)
class Build:
    """How sets are built. Defaults suit a model of 270M parameters on a CPU."""

    seed: int = 0
    """Decides every choice."""
    held_out: float = 0.25
    """Share of the articles that is measured on."""
    dev: float = 0.25
    """Share of the articles on which settings are chosen: 9 of SQuAD's 35, at least two where enough are left. The rest
    is trained on."""
    adherence: int = 600
    """Records with an answering document for training: half with the original, half with a substituted answer."""
    foreign: int = 600
    """Records for training whose document is of another article. More than are trained on, since those whose answer the
    model knows are preferred and few."""
    unanswerable: int = 150
    """Records for training whose document is of this article and does not answer."""
    extraction: int = 300
    """Records that tell three documents apart."""
    held_adherence: int = 300
    """Pairs in ``dev`` and ``held_out`` each."""
    held_foreign: int = 1500
    """Questions with foreign documents in ``dev`` and ``held_out`` each: of a small model's answers few are right, and
    only those can be kept."""
    held_documents: int = 3
    """Foreign documents such a question is asked with, one at a time, each of another article."""
    words: int = 45
    """Longest document; about 60 tokens. Documents are cut to whole sentences."""
    extraction_words: int = 25
    """Longest document of three that are told apart: the answer copies one."""
    distractors: bool = False
    """Put a same-article and an other-article document beside the answering one in training, too."""


@dataclass(frozen=True)
class Sets:
    """What was built."""

    records: list[RagRecord]
    """Sorted by id."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Why questions were not used."""
    built: dict[str, tuple[int, int]] = field(default_factory=dict)
    """``part/set`` → for how many questions records were asked, and for how many they were built."""


def build(questions: Sequence[Question], cfg: Build | None = None) -> Sets:
    """The sets of the three parts.

    Raises:
        BadInput: fewer than two articles, or nothing can be built for training or held out.
    """
    cfg = cfg or Build()
    if not 0 < cfg.held_out < 1 or not 0 <= cfg.dev < 1 or min(cfg.words, cfg.extraction_words) < 8:
        raise BadInput(
            f"held_out is {cfg.held_out}, dev {cfg.dev}, words {cfg.words} and extraction_words "
            f"{cfg.extraction_words}. Give shares in 0..1, and 8 words or more."
        )
    sets = Sets([])
    kept = _alone(questions, sets.skipped)
    articles = sorted({q.article for q in kept}, key=lambda title: chance(cfg.seed, title))
    if (n := len(articles)) < 2:
        raise BadInput(f"{n} article cannot be split. Give questions of two or more, or title in the logs.")
    held = min(max(1, round(cfg.held_out * n)), n - 1)
    dev = max(2, round(cfg.dev * n)) if cfg.dev else 0  # of one alone nothing is built: noise and answers are others'
    if n - held - dev < 2:
        dev = 0
    ends: dict[Part, slice] = {"held_out": slice(held), "dev": slice(held, held + dev), "train": slice(held + dev, n)}
    for part, place in ends.items():
        own = {*articles[place]}
        made = _Part([q for q in kept if q.article in own], part, cfg, sets).records()
        if not made and part != "dev":
            raise BadInput(
                f"no record could be built for {part}: {dict(sets.skipped)}. Give more questions, or raise words."
            )
        sets.records.extend(made)
    sets.records.sort(key=lambda r: (r.part, r.id))
    return sets


def chance(seed: int, text: str) -> int:
    """u(x), a number of 256 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1f{text}".encode()).digest(), "big")


def cut(text: str, words: int, holding: str = "") -> str | None:
    """Whole sentences around the first one that holds ``holding``, at most ``words`` words; None if one is longer."""
    sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(\[])", " ".join(text.split()))
    lengths = [len(sentence.split()) for sentence in sentences]
    starts = [i for i, sentence in enumerate(sentences) if not holding or has_words(sentence, holding)]
    start = next((i for i in starts if lengths[i] <= words), None)
    if start is None:
        return None
    low, high, total = start, start + 1, lengths[start]
    while True:
        if high < len(sentences) and total + lengths[high] <= words:
            total, high = total + lengths[high], high + 1
        elif low > 0 and total + lengths[low - 1] <= words:
            total, low = total + lengths[low - 1], low - 1
        else:
            return " ".join(sentences[low:high])


def _alone(questions: Sequence[Question], skipped: Counter[str]) -> list[Question]:
    """Without paragraphs that stand in two articles, and with ids that name one question."""
    places: dict[str, set[str]] = defaultdict(set)
    for q in questions:
        places[normalise(q.context)].add(q.article)
    kept: dict[str, Question] = {}
    for q in questions:
        if len(places[normalise(q.context)]) > 1:
            skipped["paragraph in two articles"] += 1
        elif kept.setdefault(q.id, q) is not q:
            skipped["id used twice"] += 1
    return list(kept.values())


class _Part:
    """One side of the split."""

    def __init__(self, questions: Sequence[Question], part: Part, cfg: Build, sets: Sets) -> None:
        self.questions, self.part, self.cfg, self.sets = questions, part, cfg, sets
        self.train = part == "train"
        self.paragraphs: dict[str, list[str]] = defaultdict(list)  # article -> texts in order
        pools: dict[Type | str, set[tuple[str, str]]] = defaultdict(set)  # (answer, article)
        for q in questions:
            if q.context not in self.paragraphs[q.article]:
                self.paragraphs[q.article].append(q.context)
            if q.answers:
                kind = answer_type(q.answers[0], q.question)
                for key in (kind, kind[0]):
                    pools[key].add((q.answers[0], q.article))
        self.pools = {kind: sorted(pool) for kind, pool in pools.items()}

    def records(self) -> list[RagRecord]:
        cfg, train = self.cfg, self.train
        answered = [q for q in self.questions if q.answers]
        true = [q for q in self.questions if q.gold]
        bare = [q for q in self.questions if not q.answers]
        return [
            *self._take("adherence", answered, (cfg.adherence + 1) // 2 if train else cfg.held_adherence, self._pair),
            *self._take("foreign", true, cfg.foreign if train else cfg.held_foreign, self._foreign),
            *self._take("unanswerable", bare, cfg.unanswerable if train else 0, self._unanswerable),
            *self._take("extraction", answered, cfg.extraction if train else 0, self._three),
        ]

    def _take(
        self, what: str, questions: Sequence[Question], count: int, make: Callable[[Question], list[RagRecord]]
    ) -> list[RagRecord]:
        """Records of the first ``count`` questions, in their order by chance, that make some."""
        ordered = sorted(questions, key=lambda q: chance(self.cfg.seed, f"{what} {q.id}"))
        made = [*islice(filter(None, map(make, ordered)), count)]
        if count:
            self.sets.built[f"{self.part}/{what}"] = (count, len(made))
        return [record for records in made for record in records]

    def _record(self, q: Question, documents: Sequence[str], **values: str) -> RagRecord:
        values = {"id": f"{q.id}:{values['variant']}", "title": q.title, "part": self.part} | values
        return RagRecord(q.question, tuple(documents), gold=q.gold, **values)  # type: ignore[arg-type]

    def _skip(self, why: str) -> list[RagRecord]:
        self.sets.skipped[why] += 1
        return []

    def _pair(self, q: Question) -> list[RagRecord]:
        """The same question on its paragraph, and on it with another answer."""
        answer = q.answers[0]
        text = cut(q.context, self.cfg.words, answer)
        if text is None:
            return self._skip("no sentence with the answer is short enough")
        if has_words(q.question, answer) or has_words(q.title.replace("_", " "), answer):
            return self._skip("the answer stands in the question or title")
        new = self._substitute(q)
        if new is None:
            return self._skip("no other answer of its type")
        changed = replaced(text, answer, new)
        if changed is None or holds(changed, q.answers):
            return self._skip("the answer cannot be replaced everywhere")
        noise = [] if self.train and not self.cfg.distractors else self._noise(q, (*q.gold, new), self.cfg.words)
        documents = [self._shuffled(q, [document, *(noise if self.train else ())]) for document in (text, changed)]
        made = [
            self._record(q, documents[0], kind="adherence", variant="original", answer=answer),
            self._record(q, documents[1], kind="adherence", variant="substituted", answer=new),
        ]
        if noise and not self.train:
            mixed = self._shuffled(q, [changed, *noise])
            made.append(self._record(q, mixed, kind="adherence", variant="mixed", answer=new))
        return made

    def _substitute(self, q: Question) -> str | None:
        """An answer of the same type from another article that stands nowhere near the question."""
        answer, kind = q.answers[0], answer_type(q.answers[0], q.question)
        size, near = len(answer.split()), f"{q.context} {q.question}"
        for key in (kind, kind[0]):
            pool = [
                text
                for text, article in self.pools.get(key, [])
                if article != q.article
                and abs(len(text.split()) - size) <= SPAN
                and normalise(text) not in ("", normalise(answer))
                and not has_words(near, text)
            ]
            if pool:
                return pool[chance(self.cfg.seed, q.id) % len(pool)]
        return None

    def _foreign(self, q: Question) -> list[RagRecord]:
        count = 1 if self.train else self.cfg.held_documents
        texts = list(islice(self._elsewhere(q, q.gold, self.cfg.words), count))
        if not texts:
            return self._skip("no document of another article is free of its answers")
        return [
            self._record(q, [text], kind="robustness", variant="foreign", id=f"{q.id}:foreign{i if i > 1 else ''}")
            for i, text in enumerate(texts, 1)
        ]

    def _unanswerable(self, q: Question) -> list[RagRecord]:
        text = next(self._clean([q.context, *q.others], q.gold, self.cfg.words), None)
        if text is None:
            return self._skip("no sentence is short enough")
        return [self._record(q, [text], kind="robustness", variant="unanswerable")]

    def _three(self, q: Question) -> list[RagRecord]:
        words = min(self.cfg.words, self.cfg.extraction_words)
        text = cut(q.context, words, q.answers[0])
        if text is None:
            return self._skip("no sentence with the answer is short enough")
        noise = self._noise(q, q.gold, words)
        if len(noise) < 2:
            return self._skip("no document of its topic without its answers")
        labels = dict(zip((text, *noise), LABELS, strict=True))
        documents = self._shuffled(q, labels)
        lines = [f"Doc {i}: {labels[document]}" for i, document in enumerate(documents, 1)]
        return [self._record(q, documents, kind="extraction", variant="three", answer="\n".join([*lines, text]))]

    def _shuffled(self, q: Question, texts: Iterable[str]) -> list[str]:
        return sorted(texts, key=lambda text: chance(self.cfg.seed, f"{q.id} {text}"))

    def _noise(self, q: Question, without: Sequence[str], words: int) -> list[str]:
        """A document on the same topic, and one of another article; fewer where there is none. Neither holds an answer.

        Of the same topic are what was retrieved beside the context, then the article's paragraphs, the nearest first.
        """
        own = self.paragraphs[q.article]
        place = own.index(q.context)
        near = sorted((text for text in own if text != q.context), key=lambda text: abs(own.index(text) - place))
        same = next(self._clean([*q.others, *near], without, words), None)
        return [text for text in (same, next(self._elsewhere(q, without, words), None)) if text]

    def _elsewhere(self, q: Question, without: Sequence[str], words: int) -> Iterator[str]:
        """A document of every other article."""
        for title in self._shuffled(q, [title for title in self.paragraphs if title != q.article]):
            yield from islice(self._clean(self._shuffled(q, self.paragraphs[title]), without, words), 1)

    def _clean(self, texts: Sequence[str], without: Sequence[str], words: int) -> Iterator[str]:
        for text in texts:
            short = cut(text, words)
            if short and not holds(short, without):
                yield short
