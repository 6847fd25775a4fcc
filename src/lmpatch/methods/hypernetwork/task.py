"""One run of training: facts in one wording change weights; another wording and other questions judge the change."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...data.edits import Edit
from ...distributed import world
from ...inference.forward import head_loss, logits, nll
from ...inference.tokens import Row, batches_of_tokens, each_once, encode_all, end_token
from ...locate.gradients import read_gradients
from ...models.hooks import hooked
from ...models.lm import LM
from ...progress import Progress
from ...training import adapter
from ...training.adapter import Factors
from ...training.cached import BATCH, Cached
from ...training.facts import Sample, Split, asks_of
from ...training.loop import Task, linear
from ...training.losses import answer_places, divergence
from .config import Training
from .network import Hypernetwork, Read, Statistics

MOST = 4  # rephrases of a fact, and questions to leave alone, that are drawn from
BATCH_TOKENS = 2048  # of one forward with gradients, in each process
Pair = tuple[str, str]
"""A prompt and its answer."""


class Meta(Task):
    """Learns from the gradient that a change's own factors get, so no matrix of a weight's size is formed.

    Blocks below the lowest that is written run once, before the first step.
    """

    def __init__(
        self, lm: LM, net: Hypernetwork, split: Split, cfg: Training, progress: Progress | None = None
    ) -> None:
        self.lm, self.net, self.cfg, self.world = lm, net, cfg, world()
        self.split = replace(split, edits=[_cut(e) for e in split.edits], held=[_cut(e) for e in split.held])
        self.values = net.state_dict(keep_vars=True)
        edits, others = _pairs(self.split)
        pairs = [*edits, *others]
        targets = set(edits)
        whole = encode_all(lm, [prompt for prompt, _ in pairs], [answer for _, answer in pairs])
        self.rows = {pair: self._row(row, pair in targets) for pair, row in zip(pairs, whole, strict=True)}
        lowest = min(i for i, names in enumerate(adapter.projections(lm)) if set(names) & set(net.order))
        self.cached = Cached(lm, self.rows.values(), lowest, progress)
        self.base = self._base([self.rows[pair] for pair in others], progress)
        self.read: Statistics = net.statistics()

    def _row(self, row: Row, target: bool) -> Row:
        """The row as it is trained on: not too long, a target with its end."""
        most = self.cfg.answer_tokens
        ids = row.ids if most is None else row.ids[: row.target + most]
        if target and self.cfg.end and ids == row.ids:
            ids = (*ids, end_token(self.lm, self.cfg.end))
        return replace(row, ids=ids)

    @torch.no_grad()
    def _base(self, rows: Sequence[Row], progress: Progress | None) -> dict[Row, Tensor]:
        """Of each row the states [m, d] that predict its answer, in the model as it is: 2.5 kB a token, not 1 MB."""
        found: dict[Row, Tensor] = {}
        for batch in each_once(rows, lambda row: len(row.ids), BATCH, progress, "reading other answers"):
            row, column, _ = answer_places(batch, self.lm.device)
            states = self.cached.states(batch)[row, column]
            found |= {one: states[row == i] for i, one in enumerate(batch)}
        return found

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        """Adam over the network, and at a rate of their own over the strengths."""
        named = list(self.net.named_parameters())
        own, rest = ([p for name, p in named if (name in self.net.own_rate) is flag] for flag in (True, False))
        return torch.optim.Adam([{"params": rest, "lr": self.cfg.lr}, {"params": own, "lr": self.cfg.strength_lr}])

    def rate(self, step: int) -> float:
        """Warm-up, then down in a line."""
        return linear(step, self.cfg.steps, self.cfg.warmup, self.cfg.final)

    def samples(self, step: int) -> list[Sample]:
        """The facts of a step."""
        return self.split.batch(step, self.cfg.batch, self.cfg.seed)[1]

    def gradients(self, samples: Sequence[Sample]) -> Read:
        """What the network reads of these facts."""
        rows = [self.rows[s.prompt, s.target] for s in samples]
        return read_gradients(
            self.lm, rows, self.net.order, partial(self.cached.states, rows), answers_only=self.net.answers_only
        )

    @torch.enable_grad()
    def learn(self, step: int) -> dict[str, float]:
        """The gradient of the judging losses, first in the factors of the change, then in the network."""
        samples = self.samples(step)
        read = self.gradients(samples)
        self.read = self.net.joined(read)
        made = self.net.factors(read, len(samples), self.read)
        learned = [(name, k, t) for name, own in made.items() for k, t in own.items() if t.requires_grad]
        leaves = {name: {k: t.detach() for k, t in own.items()} for name, own in made.items()}
        for name, k, _ in learned:
            leaves[name][k].requires_grad_()
        values = {
            "again": self._judge(leaves, [self.rows[s.again, s.answer] for s in samples], self._stated),
            "other": self._judge(leaves, [self.rows[s.other, s.other_answer] for s in samples], self._kept),
        }
        mine = [(leaves[name][k], leaves[name][k].grad) for name, k, _ in learned]
        grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in mine]
        summed = torch.tensor(list(values.values()), device=self.lm.device)
        self.world.sum([summed, *grads])
        torch.autograd.backward([t for _, _, t in learned], grads)
        return dict(zip(values, summed.tolist(), strict=True))

    def updated(self) -> None:
        """The step's facts count in the statistics once the step is made, so one that is made again counts once."""
        self.net.keep(self.read)

    def _judge(
        self, leaves: Mapping[str, Factors], rows: Sequence[Row], loss: Callable[[Tensor, Sequence[Row]], Tensor]
    ) -> float:
        """A loss under the change, backpropagated into its factors: the mean over rows of their tokens' mean.

        Each process has its part of every batch, or the first row for nothing: the passes must be as many.
        """
        total = 0.0
        for batch in batches_of_tokens([len(row.ids) for row in rows], BATCH_TOKENS * self.world.size):
            own = self.world.part(batch)
            picked = [rows[i] for i in own or batch[:1]]
            place, column, _ = answer_places(picked, self.lm.device)
            share = torch.tensor([1 / (len(r.ids) - r.target) / len(rows) for r in picked], device=self.lm.device)
            with hooked(*adapter.hooks(self.lm, self._of(leaves, own or batch[:1]))):
                states = self.cached.states(picked)[place, column]
                value = (loss(states, picked) * share[place]).sum() * bool(own)
                value.backward()
            total += float(value.detach())
        return total

    def _of(self, factors: Mapping[str, Factors], rows: Sequence[int]) -> Mapping[str, Factors]:
        """The change for these rows of a batch, where each fact has its own."""
        if self.net.together:
            return factors
        at = torch.tensor(rows, device=self.lm.device)
        return {name: {k: t[at] for k, t in own.items()} for name, own in factors.items()}

    def _stated(self, states: Tensor, rows: Sequence[Row]) -> Tensor:
        return self.cfg.edit_weight * nll(self.lm, states, answer_places(rows, self.lm.device)[2])

    def _kept(self, states: Tensor, rows: Sequence[Row]) -> Tensor:
        before = torch.cat([self.base[row] for row in rows])
        return self.cfg.keep_weight * head_loss(self.lm, states, divergence(self.lm, before))

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Of held-out facts, each in its own change or all of a commit in one: shares of answer tokens that are the
        likeliest, and how far other answers moved, nats."""
        draw = random.Random(f"{self.cfg.seed}/validation")
        held = [self.split.sample(edit, draw) for edit in self.split.held]
        sums = dict.fromkeys(("stated", "reworded", "moved"), 0.0)
        for start in range(0, len(held), self.cfg.batch):
            samples = held[start : start + self.cfg.batch]
            made = self.net.factors(self.gradients(samples), len(samples))
            with hooked(*adapter.hooks(self.lm, made)):
                sums["stated"] += self._summed([self.rows[s.prompt, s.target] for s in samples], self._right)
                sums["reworded"] += self._summed([self.rows[s.again, s.answer] for s in samples], self._right)
                sums["moved"] += self._summed([self.rows[s.other, s.other_answer] for s in samples], self._moved)
        return {name: round(value / len(held), 4) for name, value in sums.items()} if held else {}

    def _summed(self, rows: Sequence[Row], score: Callable[[Tensor, Sequence[Row]], Tensor]) -> float:
        """Sum over rows of the mean over their answer tokens."""
        place, column, _ = answer_places(rows, self.lm.device)
        share = torch.tensor([1 / (len(r.ids) - r.target) for r in rows], device=self.lm.device)
        return float((score(self.cached.states(rows)[place, column], rows) * share[place]).sum())

    def _right(self, states: Tensor, rows: Sequence[Row]) -> Tensor:
        labels = answer_places(rows, self.lm.device)[2]
        return (torch.cat([logits(self.lm, part).argmax(-1) for part in states.split(BATCH)]) == labels).float()

    def _moved(self, states: Tensor, rows: Sequence[Row]) -> Tensor:
        before = torch.cat([self.base[row] for row in rows])
        return head_loss(self.lm, states, divergence(self.lm, before))


def _cut(edit: Edit) -> Edit:
    """A fact with what it is trained on: questions that follow from it are no rewordings."""
    asks = [ask for ask in asks_of(edit.locality) if ask.answers][:MOST]
    locality = {"other": asks} if asks else ()
    return replace(edit, rephrases=edit.rephrases[:MOST], locality=locality, portability=())  # type: ignore[arg-type]


def _pairs(split: Split) -> tuple[list[Pair], list[Pair]]:
    """Every prompt with its answer that may be drawn, of facts and of questions to leave alone, each once."""
    facts = [*split.edits, *split.held]
    told = [(text, edit.target) for edit in facts for text in (edit.prompt, *edit.rephrases)]
    asks = [ask for edit in facts for ask in asks_of(edit.locality)] + [ask for ask in split.unrelated if ask.answers]
    others = [(ask.prompt, ask.answers[0]) for ask in asks]
    return list(dict.fromkeys(told)), list(dict.fromkeys(others))
