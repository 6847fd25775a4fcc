"""RECIPE trained as published: every weight of the encoder, one part, the six losses together."""

from __future__ import annotations

from functools import partial

import torch

from ...models.lm import LM
from ...retrieval.network import Network
from ...training.facts import Split
from . import losses
from .answers import Answers, Behind
from .config import Training
from .keys import Keys


class Published(Keys):
    """Retrieval and language model in one step; prompt vectors are made of the keys.

    Source: Chen et al. 2024 (arXiv:2405.03279) sec. 3.3, and the released code.
    """

    def __init__(self, lm: LM, net: Network, split: Split, cfg: Training) -> None:
        super().__init__(net, split, cfg)
        self.lm, self.answers = lm, Answers(lm, cfg)

    def rate(self, step: int) -> float:
        """The same at every step."""
        return 1.0

    @torch.enable_grad()
    def learn(self, step: int) -> dict[str, float]:
        """The plain sum of six terms, backpropagated."""
        lm, net, cfg, rows = self.lm, self.net, self.cfg, self.answers.rows
        places, samples, draw = self.split.batch(step, cfg.prompt_batch, cfg.seed)
        keys, terms = self._retrieval(samples, places, draw)
        vectors = list(net.prompts(keys))
        behind, every = Behind(lm, vectors, cfg.at), range(len(samples))
        others = [(s.other, s.other_answer) for s in samples]
        told, again, other = (
            behind.rows(rows(pairs), every)
            for pairs in ([(s.prompt, s.target) for s in samples], [(s.again, s.answer) for s in samples], others)
        )
        state = partial(losses.statement_loss, lm, margin=cfg.margin, world=self.world)
        keep = partial(losses.locality_loss, lm, other, base=self.answers.base(others), world=self.world)
        values, gradient = {}, torch.zeros_like(behind.table)
        for name, loss in (
            ("told", lambda table: state(told, vectors=table)),
            ("again", lambda table: state(again, vectors=table)),
            ("other", lambda table: keep(vectors=table)),
        ):
            values[name], own = behind.mean(loss, self.world)
            gradient += own
        retrieval = torch.stack([*terms.values()]).sum()
        torch.autograd.backward([retrieval, torch.cat(vectors)], [torch.ones_like(retrieval), gradient.to(keys)])
        self.world.mean([p.grad for p in net.parameters() if p.grad is not None])
        return {name: float(value.detach()) for name, value in terms.items()} | values
