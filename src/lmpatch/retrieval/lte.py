"""LTE's retriever: a cosine; a fact goes before the question as a line that an aligned model was taught to use.

Source: Jiang et al. 2024, "Learning to Edit: Aligning LLMs with Knowledge Editing" (arXiv:2402.11905).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..inference.interventions import Insert
from ..inference.tokens import statement
from ..models.lm import LM
from . import Fact, Form
from .cosine import Cosine
from .cosine import load as load_cosine

HEAD = "Updated information: "


def line(prompt: str, target: str) -> str:
    """A fact as the model is taught to read it; several stand one below the other, the question below the last."""
    return f"{HEAD}{statement(prompt, target)}\n"


class Lte(Cosine):
    """Texts as the mean state of their tokens, of length one."""

    name = "lte"

    def describe(self, form: Form) -> str:
        """What it inserts, and the encoder."""
        return f"inserts the fact as updated information; queries by {self.encoder_name}"

    def insert(self, lm: LM, facts: Sequence[Fact], keys: Tensor, form: Form) -> list[Insert]:
        """Each fact as a line."""
        return [Insert(text=line(*fact)) for fact in facts]


def load(parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Lte:
    """The retriever a patch or an editor keeps."""
    return Lte(**vars(load_cosine(parts, tensors)))
