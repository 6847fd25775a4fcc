"""How frequent tokens are: in a corpus of the user's, or in the audited text itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from ..inference.tokens import tokenizer_hash
from ..models.lm import LM
from .losses import Losses

TOGETHER = 1000  # documents that are tokenised at once


@dataclass(frozen=True)
class Counts:
    """How often each token occurs."""

    n: Tensor
    """[V] int64."""
    tokenizer: str
    """Hash of the tokenizer that made them."""
    source: str
    """Where they were counted."""
    own: bool = False
    """In the audited text itself: rare tokens are then chosen by the text they are scored on."""

    @property
    def total(self) -> int:
        return int(self.n.sum())

    def log_unigram(self) -> Tensor:
        """[V] ln q_v of the add-one unigram model, q_v = (n_v + 1) / (N + V)."""
        return torch.log((self.n.double() + 1) / (self.total + len(self.n)))

    def check(self, losses: Losses) -> None:
        """Raise ``BadInput`` if another tokenizer counted."""
        if self.tokenizer != losses.tokenizer or len(self.n) != losses.vocab:
            raise BadInput(
                f"tokens were counted in {self.source} with another tokenizer than {losses.model} has. Count them with "
                "its own."
            )


def count(lm: LM, documents: Sequence[str], source: str = "a reference corpus") -> Counts:
    """Tokens of a corpus, special ones left out."""
    n = torch.zeros(lm.layout.vocab, dtype=torch.int64)
    for start in range(0, len(documents), TOGETHER):
        texts = list(documents[start : start + TOGETHER])
        rows = lm.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        n += torch.bincount(torch.tensor([i for row in rows for i in row], dtype=torch.int64), minlength=len(n))
    return Counts(n, tokenizer_hash(lm), source)


def own_counts(losses: Losses) -> Counts:
    """Scored tokens of the audited text."""
    n = torch.bincount(losses.target.long(), minlength=losses.vocab)
    return Counts(n, losses.tokenizer, "the audited text", own=True)
