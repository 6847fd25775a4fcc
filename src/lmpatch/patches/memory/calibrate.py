"""A threshold from questions that no fact of a memory touches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ...errors import BadInput
from .patch import MemoryPatch


def calibrated(patch: MemoryPatch, unrelated: Sequence[str], share: float = 0.01) -> float:
    """The lowest cosine above which at most that share of the questions fires a fact of this memory.

    More facts fire more: calibrate on as many as will be stored.

    Args:
        unrelated: questions that none of the facts answers.
    Returns:
        a threshold; 1.0, above which nothing fires, if more than the share fires without reaching one.
    Raises:
        BadInput: there are too few questions to see such a share, or it is none.
    """
    if not 0 < share < 1 or len(unrelated) * share < 1:
        least = math.ceil(1 / share) if 0 < share < 1 else 100
        raise BadInput(
            f"a share of {share} cannot be seen on {len(unrelated)} unrelated questions. Give {least} or more, or "
            "another share in 0..1."
        )
    finder = replace(patch, scope=replace(patch.scope, gate="cosine", threshold=math.inf, top_k=1)).finder()
    best = [hits[0] for hits in finder.search(unrelated) if hits]
    room = math.floor(share * len(unrelated)) - sum(hit.fired for hit in best)
    scores = sorted((hit.score for hit in best if not hit.fired), reverse=True)
    return 1.0 if room < 0 else scores[room] if room < len(scores) else 0.0
