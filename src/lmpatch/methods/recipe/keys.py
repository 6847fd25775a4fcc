"""Training retrieval: heads and sentinel, which never ask the language model."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ...distributed import world
from ...progress import Progress
from ...retrieval import Fact
from ...retrieval.index import KeyBlock
from ...retrieval.network import Network
from ...training.facts import Sample, Split
from ...training.loop import Task, linear
from . import losses
from .config import Training
from .data import drawable
from .features import Features

CROWD = 1000  # trained facts among which the held-out ones are searched


class Keys(Task):
    """One run that teaches a network retrieval, with a validation that never sees a trained fact."""

    def __init__(self, net: Network, split: Split, cfg: Training, progress: Progress | None = None) -> None:
        self.net, self.split, self.cfg, self.progress, self.world = net, split, cfg, progress, world()
        self.values = net.state_dict(keep_vars=True)
        self.features = Features(net, self.world, cfg.bf16)
        self.facts = [(edit.prompt, edit.target) for edit in split.edits]

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        """AdamW over heads, sentinel and what is learned of the encoder."""
        cfg, features = self.cfg, self.features
        if not features.learning and not features.places:
            texts = drawable([*self.split.edits, *self.split.held], self.split.unrelated)
            features.precompute(texts, self.progress)
        groups = [
            {"params": [p], "lr": cfg.encoder_lr if name.startswith("learned.") else cfg.lr}
            for name, p in self.net.named_parameters()
            if p.requires_grad
        ]
        return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.decay)

    def rate(self, step: int) -> float:
        """Warm-up, then down in a line."""
        return linear(step, self.cfg.key_steps, self.cfg.warmup, self.cfg.final)

    @torch.enable_grad()
    def learn(self, step: int) -> dict[str, float]:
        """The three retrieval terms, backpropagated."""
        places, samples, draw = self.split.batch(step, self.cfg.key_batch, self.cfg.seed)
        _, terms = self._retrieval(samples, places, draw)
        torch.stack([*terms.values()]).sum().backward()
        self.world.mean([p.grad for p in self.net.parameters() if p.grad is not None])
        return {name: float(value.detach()) for name, value in terms.items()}

    def _retrieval(
        self, samples: Sequence[Sample], places: Sequence[int], draw: random.Random
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Keys [b, R] of the samples' facts, and the retrieval terms."""
        net, cfg = self.net, self.cfg
        pairs = [(s.prompt, s.again) if draw.random() < 0.5 else (s.again, s.prompt) for s in samples]
        facts, rivals = [(s.prompt, s.target) for s in samples], self._rivals(places, draw)
        questions = [text for kind in (*zip(*pairs, strict=True), [s.other for s in samples]) for text in kind]
        features = torch.cat([net.of_facts([*facts, *rivals], self.features), self.features(questions)])
        if cfg.dropout:
            generator = torch.Generator().manual_seed(draw.getrandbits(40))
            visible = torch.rand(features.shape, generator=generator).to(features.device) >= cfg.dropout
            centre = net.centre  # a hidden feature has its typical value
            features = torch.where(visible, centre + (features - centre) / (1 - cfg.dropout), centre)
        told, asked = features.split([len(facts) + len(rivals), len(questions)])
        first, second, other = net.queries_of(asked).chunk(3)
        classes = net.matched_of(told)  # rivals learn too: else all keys drift to where questions are
        own = torch.arange(len(facts), device=classes.device)
        terms = losses.retrieval_losses(classes, net.sentinel(), first, second, other, own, margin=cfg.margin)
        return classes[: len(facts)], terms

    def _rivals(self, places: Sequence[int], draw: random.Random) -> list[Fact]:
        """Facts outside the batch."""
        rest = sorted({*range(len(self.facts))} - {*places})
        return [self.facts[i] for i in draw.sample(rest, min(self.cfg.rivals, len(rest)))]

    def validate(self, step: int) -> dict[str, float]:
        """Shares of held-out questions that find their fact among ``CROWD`` others and beat the sentinel, and of those
        that find one and should not."""
        net, draw = self.net, random.Random(f"{self.cfg.seed}/validation")
        samples = [self.split.sample(edit, draw) for edit in self.split.held]
        if not samples:
            return {}
        facts = [(s.prompt, s.target) for s in samples] + self.facts[:CROWD]
        keys, sentinel = net.matched_of(net.of_facts(facts, self.features)).cpu(), net.sentinel().cpu()
        block = KeyBlock(net.shape.matched)
        block.add(keys, range(len(keys)))
        texts = {"recall_told": [s.prompt for s in samples], "recall_again": [s.again for s in samples]}
        shares = {}
        for name, questions in (texts | {"false_fire": [s.other for s in samples]}).items():
            queries = net.queries_of(self.features(questions)).cpu()
            score, place = (t[:, 0] for t in block.search(queries))
            fired = score > (queries @ sentinel).double()
            right = place == torch.arange(len(samples)) if name in texts else True
            shares[name] = round(float((fired & right).float().mean()), 4)
        return shares
