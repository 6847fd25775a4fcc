"""Tuning an adapter whose types of units each have their own mix of three losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...distributed import SINGLE, World, world
from ...errors import BadInput
from ...inference.tokens import Row
from ...models.lm import LM
from ...progress import Progress
from ...training.loop import Loop, Schedule, Task, linear
from .config import Config
from .data import SETS, Rows, draws
from .units import Adapter, Mean, Type

Mix = Mapping[Type, Mapping[str, float]]
"""Type → set → coefficient of that set's loss."""
WORSE = 2.0  # times the first validation loss: from there a run counts as divergent


def mixes(delta: float, gamma: float) -> Mix:
    """Boundary control: what each type of unit learns from.

    Args:
        delta: δ1, the weight of the two skills against document extraction.
        gamma: the part of adherence in entangled units.
    Source: Xu et al. 2025 (arXiv:2410.10360), sec. 3.3.
    """
    return {
        "entangled": {"adherence": delta * gamma, "robustness": delta * (1 - gamma), "extraction": 1 - delta},
        "adherence": {"adherence": delta, "extraction": 1 - delta},
        "robustness": {"robustness": delta, "extraction": 1 - delta},
    }


def by_tokens(rows: Mapping[str, Sequence[Row]]) -> Mix:
    """The mix that makes one mean over all answer tokens of the rows: each set weighs what it has of them."""
    return _shares({kind: sum(len(row.ids) - row.target for row in own) for kind, own in rows.items()})


def by_examples(rows: Mapping[str, Sequence[Row]]) -> Mix:
    """The mix that makes one mean over all rows, where the loss of a set is a mean over its rows."""
    return _shares({kind: len(own) for kind, own in rows.items()})


def _shares(counts: Mapping[str, int]) -> Mix:
    return {"entangled": {kind: count / sum(counts.values()) for kind, count in counts.items()}}


@torch.enable_grad()
def gradients(
    lm: LM, adapter: Adapter, rows: Mapping[str, Sequence[Row]], mix: Mix, world: World = SINGLE, mean: Mean = "tokens"
) -> dict[Type, Tensor]:
    """Σ_k coefficient · ∂L_k of every type that trains. A type takes no part in the backward pass of a loss it does not
    learn from."""
    total = {t: torch.zeros_like(leaf) for t, leaf in adapter.leaves.items()}
    for kind in SETS:
        users = [t for t in total if mix[t].get(kind, 0.0)]
        if not users or not rows.get(kind):
            continue
        grads = torch.autograd.grad(adapter.loss(lm, rows[kind], world, mean), [adapter.leaves[t] for t in users])
        for t, grad in zip(users, grads, strict=True):
            total[t].add_(grad, alpha=mix[t][kind])
    world.sum(list(total.values()))
    return total


class Tuner(Task):
    """One run of tailored tuning."""

    def __init__(
        self, lm: LM, adapter: Adapter, sets: Mapping[str, Rows], mix: Mix, cfg: Config, name: str = "tuning"
    ) -> None:
        self.lm, self.adapter, self.sets, self.mix, self.cfg, self.name = lm, adapter, sets, mix, cfg, name
        self.leaves, self.world = adapter.leaves, world()
        self.values: dict[str, Tensor] = dict(self.leaves.items())
        if not self.leaves:
            raise BadInput("every unit is of the type others, so nothing would be trained. Lower threshold.")
        used = {kind for own in mix.values() for kind, weight in own.items() if weight}
        counts = {kind: int(getattr(cfg, f"rows_{kind}")) for kind in SETS}
        self.counts = {kind: count for kind, count in counts.items() if count and kind in used}

    def run(self, folder: Path | None = None, stamp: str = "", progress: Progress | None = None) -> Loop:
        """Train to the last step, or to the last good state of a divergent run.

        Args:
            folder: where checkpoint and curve are kept, and gone on from.
            stamp: what identifies the run; a checkpoint of another one is refused.
        Raises:
            Diverged: the run left the finite numbers before its first good state.
        """
        cfg, every = self.cfg, self.cfg.validate_every
        rate = partial(linear, steps=cfg.steps, warmup=cfg.warmup)
        schedule = Schedule(cfg.steps, rate, cfg.clip, validate_every=every, save_every=every, worse=WORSE)
        file, curves = (folder / f"{self.name}.{end}" if folder else None for end in ("safetensors", "jsonl"))
        advice = f"Lower lr, now {cfg.lr}."
        loop = Loop(self, schedule, name=self.name, file=file, curves=curves, stamp=stamp, advice=advice)
        loop.run(progress)
        return loop

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        """AdamW over all types that train."""
        return torch.optim.AdamW(list(self.leaves.values()), lr=self.cfg.lr, weight_decay=self.cfg.decay)

    def learn(self, step: int) -> dict[str, float]:
        """Each type's gradient from its own losses."""
        seed, shares = self.cfg.seed, {"robustness": self.cfg.known_share}
        rows = {
            kind: draws(self.sets[kind], count, step, f"{seed}/{kind}", shares.get(kind, 0.0))
            for kind, count in self.counts.items()
        }
        cfg, mix = self.cfg, self.mix
        if cfg.mode == "plain":
            mix = by_tokens(rows) if cfg.mean == "tokens" else by_examples(rows)
        for t, grad in gradients(self.lm, self.adapter, rows, mix, self.world, cfg.mean).items():
            self.leaves[t].grad = grad
        return {}

    def validate(self, step: int) -> dict[str, float]:
        """Losses on rows that are not trained on."""
        rows = {kind: self.sets[kind].validate or self.sets[kind].train[:1] for kind in self.counts}
        return {kind: round(float(self.adapter.loss(self.lm, own)), 5) for kind, own in rows.items()}
