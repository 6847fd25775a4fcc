"""What a patch may do in ``models.run`` while it is on a model: put something before a prompt.

The patches that are on a model leave their actors at ``model._lmpatch_actors`` (see ``patches.ledger``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .lm import LM
from .tokens import Row, encode_all


@dataclass(frozen=True)
class Insert:
    """What goes before one prompt: text, or continuous prompt vectors."""

    text: str = ""
    """Put before the prompt as it is."""
    vectors: Tensor | None = None
    """[P, d] in the space of the embedding module's output."""
    at: Literal["front", "after_bos"] = "after_bos"
    """Where vectors go: before everything, or behind the beginning-of-sequence token where there is one."""


class Actor(ABC):
    """A patch at work."""

    @abstractmethod
    def recall(self, prompts: Sequence[str]) -> list[Insert | None]:
        """What to put before each prompt; None leaves it alone. The answer is never part of ``prompts``."""


def actors(lm: LM) -> tuple[Actor, ...]:
    """The actors of the patches on this model, in the order they went on."""
    found: tuple[Actor, ...] = getattr(lm.model, "_lmpatch_actors", ())
    return found


def prepare(lm: LM, prompts: Sequence[str], targets: Sequence[str] | None = None) -> tuple[list[Row], Tensor | None]:
    """Tokenise prompts and targets with everything the model's actors put before them.

    A position that holds a vector instead of a token has a negative id: -1 - its row in the table. So equal rows stay
    equal, and padding, masks, positions and caches treat it as the token it stands for.

    Returns:
        the rows, and the table [m, d] of vectors; None if there are none.
    """
    found = [actor.recall(list(prompts)) for actor in actors(lm)] if prompts else []
    texts = list(prompts)
    for inserts in found:
        texts = [(i.text if i else "") + text for i, text in zip(inserts, texts, strict=True)]
    rows = encode_all(lm, texts, targets)
    table: list[Tensor] = []
    known: dict[int, tuple[int, ...]] = {}  # the same tensor for two prompts is the same ids
    for inserts in found:
        for i, insert in enumerate(inserts):
            if insert is not None and insert.vectors is not None:
                key = id(insert.vectors)
                if key not in known:
                    known[key] = tuple(-1 - len(table) - k for k in range(len(insert.vectors)))
                    table += insert.vectors
                rows[i] = inserted(lm, rows[i], known[key], insert.at)
    return rows, torch.stack(table).to(lm.device) if table else None


def inserted(lm: LM, row: Row, ids: tuple[int, ...], at: str) -> Row:
    """The row with ids put before it, or behind its beginning-of-sequence token."""
    bos = lm.tokenizer.bos_token_id
    start = int(at == "after_bos" and bos is not None and row.ids[:1] == (bos,))
    return Row((*row.ids[:start], *ids, *row.ids[start:]), row.target + len(ids))
