"""RASE's retriever: a cosine that looks twice. The nearest facts are compared again, by the whole fact as a sentence.

Source: Han et al. 2023, "Improving Sequential Model Editing with Fact Retrieval" (RASE, Findings of EMNLP).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..inference.interventions import Insert
from ..inference.tokens import join
from ..models.lm import LM
from . import Fact, Form, Scope
from .cosine import Cosine
from .cosine import load as load_cosine


@dataclass(eq=False)
class Rase(Cosine):
    """Keys [n, 2 e]: the prompt of a fact, which is searched, and the fact as a sentence, by which what was found is
    ranked."""

    rivals: int = 5
    """Nearest facts that are ranked."""
    lead: float | None = None
    """A best fact fires below the threshold, too, if it leads the second by more than this. None: never."""
    spread: float = 0.05
    """... and if the scores of the ranked facts have a larger standard deviation than this,"""
    floor: float = 0.0
    """... and if its own score is larger than this."""

    name = "rase"

    @property
    def matched(self) -> int:
        return self.width // 2

    def parts(self) -> dict[str, Any]:
        """What is not a tensor, as JSON."""
        return {**super().parts(), "rivals": self.rivals, "lead": self.lead, "spread": self.spread, "floor": self.floor}

    def describe(self, form: Form) -> str:
        """What it inserts, and the encoder."""
        return f"the change stored with the fact acts on the question; queries by {self.encoder_name}"

    def keys(self, facts: Sequence[Fact]) -> Tensor:
        """Keys [n, 2 e] of facts, two vectors of length one side by side."""
        told = self.queries([prompt for prompt, _ in facts] + [join(*fact) for fact in facts])
        return torch.cat(told.chunk(2), -1)

    def rank(self, query: Tensor, keys: Tensor) -> tuple[Tensor, bool]:
        """Mean cosines [k] of a question [e] with the prompts and with the sentences of facts [k, 2 e], and whether the
        best stands out so far that it fires below the threshold, too."""
        halves = torch.nn.functional.normalize(keys.unflatten(-1, (2, -1)), dim=-1)  # [k, 2, e]
        scores = (halves @ query).mean(-1)
        if self.lead is None or len(scores) < 2:
            return scores, False
        best, second = scores.topk(2).values.tolist()
        leads = best > self.floor and best - second > self.lead
        return scores, leads and float(scores.std(correction=0)) > self.spread

    def insert(self, lm: LM, facts: Sequence[Fact], keys: Tensor, form: Form) -> list[Insert]:
        """Nothing goes before the question."""
        return [Insert()] * len(facts)

    def check(self, lm: LM, scope: Scope) -> None:
        """Raise ``BadInput`` for what it has none of: prompt vectors, text, the sentinel."""
        if scope.insert != "change":
            raise BadInput("this retriever finds stored changes of weights. Use insert='change'.")
        if scope.gate == "sentinel":
            self.gate(torch.empty(0))


def load(parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rase:
    """The retriever a patch or an editor keeps."""
    rivals, lead, spread, floor = parts["rivals"], parts["lead"], parts["spread"], parts["floor"]
    plain = load_cosine(parts, tensors)
    if type(rivals) is not int or {type(spread), type(floor)} != {float} or not isinstance(lead, float | None):
        raise TypeError("its parts are not as lmpatch writes them")
    if rivals < 1 or plain.width % 2 or not all(-2 <= x <= 2 for x in (lead or 0.0, spread, floor)):
        raise ValueError("its numbers are out of range")
    return Rase(plain.encoder_name, plain.encoder_fingerprint, plain.width, rivals, lead, spread, floor)
