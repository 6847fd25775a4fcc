"""A retriever without training: the cosine of question and fact under a sentence encoder; facts go in as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..inference.interventions import Insert
from ..inference.tokens import premise
from ..models.lm import LM
from . import Fact, Form, Scope
from .encoder import Encoder, mean_pooled, same_encoder


@dataclass(eq=False)
class Cosine:
    """Texts as the mean state of their tokens, of length one."""

    encoder_name: str
    encoder_fingerprint: str
    width: int
    """w, features of one state of the encoder."""

    name = "cosine"
    verifies = False
    scale = 1.0
    unit = True
    rivals = 0

    @property
    def matched(self) -> int:
        return self.width

    def parts(self) -> dict[str, Any]:
        """What is not a tensor, as JSON."""
        return {"encoder": self.encoder_name, "encoder_fingerprint": self.encoder_fingerprint, "width": self.width}

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: it has learned nothing."""
        return {}

    def describe(self, form: Form) -> str:
        """What it inserts, and the encoder."""
        return f"inserts the fact as text; queries by {self.encoder_name}"

    @property
    def encoder(self) -> Encoder:
        """The sentence encoder its keys were made with."""
        return same_encoder(self.encoder_name, self.encoder_fingerprint)

    def keys(self, facts: Sequence[Fact]) -> Tensor:
        """Keys [n, w] of facts; the encoder reads the prompt alone, so the prompt itself has a cosine of 1."""
        return self.queries([prompt for prompt, _ in facts])

    @torch.no_grad()
    def queries(self, prompts: Sequence[str]) -> Tensor:
        """Queries [m, w] of questions."""
        return torch.nn.functional.normalize(self.encoder.encode(prompts, mean_pooled), dim=-1)

    def gate(self, queries: Tensor) -> Tensor:
        """Raise ``BadInput``: it has learned no gate."""
        raise BadInput("a cosine retriever has no knowledge sentinel. Use gate='cosine' with a threshold, or 'always'.")

    def verify(self, facts: Sequence[Fact], prompts: Sequence[str]) -> Tensor:
        """Raise ``BadInput``: it has no verifier."""
        raise BadInput("a cosine retriever has no verifier.")

    def rank(self, query: Tensor, keys: Tensor) -> tuple[Tensor, bool]:
        """Raise ``BadInput``: it compares once."""
        raise BadInput("a cosine retriever ranks facts once.")

    def insert(self, lm: LM, facts: Sequence[Fact], keys: Tensor, form: Form) -> list[Insert]:
        """Each fact as a sentence."""
        return [Insert(text=premise(*fact)) for fact in facts]

    def check(self, lm: LM, scope: Scope) -> None:
        """Raise ``BadInput`` for prompt vectors and the sentinel, of which it has none."""
        if scope.insert != "text":
            raise BadInput("a cosine retriever has no prompt vectors. Use insert='text'.")
        if scope.gate == "sentinel":
            self.gate(torch.empty(0))


def load(parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Cosine:
    """The retriever a patch or an editor keeps."""
    named = parts["encoder"], parts["encoder_fingerprint"], parts["width"]
    if [type(value) for value in named] != [str, str, int]:
        raise TypeError("its parts are not as lmpatch writes them")
    return Cosine(*named)
