"""Training data that teaches the form of an answer and nothing about whom to trust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lmpatch.data.rag.reader import RagRecord, holds, known, refused
from lmpatch.data.rag.types import has_words, replaced
from lmpatch.inference.closed_book import ClosedBookAnswer

WORDS = 6
"""Of an answer at most: a sentence has not the form of one."""


def consistent(records: Sequence[RagRecord], own: Mapping[str, ClosedBookAnswer], bare: float = 0.0) -> list[RagRecord]:
    """Records that teach how an answer looks and nothing about whom to trust: the document says what the model says.

    Of each training question with an answering document, the answer in the document is replaced by the model's own one,
    which is the target; where the model knows the answer, the document stays. There is no conflict and no irrelevant
    document. Answers that are refused, cut off, longer than ``WORDS``, or cannot be put in are left out.

    Args:
        own: question → closed-book answer.
        bare: share of the records that are asked without their document.
    """
    made = []
    for r in records:
        if r.part != "train" or r.variant != "original" or not own[r.question].ended:
            continue
        said = own[r.question].text.strip().rstrip(".")
        if refused(said) or len(said.split()) > WORDS or has_words(r.question, said):
            continue
        if known(said, r.gold):
            made.append(r)
            continue
        text = replaced(r.documents[0], r.answer, said)
        if text is not None and holds(text, [said]) and not holds(text, r.gold):
            made.append(replace(r, documents=(text,), answer=said, prompt="", without_context="", gold=(said,)))
    every = 1 / bare if bare else float("inf")
    return [replace(r, prompt=r.without_context) if (i + 1) % every < 1 else r for i, r in enumerate(made)]
