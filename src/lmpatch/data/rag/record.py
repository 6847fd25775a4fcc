"""A question of a source, and the record with documents that is built from it, with the prompts it is asked in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import BadInput
from ..context import Prompted

Kind = Literal["adherence", "robustness", "extraction"]
Variant = Literal["original", "substituted", "mixed", "foreign", "unanswerable", "three"]
Part = Literal["train", "dev", "held_out"]
LABELS = ("relevant", "same-topic noise", "off-topic noise")
"""What a document can be to a question."""
EXTRACT = (
    "Say of each document whether it is relevant, same-topic noise or off-topic noise. Then copy the relevant one."
)


@dataclass(frozen=True)
class Question:
    """One question of a source."""

    id: str
    article: str
    """What must not stand on both sides of a split: the title, or a group of logs that share documents."""
    context: str
    question: str
    answers: tuple[str, ...]
    """Answers that stand in the context; none: it does not answer."""
    gold: tuple[str, ...]
    """True answers, whether the context holds them or not."""
    title: str = ""
    others: tuple[str, ...] = ()
    """What else was retrieved and holds no answer."""


@dataclass(frozen=True)
class RagRecord(Prompted):
    """A question with documents, and which skill it trains or measures.

    Args:
        question: what is asked.
        documents: what was retrieved, in order.
        kind: ``adherence`` (a document answers), ``robustness`` (none does), ``extraction`` (tell them apart).
        variant: ``original`` or ``substituted`` document; ``mixed``: a substituted one among noise; ``foreign``: a
            paragraph of another article; ``unanswerable``: of this one, without an answer; ``three``: one a label.
        answer: what the documents support; empty for ``robustness``, whose answer is the model's own.
        gold: true answers, if known.
        title: of the article.
        id: the question's id and the variant, numbered from the second on; pairs share what stands before the colon.
        part: articles that are trained on, on which settings are chosen, or which are held out.
        prompt: everything the model reads before its answer. Left out, it is made of the parts above.
        without_context: the same without documents.
    Raises:
        BadInput: no question, no documents, or no answer where a document must have one.
    """

    question: str
    documents: tuple[str, ...]
    kind: Kind = "adherence"
    variant: Variant = "original"
    answer: str = ""
    gold: tuple[str, ...] = ()
    title: str = ""
    id: str = ""
    part: Part = "train"
    prompt: str = ""
    without_context: str = ""

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise BadInput("a record has no question. Give question, documents and answer.")
        if not self.documents or not all(document.strip() for document in self.documents):
            raise BadInput(f"the question {self.question!r} has no documents, or an empty one. Give at least one text.")
        for name, known in (("kind", Kind), ("variant", Variant), ("part", Part)):
            if getattr(self, name) not in get_args(known):
                raise BadInput(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(known))}.")
        if self.kind != "robustness" and not self.answer.strip():
            raise BadInput(f"the question {self.question!r} has no answer. Only robustness records do without.")
        put = object.__setattr__
        put(self, "documents", tuple(self.documents))
        put(self, "gold", tuple(self.gold))
        task = EXTRACT if self.kind == "extraction" else ""
        put(self, "prompt", self.prompt or render(self.question, self.documents, self.title, task))
        put(self, "without_context", self.without_context or render(self.question, (), self.title, task))


def render(question: str, documents: Sequence[str], title: str = "", task: str = "") -> str:
    """The prompt of a question with documents; an empty list stands as ``none``.

    Source: worded after the released prompt of Parenting (arXiv:2410.10360).
    """
    listed = "\n".join(f"Doc {i}: {' '.join(text.split())}" for i, text in enumerate(documents, 1)) or "none"
    topic = f" on {title.replace('_', ' ')}" if title else ""
    return (
        f"You are a question-answering expert{topic}. Use the supplementary knowledge to answer. If it is irrelevant, "
        "rely on your own knowledge. If unsure, you may say that you do not know.\n"
        f"[Supplementary knowledge]\n{listed}\n[Question]\n{question.strip()}\n"
        + (f"[Task]\n{task}\n" if task else "")
        + "[Answer]\n"
    )
