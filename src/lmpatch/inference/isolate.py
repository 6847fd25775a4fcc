"""Isolate-then-aggregate: read every passage alone, and let the answers vote. A few hostile passages are outvoted.

The robust pole: whatever makes a model trust its context more also makes it trust a hostile passage more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.rag.types import normalise, refused
from ..errors import BadInput
from ..models.lm import LM
from .generate import generate
from .interventions import Prompt


@dataclass(frozen=True)
class Vote:
    """What the passages of one question say together."""

    text: str
    """The answer most passages give, as the first of them words it; empty where none gives one."""
    votes: int
    """How many give it."""
    passages: int
    """How many were read."""
    answers: tuple[str, ...]
    """What each says."""


def isolate(lm: LM, questions: Sequence[Sequence[Prompt]], **how: Any) -> list[Vote]:
    """Answer each question once for each of its passages, and take the answer that most of them give.

    One passage moves one vote, so k hostile ones of n cannot win while more than k others agree. Facts that are spread
    over passages are lost: no prompt holds two of them.

    Args:
        questions: for each its prompts, one a passage (``data.rag.reader.render(question, [passage])``).
        how: as ``generate`` takes it: max_new_tokens, batch_size, stop, ...
    Raises:
        BadInput: a question without a prompt, or as ``generate``.
    Source: Xiang et al. 2024, RobustRAG (arXiv:2405.15556).
    Differs: whole answers vote, normalised as SQuAD does, where the paper counts keywords or averages next-token
    probabilities. An answer that says nothing ("I do not know") has no vote, as there.
    """
    if not all(questions):
        raise BadInput("a question has no passage to read. Give each at least one prompt.")
    answers = iter(generate(lm, [prompt for prompts in questions for prompt in prompts], **how))
    return [vote([next(answers).strip() for _ in prompts]) for prompts in questions]


def vote(answers: Sequence[str]) -> Vote:
    """The most frequent answer, compared normalised; of equally frequent ones the first."""
    said = [normalise(answer) for answer in answers]
    counts = {text: said.count(text) for text, answer in zip(said, answers, strict=True) if not refused(answer)}
    if not counts:
        return Vote("", 0, len(answers), tuple(answers))
    best = max(counts, key=lambda text: counts[text])
    return Vote(answers[said.index(best)], counts[best], len(answers), tuple(answers))
