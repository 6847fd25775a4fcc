"""Training prompt vectors: what makes a language model state a fact once, and stop. Retrieval is not asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...distributed import world
from ...inference.forward import logits
from ...inference.tokens import Row, premise
from ...models.lm import LM
from ...retrieval import Fact
from ...retrieval.prompts import PromptMap, target_rows
from ...training.facts import Split
from ...training.loop import Task, linear
from . import losses
from .answers import Answers, Behind
from .config import Training
from .data import Neighbourhood, exchanged, words


class Prompts(Task):
    """One run that teaches a prompt map what its language model answers behind it."""

    def __init__(self, lm: LM, net: PromptMap, split: Split, cfg: Training) -> None:
        self.lm, self.net, self.split, self.cfg, self.world = lm, net, split, cfg, world()
        self.values = net.state_dict(keep_vars=True)
        self.pools = [words(lm.tokenizer), sorted({edit.target for edit in split.edits})]
        self.answers = Answers(lm, cfg)
        self.around = Neighbourhood(split.edits)

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        """AdamW over the map."""
        learned = [p for p in self.net.parameters() if p.requires_grad]
        return torch.optim.AdamW(learned, lr=self.cfg.prompt_lr, weight_decay=0.0)

    def rate(self, step: int) -> float:
        """Warm-up, then down in a line."""
        return linear(step, self.cfg.prompt_steps, self.cfg.warmup, self.cfg.final)

    @torch.enable_grad()
    def learn(self, step: int) -> dict[str, float]:
        """The language model's terms, backpropagated into the map."""
        cfg, lm, rows = self.cfg, self.lm, self.answers.rows
        _, samples, draw = self.split.batch(step, cfg.prompt_batch, cfg.seed)
        samples = exchanged(samples, self.pools, cfg.exchanged, draw)
        texts = [premise(s.prompt, s.target) if draw.random() < cfg.text_share else "" for s in samples]
        pairs = [(s.prompt, s.target) if draw.random() < 0.5 else (s.again, s.answer) for s in samples]
        with_text = [i for i, text in enumerate(texts) if text]  # vectors alone say what, not about what
        some = [i for i in with_text if draw.random() < cfg.other_share] or with_text[:1]
        near = self.around.draw(cfg.beside, draw)
        facts = [(s.prompt, s.target) for s in samples] + [(q.prompt, q.target) for q in near]
        texts += [premise(q.prompt, q.target) for q in near]
        owners = [*some, *range(len(samples), len(facts))]
        others = [(samples[i].other, samples[i].other_answer) for i in some] + [(q.question, q.answer) for q in near]
        alone = others[: len(some)] + [
            (text + q.question if q.follows else q.question, q.answer)
            for q, text in zip(near, texts[len(samples) :], strict=True)
        ]

        vectors = self._vectors(facts)
        behind = Behind(lm, vectors, cfg.at)
        told = behind.rows(rows(pairs, texts[: len(samples)], end=True), range(len(samples)))
        other = behind.rows(rows(others, [texts[i] for i in owners]), owners)
        state = partial(losses.statement_loss, lm, told, margin=cfg.margin, world=self.world)
        keep = partial(losses.locality_loss, lm, other, base=self.answers.base(alone), world=self.world)
        stated, to_state = behind.mean(lambda table: state(vectors=table), self.world)
        kept, to_keep = behind.mean(lambda table: keep(vectors=table), self.world)
        torch.cat(vectors).backward((to_state + cfg.other_weight * to_keep).to(vectors[0].device))
        return {"told": stated, "other": kept}

    def _vectors(self, facts: Sequence[Fact]) -> list[Tensor]:
        """Prompt vectors of facts."""
        vectors: list[Tensor] = self.net(*target_rows(self.lm, facts, self.net.shape.target_tokens))
        return vectors

    def validate(self, step: int) -> dict[str, float]:
        """Teacher-forced answers of held-out facts behind their vectors, without and with their text."""
        draw = random.Random(f"{self.cfg.seed}/validation")
        samples = [self.split.sample(edit, draw) for edit in self.split.held[: self.cfg.validate_lm]]
        if not samples:
            return {}
        behind = Behind(self.lm, self._vectors([(s.prompt, s.target) for s in samples]), self.cfg.at)
        wordings = {"told": [(s.prompt, s.target) for s in samples], "again": [(s.again, s.answer) for s in samples]}
        shares = {}
        for form, texts in (("vectors", []), ("both", [premise(s.prompt, s.target) for s in samples])):
            for name, pairs in wordings.items():
                rows = behind.rows(self.answers.rows(pairs, texts), range(len(samples)))
                shares[f"{form}_{name}"] = round(_right(self.lm, rows, behind.table), 4)
        return shares


def _right(lm: LM, rows: Sequence[Row], vectors: Tensor) -> float:
    """Mean over rows of the share of answer tokens that are the likeliest."""
    hits = torch.zeros(len(rows), 2)
    for states, labels, owners in losses.answers(lm, rows, vectors):
        best = torch.cat([logits(lm, part).argmax(-1) for part in states.split(64)])
        right = torch.stack([(best == labels).float().cpu(), torch.ones(len(owners))], 1)
        hits.index_add_(0, torch.tensor(owners), right)
    return float((hits[:, 0] / hits[:, 1]).mean())
