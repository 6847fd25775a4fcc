"""What a step of the alignment teaches: use the information before a question, and change no other answer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from ...data.edits import Edit
from ...distributed import world
from ...inference.generate import generate
from ...inference.tokens import Row, encode_all, ended
from ...models.hooks import hooked
from ...models.lm import LM
from ...retrieval import Retriever
from ...retrieval.lte import line
from ...training import adapter
from ...training.facts import Sample, Split
from ...training.loop import Task, linear
from ...training.losses import answer_loss
from .config import Training

TOGETHER = 1024  # facts compared with all others at a time


class Align(Task):
    """One run: a LoRA over every projection, and four rows of each fact of a step."""

    def __init__(self, lm: LM, split: Split, near: Sequence[Sequence[int]], cfg: Training) -> None:
        self.lm, self.split, self.near, self.cfg, self.world = lm, split, near, cfg, world()
        self.factors = adapter.low_rank(lm, chain(*adapter.projections(lm)), cfg.rank, cfg.seed)
        self.scale = cfg.alpha / cfg.rank
        self.values = {f"{module}.{side}": t for module, own in self.factors.items() for side, t in own.items()}
        self.steps = cfg.epochs * max(1, len(split.edits) // cfg.batch)

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        """AdamW over the factors."""
        return torch.optim.AdamW(list(self.values.values()), lr=self.cfg.lr, weight_decay=0.0)

    def rate(self, step: int) -> float:
        """Warm-up, then down in a line."""
        return linear(step, self.steps, self.cfg.warmup)

    def learn(self, step: int) -> dict[str, float]:
        """The mean over all answer tokens of the step's rows, backpropagated."""
        places, samples, draw = self.split.batch(step, self.cfg.batch, self.cfg.seed)
        rows = [row for own in self.rows(places, samples, draw).values() for row in own]
        return {"loss": self.loss(rows, backward=True)}

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Losses of held-out facts, each kind of row apart."""
        draw, held = random.Random(f"{self.cfg.seed}/validation"), self.split.held
        if not held:
            return {}
        rows = self.rows([None] * len(held), [self.split.sample(edit, draw) for edit in held], draw)
        return {kind: round(self.loss(own), 4) for kind, own in rows.items() if own}

    def loss(self, rows: Sequence[Row], *, backward: bool = False) -> float:
        """Mean cross-entropy of the rows' answers with the LoRA on, nats."""
        with torch.set_grad_enabled(backward), hooked(*adapter.hooks(self.lm, self.factors, self.scale)):
            loss = answer_loss(self.lm, rows, self.world)
            if backward:
                loss.backward()
        loss = loss.detach()
        self.world.sum([loss, *(t.grad for t in self.values.values() if backward and t.grad is not None)])
        return float(loss)

    def rows(
        self, places: Sequence[int | None], samples: Sequence[Sample], draw: random.Random
    ) -> dict[str, list[Row]]:
        """Rows of each kind: ``told``, a question behind its fact, answered by it; ``bare``, the same question alone;
        ``beside``, a question the fact does not touch behind it; ``other``, that question alone. But for the first they
        are answered as the model does now."""
        told: list[tuple[str, str]] = []
        texts, questions = list[str](), list[str]()
        for place, s in zip(places, samples, strict=True):
            question, answer = (s.prompt, s.target) if draw.random() < self.cfg.verbatim else (s.again, s.answer)
            texts.append(self._information(place, s, draw))
            questions.append(question)
            told.append((texts[-1] + question, answer))
        others = [s.other for s in samples]
        own = self._own(questions + others)
        behind = [(text + question, own[question]) for text, question in zip(texts, others, strict=True)]
        kinds = {"bare": [(q, own[q]) for q in questions], "beside": behind, "other": [(q, own[q]) for q in others]}
        rows = {kind: self._encoded([pair for pair in pairs if pair[1]]) for kind, pairs in kinds.items()}
        return {"told": self._encoded(told, end=True), **rows}

    def _information(self, place: int | None, s: Sample, draw: random.Random) -> str:
        """The fact as a line, among the lines of near facts or alone."""
        facts, cfg = [(s.prompt, s.target)], self.cfg
        if place is not None and draw.random() < cfg.several:
            count = min(draw.choice((1, 2)), len(self.near[place]))
            others = [self.split.edits[i] for i in draw.sample(self.near[place], count)]
            facts += [(edit.prompt, edit.target) for edit in others]
            draw.shuffle(facts)
        return "".join(line(*fact) for fact in facts)

    def _own(self, questions: Sequence[str]) -> Mapping[str, str]:
        """What the model answers without the LoRA. Nothing is kept, so a run that goes on asks in equal batches."""
        answers = generate(self.lm, questions, max_new_tokens=self.cfg.answer_tokens)
        return {question: answer.strip() for question, answer in zip(questions, answers, strict=True)}

    def _encoded(self, pairs: Sequence[tuple[str, str]], *, end: bool = False) -> list[Row]:
        """Rows of questions and answers, cut to the length that is trained on; with ``end`` those that are not cut end
        as an answer does."""
        rows = encode_all(self.lm, [prompt for prompt, _ in pairs], [answer for _, answer in pairs])
        longest = self.cfg.answer_tokens
        whole = [row for row in rows if len(row.ids) <= row.target + longest]
        cut = [replace(row, ids=row.ids[: row.target + longest]) for row in rows if row not in whole]
        return ended(self.lm, whole, self.cfg.end if end else None) + cut


@torch.no_grad()
def nearest(retriever: Retriever, edits: Sequence[Edit], count: int) -> list[list[int]]:
    """For each fact the places of the facts with the nearest prompts."""
    keys = retriever.keys([(edit.prompt, edit.target) for edit in edits])  # [n, w]
    found: list[list[int]] = []
    for start in range(0, len(keys), TOGETHER):
        scores: Tensor = keys[start : start + TOGETHER] @ keys.T
        scores[range(len(scores)), range(start, start + len(scores))] = -torch.inf
        found += scores.topk(min(count, len(keys) - 1)).indices.tolist()
    return found
