"""Which units carry adherence and which robustness: a cue from activations, a cue from gradients, four types.

Source: Xu et al. 2025, Parenting (arXiv:2410.10360), sec. 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from ...distributed import world
from ...errors import Diverged
from ...inference.tokens import Row
from ...locate.activations import watch
from ...models.lm import LM
from ...progress import Progress
from ...training.loop import Loop, Schedule, Task, linear
from .config import Config, Cue
from .data import Rows, draws
from .units import Adapter, Type, Unit

FLOOR = 0.1  # of the mean excess: what the least active layer still counts


@dataclass(frozen=True)
class Mined:
    """What one set says about the units."""

    importance: Tensor
    """[units] fp64: the layer's weight times the mean of sensitivity · uncertainty."""
    layers: Tensor
    """[layers] fp64: the weights, see ``layer_weights``."""
    notes: dict[str, Any]


def mine(
    lm: LM, units: Sequence[Unit], rows: Rows, cfg: Config, name: str, progress: Progress | None = None,
    file: Path | None = None, stamp: str = "",
) -> Mined:  # fmt: skip
    """Tune an adapter on one set for a while, and score its units by what the tuning would miss.

    Args:
        file: the checkpoint; of a run that has ended it holds the scores.
        stamp: what identifies the run; a checkpoint of another one is refused.
    Raises:
        Diverged: scores or parameters left the finite numbers.
    """
    task, advice = _Mining(lm, units, rows, cfg, name), f"Lower mine_lr, now {cfg.mine_lr}."
    rate = partial(linear, steps=cfg.mine_steps, warmup=cfg.mine_warmup, final=1.0)
    schedule = Schedule(cfg.mine_steps, rate=rate, clip=cfg.clip)
    loop = Loop(task, schedule, name=f"mining {name}", file=file, stamp=stamp, advice=advice)
    loop.run(progress)
    scores, odd = task.tracker.reduced([unit.size for unit in units])
    finite = bool(scores.isfinite().all()) and bool(task.leaf.isfinite().all())  # entries that are not count as 0 above
    if not finite or odd * 2 > task.leaf.numel() * cfg.mine_steps:
        raise Diverged(f"mining {name} left the finite numbers. {advice}")
    rest = loop.seconds - float(task.spent)
    notes = {"seconds": round(loop.seconds, 3), "not_finite": odd, "tracking_bytes": 3 * task.leaf.nbytes}
    notes |= {"tracking_share": round(float(task.spent) / rest, 5) if rest > 0 else 0.0}
    layers = layer_weights(task.counts, sum(len(row.ids) for row in task.seen), cfg.cue)
    return Mined(layers[[unit.layer for unit in units]] * scores, layers, notes)


class _Mining(Task):
    """A short tuning on one set, whose gradients are tracked."""

    def __init__(self, lm: LM, units: Sequence[Unit], rows: Rows, cfg: Config, name: str) -> None:
        self.lm, self.rows, self.cfg, self.world = lm, rows, cfg, world()
        self.seen = rows.train[: cfg.cue_rows]  # whose activations are counted
        self.adapter = Adapter(lm, units, cfg.alpha / cfg.rank if cfg.units != "full_matrix" else 1.0, cfg.seed)
        (self.leaf,) = self.adapter.leaves.values()
        weights = (lm.parameter(lm.layout.weight(unit.pieces[0].module)).detach() for unit in units)
        own = ((weight.T if lm.layout.transposed else weight).reshape(-1) for weight in weights)
        base = torch.cat([*own]).to(self.leaf) if cfg.units == "full_matrix" else None
        self.tracker = Tracker(self.leaf, base, cfg.beta1, cfg.beta2)
        self.counts = torch.zeros(lm.layout.n_layers, dtype=torch.float64)
        self.spent = torch.zeros((), dtype=torch.float64)  # seconds, on the tracker
        self.seed = f"{cfg.seed}/mine/{name}"
        self.values = {"entangled": self.leaf, "counts": self.counts, "spent": self.spent}
        self.values |= {"s": self.tracker.s, "u": self.tracker.u, "odd": self.tracker.odd}

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        return torch.optim.AdamW([self.leaf], lr=self.cfg.mine_lr, weight_decay=self.cfg.decay)

    def learn(self, step: int) -> dict[str, float]:
        if step == 0:
            self.counts.copy_(active_tokens(self.lm, self.seen))
        rows = draws(self.rows, self.cfg.mine_rows, step, self.seed, self.cfg.known_share)
        with torch.enable_grad():
            loss = self.adapter.loss(self.lm, rows, self.world)
            (self.leaf.grad,) = torch.autograd.grad(loss, self.leaf)
        self.world.sum([self.leaf.grad])
        self.spent += self.tracker.update(self.leaf.grad) if self.cfg.update_point == "before_step" else 0.0
        return {}

    def updated(self) -> None:
        if self.cfg.update_point == "after_step" and self.leaf.grad is not None:
            self.spent += self.tracker.update(self.leaf.grad)


