"""Sets for Parenting from questions with documents: deterministic, offline, split by article.

Every choice is u(x) = SHA-256(seed, x): equal over runs, machines and Python's own hash seeds.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ..errors import BadInput
from ._rag_record import LABELS, Part, RagRecord
from ._rag_source import Question, has_words
from ._rag_types import SPAN, Type, answer_type, normalise, replaced


@dataclass(frozen=True)
class Build:
    """How sets are built. Defaults suit a model of 270M parameters on a CPU."""

    seed: int = 0
    """Decides every choice."""
    held_out: float = 0.25
    """Share of the articles that is not trained on."""
    adherence: int = 600
    """Records with an answering document for training: half with the original, half with a substituted answer."""
    robustness: int = 1200
    """Records whose documents do not answer: half foreign, half unanswerable. More than are trained on, since those
    whose answer the model knows are preferred and few."""
    extraction: int = 300
    """Records that tell three documents apart."""
    held_adherence: int = 300
    """Pairs held out."""
    held_robustness: int = 1500
    """Foreign records held out: of a small model's answers few are right, and only those can be kept."""
    words: int = 45
    """Longest document; about 60 tokens. Documents are cut to whole sentences."""
    distractors: bool = False
    """Put a same-article and an other-article document beside the answering one in training, too."""


@dataclass(frozen=True)
class Sets:
    """What was built."""

    records: list[RagRecord]
    """Sorted by id."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Why questions were not used."""


