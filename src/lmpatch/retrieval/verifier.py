"""The second look at a fact that was found: is this question about it?

Keys are made before any question is known, so they tell subjects apart well and relations badly. The verifier reads
the fact's prompt and the question side by side, in the features that retrieval has of both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SLACK = 2.0
"""How far below the knowledge sentinel a fact may score that the verifier looks at."""
KINDS = ("asks", "follows", "other")
"""What a question has to do with a fact: asks for it, in these or other words; is answered by what follows from it;
neither."""


class Verifier(nn.Module):
    """log p(kind | fact, question) = log softmax(W2 ReLU(W1 [|f - q|, f * q] + b1) + b2)."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.utils.skip_init(nn.Linear, 2 * features, hidden)
        self.second = nn.utils.skip_init(nn.Linear, hidden, len(KINDS))

    @torch.no_grad()
    def start(self, draw: torch.Generator) -> None:
        """Starting weights."""
        for layer in (self.first, self.second):
            for p in layer.parameters():
                p.uniform_(-(layer.in_features**-0.5), layer.in_features**-0.5, generator=draw)

    def forward(self, facts: Tensor, questions: Tensor) -> Tensor:
        """Log-probabilities [n, 3] of features [n, F] of the prompts of facts and of questions, in their own mean and
        spread."""
        pair = torch.cat([(facts - questions).abs(), facts * questions], -1)
        out: Tensor = self.second(self.first(pair).relu()).log_softmax(-1)
        return out
