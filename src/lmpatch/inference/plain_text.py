"""Everyday text that no edit is about, and how well a model predicts it."""

from __future__ import annotations

import math

from ..data.context import InContext
from ..models.lm import LM
from .score import score

TEXT = (
    ("In the early morning", "the harbour is quiet, and only the gulls follow the first boats out to sea."),
    ("Bread is made from", "flour, water, salt and yeast; the dough must rest before it goes into a hot oven."),
    ("The old library", "has three floors, and on the second one you will find maps, letters and books about travel."),
    ("When water freezes,", "it expands, which is why ice floats and why pipes can burst on a cold winter night."),
    ("She opened the window", "because the room was warm, and from the street she could hear children playing."),
    ("A good argument", "states what it claims, gives reasons for it, and admits what it cannot explain."),
    ("Trains between the two cities", "leave every hour, but on Sundays the last one goes at nine in the evening."),
    ("The human heart", "is a muscle with four chambers, and it beats about a hundred thousand times each day."),
    ("After the election", "the new government promised to repair the roads, build schools and lower the taxes."),
    ("To plant a tree,", "dig a hole twice as wide as the roots, fill it with loose soil and water it well."),
    ("Most of the stars", "that we can see at night are larger and brighter than the sun, but very far away."),
    ("He had never learned", "to swim, so he stayed on the beach and watched the others until it was time to go home."),
)
"""Everyday sentences, about 250 tokens for a common tokenizer: perplexity is taken on the second parts."""


def perplexity(lm: LM) -> float:
    """exp of the mean negative log probability per token of ``TEXT``, the model as it is now. The text has no context,
    so rules of decoding leave it as it is."""
    scores = score(lm.plain, [InContext(start, start) for start, _ in TEXT], [rest for _, rest in TEXT])
    count = sum(len(score.ids) for score in scores)
    mean = -sum(score.total for score in scores) / count
    return math.exp(mean) if mean < 700 else math.inf