def build(questions: Sequence[Question], cfg: Build | None = None) -> Sets:
    """The three sets, for training and held out.

    Raises:
        BadInput: fewer than two articles, or nothing can be built for a part.
    """
    cfg = cfg or Build()
    if not 0 < cfg.held_out < 1 or cfg.words < 8:
        raise BadInput(f"held_out is {cfg.held_out} and words {cfg.words}. Give a share in 0..1, and 8 words or more.")
    skipped: Counter[str] = Counter()
    kept = _alone(questions, skipped)
    articles = sorted({q.article for q in kept}, key=lambda title: chance(cfg.seed, title))
    if len(articles) < 2:
        raise BadInput(f"{len(articles)} article cannot be split. Give questions of two or more, or title in the logs.")
    held = set(articles[: max(1, round(cfg.held_out * len(articles)))])
    records: list[RagRecord] = []
    for part in ("held_out", "train"):
        own = [q for q in kept if (q.article in held) == (part == "held_out")]
        made = _Part(own, part, cfg, skipped).records()
        if not made:
            raise BadInput(
                f"no record could be built for {part}: {dict(skipped)}. Give more questions, or raise words."
            )
        records += made
    return Sets(sorted(records, key=lambda r: (r.part, r.id)), skipped)


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

    def __init__(self, questions: Sequence[Question], part: Part, cfg: Build, skipped: Counter[str]) -> None:
        self.questions, self.part, self.cfg, self.skipped = questions, part, cfg, skipped
        self.paragraphs: dict[str, list[str]] = defaultdict(list)  # article -> texts in order
        for q in questions:
            if q.context not in self.paragraphs[q.article]:
                self.paragraphs[q.article].append(q.context)
        self.pools: dict[Type | str, set[tuple[str, str]]] = defaultdict(set)  # (answer, article)
        for q in questions:
            if q.answers:
                kind = answer_type(q.answers[0], q.question)
                self.pools[kind].add((q.answers[0], q.article))
                self.pools[kind[0]].add((q.answers[0], q.article))
        self.sorted = {kind: sorted(pool) for kind, pool in self.pools.items()}

    def records(self) -> list[RagRecord]:
        cfg, train = self.cfg, self.part == "train"
        pairs = (cfg.adherence + 1) // 2 if train else cfg.held_adherence
        foreign = (cfg.robustness + 1) // 2 if train else cfg.held_robustness
        return [
            *self._take("adherence", pairs, self._pair),
            *self._take("foreign", foreign, self._foreign),
            *self._take("unanswerable", cfg.robustness // 2 if train else 0, self._unanswerable),
            *self._take("extraction", cfg.extraction if train else 0, self._three),
        ]

    def _take(self, what: str, count: int, make: Callable[[Question], list[RagRecord]]) -> list[RagRecord]:
        """Records of the first ``count`` questions, in their order by chance, that make some."""
        made: list[RagRecord] = []
        taken = 0
        for q in sorted(self.questions, key=lambda q: chance(self.cfg.seed, f"{what} {q.id}")):
            if taken == count:
                break
            found = make(q)
            made += found
            taken += bool(found)
        return made

    def _record(self, q: Question, documents: Sequence[str], **values: str) -> RagRecord:
        values = {"id": f"{q.id}:{values['variant']}", "title": q.title, "part": self.part} | values
        return RagRecord(q.question, tuple(documents), gold=q.gold, **values)  # type: ignore[arg-type]

    def _skip(self, why: str) -> list[RagRecord]:
        self.skipped[why] += 1
        return []

    def _pair(self, q: Question) -> list[RagRecord]:
        """The same question on its paragraph, and on it with another answer."""
        if not q.answers:
            return []
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
        if changed is None or any(has_words(changed, old) for old in q.answers):
            return self._skip("the answer cannot be replaced everywhere")
        noise = self._noise(q, (*q.gold, new))
        original, other = [[text], [changed]], noise
        if self.cfg.distractors and self.part == "train" and other:
            original = [self._shuffled(q, [document, *other]) for (document,) in original]
        made = [
            self._record(q, original[0], kind="adherence", variant="original", answer=answer),
            self._record(q, original[1], kind="adherence", variant="substituted", answer=new),
        ]
        if self.part == "held_out" and other:
            mixed = self._shuffled(q, [changed, *other])
            made.append(self._record(q, mixed, kind="adherence", variant="mixed", answer=new))
        return made

    def _substitute(self, q: Question) -> str | None:
        """An answer of the same type from another article that stands nowhere near the question."""
        answer, kind = q.answers[0], answer_type(q.answers[0], q.question)
        size, near = len(answer.split()), f"{q.context} {q.question}"
        for key in (kind, kind[0]):
            pool = [
                text
                for text, article in self.sorted.get(key, [])
                if article != q.article
                and abs(len(text.split()) - size) <= SPAN
                and normalise(text) not in ("", normalise(answer))
                and not has_words(near, text)
            ]
            if pool:
                return pool[chance(self.cfg.seed, q.id) % len(pool)]
        return None

    def _foreign(self, q: Question) -> list[RagRecord]:
        text = self._elsewhere(q, q.gold) if q.gold else None
        return [self._record(q, [text], kind="robustness", variant="foreign")] if text else []

    def _unanswerable(self, q: Question) -> list[RagRecord]:
        if q.answers:
            return []
        text = cut(q.context, self.cfg.words)
        if text is None or any(has_words(text, gold) for gold in q.gold):
            return self._skip("no sentence is short enough")
        return [self._record(q, [text], kind="robustness", variant="unanswerable")]

    def _three(self, q: Question) -> list[RagRecord]:
        text = cut(q.context, self.cfg.words, q.answers[0]) if q.answers else None
        noise = self._noise(q, q.gold)
        if text is None or len(noise) < 2:
            return []
        labels = dict(zip((text, *noise), LABELS, strict=True))
        documents = self._shuffled(q, labels)
        lines = [f"Doc {i}: {labels[document]}" for i, document in enumerate(documents, 1)]
        return [self._record(q, documents, kind="extraction", variant="three", answer="\n".join([*lines, text]))]

    def _shuffled(self, q: Question, documents: Sequence[str] | dict[str, str]) -> list[str]:
        return sorted(documents, key=lambda document: chance(self.cfg.seed, f"{q.id} {document}"))

    def _noise(self, q: Question, without: Sequence[str]) -> list[str]:
        """A document of the same article, and one of another; fewer where there is none. Neither holds an answer."""
        own = self.paragraphs[q.article]
        place = own.index(q.context)
        near = sorted((text for text in own if text != q.context), key=lambda text: abs(own.index(text) - place))
        same = next(self._clean(near, without), None)
        return [text for text in (same, self._elsewhere(q, without)) if text]

    def _elsewhere(self, q: Question, without: Sequence[str]) -> str | None:
        others = sorted(
            (title for title in self.paragraphs if title != q.article),
            key=lambda title: chance(self.cfg.seed, f"{q.id} {title}"),
        )
        for title in others:
            texts = sorted(self.paragraphs[title], key=lambda text: chance(self.cfg.seed, f"{q.id} {text}"))
            for found in self._clean(texts, without):
                return found
        return None

    def _clean(self, texts: Sequence[str], without: Sequence[str]) -> Iterator[str]:
        for text in texts:
            short = cut(text, self.cfg.words)
            if short and not any(has_words(short, answer) for answer in without):
                yield short
