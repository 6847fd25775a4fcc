"""How values are searched, and what a search finds: settings and results of ROME, MEMIT and their relatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..inference.tokens import End


@dataclass(frozen=True)
class Settings:
    """How values are searched, and the keys that go with them. Defaults: ROME's."""

    steps: int = 20
    """Gradient steps that search a value."""
    lr: float = 0.3
    """Adam's step per entry of the value, in units of the value's RMS. At 0.03 the search of 20 steps ends half way
    on Gemma-3-270M (docs/log.md)."""
    kl: float = 0.0625
    """Weight of KL(p_δ || p_0) at the end of "{subject} is a"."""
    decay: float = 0.0
    """Weight of |δ|²/|v|². ROME's paper has 0.5; behind a norm, where only directions count, it does harm."""
    clamp: float = 4.0
    """|δ| stays below this many |v|."""
    stop: float = 0.05
    """The search of a fact ends at this loss, nats."""
    moment_tokens: int | None = None
    """Keys in the estimate of C at most. None: 10 times d_ff."""
    short_prefixes: int = 5
    """Fixed prefixes of about 5 tokens under which the value must hold."""
    long_prefixes: int = 5
    """Fixed prefixes of about 10 tokens."""
    sampled_prefixes: int = 0
    """Prefixes of about 10 tokens that the model writes itself."""
    rewordings: int = 0
    """Prompts in the model's own words for each fact, under which the value must also hold. Of a fact that the model
    words in fewer ways the prompt stands behind further fixed prefixes."""
    end: End | None = None
    """What is trained behind the target, so that an answer ends with it. ``answer``: a new line, or of a chat model the
    end of its turn. ``eos``: the end-of-sequence token."""
    seed: int = 0
    """Seed of what the model writes."""
    head_tokens: int | None = None
    """Tokens of the vocabulary that a step computes, the likeliest at the start; all others are one class. Whether a
    fact is found is told by the whole head. None: all tokens."""
    products: Literal["model", "bf16", "auto"] = "model"
    """What the blocks' products are computed in: the model's number format, bf16, or what is faster in a short
    measurement (a run then repeats on one machine alone)."""
    faithful: bool = False
    """As released: KL at the subject's last token, penalty |δ| instead of |δ|², one update fewer."""


@dataclass(frozen=True)
class Values:
    """What a search found, for u facts, n layers, J prefixes."""

    delta: Tensor
    """[u, n, d] the change at the site."""
    clean: Tensor
    """[u, n, d] the site's value before, on the bare prompt."""
    keys: dict[int, Tensor]
    """Layer → [u, J, f] inputs of the down-projection at the subject's last token; index 0: the bare prompt.
    With several layers they are those of the forward in which all changes act."""
    written: Tensor
    """[u, n, d] output of the down-projection for the bare key, without the change."""
    steps: list[int]
    """[u] updates made."""
    loss: list[float]
    """[u] last loss seen."""
    reworded: tuple[int, ...] = ()
    """[u] prompts in its own words that the model wrote, of those that were wanted."""

    def of(self, pick: Sequence[int]) -> Values:
        """Those of these facts alone."""
        at = torch.tensor(list(pick), device=self.delta.device)
        keys = {layer: k[at] for layer, k in self.keys.items()}
        steps, own = ([x[i] for i in pick] for x in (self.steps, self.reworded))
        losses = [self.loss[i] for i in pick]
        return Values(self.delta[at], self.clean[at], keys, self.written[at], steps, losses, tuple(own))