class Tracker:
    """Sensitivity s = |θ · g|, smoothed: S ← β1 S + (1 - β1) s, then U ← β2 U + (1 - β2)|s - S| with the new S.

    Three fp32 tensors of the parameters' size; no step waits for the device. ``base``: the weights W in the order of
    the flat tensor; with full parameters θ is W + ΔW.
    """

    def __init__(self, theta: Tensor, base: Tensor | None, beta1: float, beta2: float) -> None:
        self.theta, self.base, self.betas = theta, base, (beta1, beta2)
        self.s, self.u, self._now = (torch.zeros_like(theta, requires_grad=False) for _ in range(3))
        self.odd = torch.zeros((), dtype=torch.int64, device=theta.device)

    @torch.no_grad()
    def update(self, grad: Tensor) -> float:
        """Take in one gradient; returns seconds (on a GPU: until everything is queued)."""
        start, now = perf_counter(), self._now
        theta = self.theta.detach() if self.base is None else torch.add(self.theta.detach(), self.base, out=now)
        torch.mul(theta, grad, out=now).abs_()
        odd = ~now.isfinite()
        self.odd += odd.sum()
        now.masked_fill_(odd, 0.0)
        self.s.lerp_(now, 1 - self.betas[0])
        self.u.lerp_(now.sub_(self.s).abs_(), 1 - self.betas[1])
        return perf_counter() - start

    def reduced(self, sizes: Sequence[int]) -> tuple[Tensor, int]:
        """Mean of S · U of each unit, [units] fp64 on the CPU, and how many entries were not finite."""
        parts = zip(self.s.split(list(sizes)), self.u.split(list(sizes)), strict=True)
        means = [(s.double() * u.double()).mean() for s, u in parts]  # fp64 of all at once would be 16 bytes more
        packed = torch.stack([*means, self.odd.double()]).cpu()  # one transfer
        return packed[:-1], int(packed[-1])


def active_tokens(lm: LM, rows: Sequence[Row]) -> Tensor:
    """c_l [layers] fp64: tokens of prompts and answers a neuron of layer l is active at, on average over neurons."""
    counts = torch.zeros(lm.layout.n_layers, dtype=torch.int64, device=lm.device)

    def see(layer: int, _: slice, values: Tensor, real: Tensor) -> None:
        counts[layer] += ((values > 0) & real[..., None]).sum()

    watch(lm, rows, see)
    return counts.cpu().double() / torch.tensor(lm.layout.widths)


def layer_weights(counts: Tensor, tokens: int, cue: Cue) -> Tensor:
    """Weights of the layers from c_l, [layers] fp64 summing to 1; ``none``: all equal.

    ``count`` is the released softmax(log1p(c - c_min)), which is 1 + c - c_min over its sum; it depends on how many
    tokens were counted. ``rate`` takes shares of tokens; the least active layer counts a tenth of the mean excess.
    """
    if cue == "count":
        return (counts - counts.min()).log1p().softmax(0)
    excess = (counts - counts.min()) / max(1, tokens)
    if cue == "none" or not bool(excess.any()):
        return torch.full_like(counts, 1 / len(counts))
    weights = excess + FLOOR * excess.mean()
    return weights / weights.sum()


def z_scores(importance: Tensor) -> Tensor:
    """Over all units of one set; zeros where all are equal."""
    spread = importance.std(unbiased=False)
    return (importance - importance.mean()) / spread if float(spread) > 0 else torch.zeros_like(importance)


def typed(adherence: Tensor, robustness: Tensor, threshold: float, rule: Literal["z", "variance"] = "z") -> list[Type]:
    """Each unit's type from its importance for the two skills.

    Args:
        threshold: τ of the z-scores.
        rule: ``variance``: important is what exceeds mean + variance, as released; that is z > 0 wherever the variance
            is small.
    """
    if rule == "variance":
        high = [x > x.mean() + x.var(unbiased=False) for x in (adherence, robustness)]
    else:
        high = [z_scores(x) > threshold for x in (adherence, robustness)]
    names: dict[tuple[bool, bool], Type] = {(True, True): "entangled", (True, False): "adherence"}
    names |= {(False, True): "robustness", (False, False): "others"}
    return [names[pair] for pair in zip(*(x.tolist() for x in high), strict=True)]


def correlation(adherence: Tensor, robustness: Tensor) -> float:
    """Of the z-scores of the two skills over all units, in -1..1: near 1 few units are of one skill alone."""
    return float((z_scores(adherence) * z_scores(robustness)).mean())


def balance(adherence: Tensor, robustness: Tensor, types: Sequence[Type]) -> float:
    """gamma_a = E[z_a] / (E[z_a] + E[z_r]) over entangled units, each mean at least 0; ½ without any."""
    entangled = torch.tensor([t == "entangled" for t in types])
    if not bool(entangled.any()):
        return 0.5
    a, r = (max(0.0, float(z_scores(x)[entangled].mean())) for x in (adherence, robustness))
    return a / (a + r) if a + r > 0 else 0.5
