"""Training the verifier: does a question ask for the fact that was found? No language model is asked."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from ...distributed import world
from ...progress import Progress
from ...retrieval.network import Network
from ...retrieval.verifier import KINDS
from ...training.facts import Split
from ...training.loop import Task, linear
from .config import Training
from .data import Neighbourhood, drawable, mentions
from .features import TOGETHER, Features

Pair = tuple[str, str]
"""The prompt of a fact, and a question."""
SHARES = (0.5, 0.0625, 0.4375)
"""How much of a step is of each kind."""
ASKED_OF = 2
"""Rewordings and locality prompts of a fact that look for the nearest other one."""


class Verify(Task):
    """One run that teaches a network's verifier; the rest of the network stands still."""

    def __init__(self, net: Network, split: Split, cfg: Training, progress: Progress | None = None) -> None:
        assert net.verifier is not None
        self.net, self.split, self.cfg, self.progress, self.world = net, split, cfg, progress, world()
        self.values = net.verifier.state_dict(keep_vars=True)
        self.features = Features(net, self.world, cfg.bf16)
        self.pairs: tuple[list[Pair], ...] = ()

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        """AdamW over the verifier."""
        if not self.pairs:
            asks, follows, other = pairs(self.split, self.cfg.seed)
            texts = [text for pair in other for text in pair]
            given = drawable([*self.split.edits, *self.split.held], self.split.unrelated)
            self.features.precompute(list(dict.fromkeys([*given, *texts])), self.progress)
            self.pairs = asks, follows, other + self._confused()
        learned = [self.values[name] for name in sorted(self.values)]
        return torch.optim.AdamW(learned, lr=self.cfg.lr, weight_decay=self.cfg.decay)

    def rate(self, step: int) -> float:
        """Warm-up, then down in a line."""
        return linear(step, self.cfg.verifier_steps, self.cfg.warmup, self.cfg.final)

    @torch.enable_grad()
    def learn(self, step: int) -> dict[str, float]:
        """Cross-entropy of the kinds of pairs, backpropagated."""
        cfg, draw = self.cfg, random.Random(f"{self.cfg.seed}/verifier/{step}")
        counts = [
            round(share * cfg.verifier_batch) if own else 0 for share, own in zip(SHARES, self.pairs, strict=True)
        ]
        chosen = [draw.choice(own) for own, count in zip(self.pairs, counts, strict=True) for _ in range(count)]
        kinds = torch.arange(len(KINDS)).repeat_interleave(torch.tensor(counts))
        told, asked = (self.features([pair[i] for pair in chosen]) for i in (0, 1))
        generator = torch.Generator().manual_seed(draw.getrandbits(40))
        hidden = (torch.rand(told.shape, generator=generator) < cfg.dropout).to(told.device)
        told, asked = (torch.where(hidden, self.net.centre, features) for features in (told, asked))
        loss = torch.nn.functional.nll_loss(self.net.verify(told, asked), kinds.to(told.device))
        loss.backward()
        self.world.mean([p.grad for p in self.values.values() if p.grad is not None])
        return {"verified": float(loss.detach())}

    def _confused(self) -> list[Pair]:
        """Questions with the fact that retrieval finds nearest among those that they do not ask for."""
        edits, net = self.split.edits, self.net
        keys = torch.cat([self._keys(start) for start in range(0, len(edits), TOGETHER)])  # [n, M]
        asked = [(text, i) for i, e in enumerate(edits) for text in (e.prompt, *e.rephrases[:ASKED_OF])]
        asked += [(ask.prompt, i) for i, e in enumerate(edits) for _, asks in e.locality for ask in asks[:ASKED_OF]]
        asked += [(ask.prompt, -1) for ask in self.split.unrelated]
        found = []
        for start in range(0, len(asked), TOGETHER):
            part = asked[start : start + TOGETHER]
            scores = net.queries_of(self.features([text for text, _ in part])) @ keys.T
            own = torch.tensor([max(i, 0) for _, i in part], device=scores.device)
            known = torch.tensor([i >= 0 for _, i in part], device=scores.device)
            scores[known, own[known]] = -torch.inf
            for (text, _), place in zip(part, scores.argmax(1).tolist(), strict=True):
                if not mentions(text, edits[place]):
                    found.append((edits[place].prompt, text))
        return found

    def _keys(self, start: int) -> Tensor:
        facts = [(e.prompt, e.target) for e in self.split.edits[start : start + TOGETHER]]
        return self.net.matched_of(self.net.of_facts(facts, self.features))

    def validate(self, step: int) -> dict[str, float]:
        """Shares of held-out pairs whose likeliest kind is the right one."""
        held = Split(self.split.held, (), self.split.unrelated)
        shares = {}
        for i, (name, own) in enumerate(zip(KINDS, pairs(held, self.cfg.seed), strict=True)):
            if own:
                told, asked = (self.features([pair[j] for pair in own]) for j in (0, 1))
                shares[name] = round(float((self.net.verify(told, asked).argmax(1) == i).float().mean()), 4)
        return shares


def pairs(split: Split, seed: int) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Pairs of each kind that come with the facts: their wordings, what follows from them, and what else is asked
    about their subjects."""
    asks, follows, other = list[Pair](), list[Pair](), list[Pair]()
    for edit in split.edits:
        wordings = [edit.prompt, *edit.rephrases]
        asks += [(edit.prompt, text) for text in wordings] + [(text, edit.prompt) for text in edit.rephrases]
        asks += list(zip(edit.rephrases, edit.rephrases[1:], strict=False))
        for _, group in edit.portability:
            for ask in group:
                (asks if edit.target in ask.answers[:1] else follows).append((edit.prompt, ask.prompt))
        other += [(edit.prompt, a.prompt) for _, group in edit.locality for a in group if mentions(a.prompt, edit)]
    near = Neighbourhood(split.edits).draw(2 * len(split.edits), random.Random(f"{seed}/beside"))
    other += [(question.prompt, question.question) for question in near if not question.follows]
    return asks, follows, other
