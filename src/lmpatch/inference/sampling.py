"""From the logits of the next token to a token: the likeliest one, or a draw."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken from its logits."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise BadInput(f"temperature is {self.temperature}. Give a number from 0; 0 is greedy.")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p is {self.top_p}. Give a number in 0..1 above 0; 1 draws from all tokens.")

    def numbers(self, n: int, steps: int) -> Tensor:
        """One uniform number for each token to come, [n, steps]."""
        return torch.rand(n, steps, generator=torch.Generator().manual_seed(self.seed))

    def take(self, z: Tensor, u: Tensor) -> Tensor:
        """Tokens [n] from logits [n, V] and uniform numbers [n]."""
        if not self.temperature:
            return z.argmax(-1)
        p, order = (z / self.temperature).softmax(-1).sort(-1, descending=True)
        mass = p.cumsum(-1)
        last = (mass - p < self.top_p).sum(-1, keepdim=True) - 1  # [n, 1] of the likeliest that reach top_p
        place = torch.searchsorted(mass, u[:, None] * mass.gather(-1, last), right=True)
        return order.gather(-1, place.minimum(last))[:, 0]
