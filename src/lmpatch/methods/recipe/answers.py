"""What a language model answers behind prompt vectors while these are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...distributed import World
from ...inference.interventions import inserted
from ...inference.tokens import Row, encode_all, end_token
from ...models.lm import LM
from . import losses
from .config import Training

Question = tuple[str, str]
"""A prompt and its answer."""


class Behind:
    """Rows behind the prompt vectors of facts."""

    def __init__(self, lm: LM, vectors: Sequence[Tensor], at: str) -> None:
        self.lm, self.at = lm, at
        self.table = torch.cat([own.detach() for own in vectors]).to(lm.device)  # [v, d]
        ends = torch.tensor([len(own) for own in vectors]).cumsum(0).tolist()
        self.ids = [tuple(range(-1 - start, -1 - end, -1)) for start, end in zip([0, *ends], ends, strict=False)]

    def rows(self, rows: Sequence[Row], facts: Sequence[int]) -> list[Row]:
        """Each row with the virtual tokens of its fact before it: -1 - i is row i of ``table``."""
        return [inserted(self.lm, row, self.ids[fact], self.at) for row, fact in zip(rows, facts, strict=True)]

    def mean(self, loss: Callable[[Tensor], tuple[Tensor, int]], world: World) -> tuple[float, Tensor]:
        """A loss of the table, summed over tokens and how many there are: the mean of all processes, and its
        gradient [v, d]."""
        leaf = self.table.clone().requires_grad_()
        summed = torch.tensor(loss(leaf), device=leaf.device)
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        world.sum([summed, gradient])
        total, count = summed.tolist()
        return total / max(1, count), gradient / max(1, count)


class Answers:
    """Rows of questions with their answers, and what the unpatched model thinks of them."""

    def __init__(self, lm: LM, cfg: Training) -> None:
        self.lm, self.longest = lm, cfg.answer_tokens
        self.known: dict[Question, Tensor] = {}
        self.end = end_token(lm)

    def rows(self, pairs: Sequence[Question], texts: Sequence[str] = (), *, end: bool = False) -> list[Row]:
        """Questions with answers, behind texts if there are some, cut to the length that is trained on; with ``end``
        those that are not cut have a full stop and an end of the answer."""
        before = texts or [""] * len(pairs)
        prompts = [text + prompt for text, (prompt, _) in zip(before, pairs, strict=True)]
        answers = [answer if not end or answer[-1] in ".!?" else f"{answer}." for _, answer in pairs]
        rows = encode_all(self.lm, prompts, answers)
        cut = [row.ids[: row.target + self.longest] if self.longest else row.ids for row in rows]
        ended = [(*ids, self.end) if end and ids == row.ids else ids for row, ids in zip(rows, cut, strict=True)]
        return [replace(row, ids=ids) for row, ids in zip(rows, ended, strict=True)]

    def base(self, pairs: Sequence[Question]) -> list[Tensor]:
        """States of the unpatched model at the answers; each is computed once in a run."""
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self.known]
        if missing:
            self.known.update(zip(missing, losses.base_states(self.lm, self.rows(missing)), strict=True))
        return [self.known[pair] for pair in pairs]
