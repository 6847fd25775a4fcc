"""Tuning an adapter whose types of units each have their own mix of three losses. Resumable, and stopped in time."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...distributed import SINGLE, World, world
from ...errors import BadInput, Diverged
from ...inference.tokens import Row
from ...models.lm import LM
from ...progress import Progress
from ...training import checkpoint as _checkpoint
from .data import SETS, Rows, draws, loss
from .units import Adapter, Type

if TYPE_CHECKING:
    from .method import Config

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
    counts = {kind: sum(len(row.ids) - row.target for row in own) for kind, own in rows.items()}
    return {"entangled": {kind: count / sum(counts.values()) for kind, count in counts.items()}}


def gradients(
    lm: LM, adapter: Adapter, rows: Mapping[str, Sequence[Row]], mix: Mix, world: World = SINGLE
) -> dict[Type, Tensor]:
    """Σ_k coefficient · ∂L_k of every type that trains. A type takes no part in the backward pass of a loss it does not
    learn from."""
    total = {t: torch.zeros_like(leaf) for t, leaf in adapter.leaves.items()}
    for kind in SETS:
        users = [t for t in total if mix[t].get(kind, 0.0)]
        if not users or not rows.get(kind):
            continue
        with torch.enable_grad():
            value = loss(lm, rows[kind], lambda: adapter.hooks(lm), world)
            found = torch.autograd.grad(value, [adapter.leaves[t] for t in users])
        for t, grad in zip(users, found, strict=True):
            total[t].add_(grad, alpha=mix[t][kind])
    world.sum(list(total.values()))
    return total


class Tuner:
    """One run of tailored tuning."""

    def __init__(
        self, lm: LM, adapter: Adapter, sets: Mapping[str, Rows], mix: Mix, cfg: Config, name: str = "tuning"
    ) -> None:
        self.lm, self.adapter, self.sets, self.mix, self.cfg, self.name = lm, adapter, sets, mix, cfg, name
        self.leaves, self.world = adapter.leaves, world()
        if not self.leaves:
            raise BadInput("every unit is of the type others, so nothing would be trained. Lower threshold.")
        self.adam = torch.optim.AdamW(list(self.leaves.values()), lr=cfg.lr, weight_decay=cfg.decay)
        self.counts = {"adherence": cfg.rows_adherence, "robustness": cfg.rows_robustness}
        self.counts["extraction"] = cfg.rows_extraction
        used = {kind for own in mix.values() for kind, weight in own.items() if weight}
        self.counts = {kind: count for kind, count in self.counts.items() if count and kind in used}
        self.step = 0
        self.good: dict[Type, Tensor] = {}
        self.stopped = ""
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0
        self.torn = False  # an interrupt may fall between a step and its count

    def run(self, folder: Path | None = None, stamp: str = "", progress: Progress | None = None) -> None:
        """Train to the last step, or to the last good state of a divergent run.

        Args:
            folder: where a checkpoint is kept, and read from if it is there.
            stamp: what identifies the run; a checkpoint of another one is refused.
        Raises:
            Diverged: the run left the finite numbers before its first good state.
        """
        path = folder / f"{self.name}.safetensors" if folder else None
        if path and path.exists():
            self._resume(path, stamp)
        begun = perf_counter() - self.seconds
        if not self.curve:
            self._validate()
        try:
            while self.step < self.cfg.steps and not self.stopped:
                self._update()
                if self.step % self.cfg.validate_every == 0 or self.step == self.cfg.steps:
                    self._validate()
                    self._save(path, stamp)
                if progress:
                    progress(self.step, self.cfg.steps, self.name)
        finally:
            self.seconds = perf_counter() - begun
            if not self.torn:
                self._save(path, stamp)
        if self.stopped:
            self._back()

    def _update(self) -> None:
        cfg = self.cfg
        rows = {
            kind: draws(
                self.sets[kind], count, self.step, f"{cfg.seed}/{kind}",
                cfg.known_share if kind == "robustness" else 0.0,
            )
            for kind, count in self.counts.items()
        }  # fmt: skip
        mix = by_tokens(rows) if cfg.mode == "plain" else self.mix
        for t, grad in gradients(self.lm, self.adapter, rows, mix, self.world).items():
            self.leaves[t].grad = grad
        torch.nn.utils.clip_grad_norm_(list(self.leaves.values()), cfg.clip)
        warm = min(1.0, (self.step + 1) / max(1, cfg.warmup))
        for group in self.adam.param_groups:
            group["lr"] = cfg.lr * warm * (1 - self.step / max(1, cfg.steps))
        self.torn = True
        self.adam.step()
        self.adam.zero_grad()
        self.step += 1
        self.torn = False

    @torch.no_grad()
    def _validate(self) -> None:
        """Losses on rows that are not trained on; the state is kept if they are finite and not far above the first."""
        seen = {}
        for kind in self.counts:
            rows = self.sets[kind].validate or self.sets[kind].train[:1]
            seen[kind] = round(float(loss(self.lm, rows, lambda: self.adapter.hooks(self.lm))), 5)
        total = sum(seen.values())
        self.curve.append({"step": self.step, **seen})
        first = sum(value for key, value in self.curve[0].items() if key != "step")
        if math.isfinite(total) and total <= WORSE * first + 1:
            self.good = {t: leaf.detach().clone() for t, leaf in self.leaves.items()}
        else:
            self.stopped = (
                f"{self.name} diverged by step {self.step}: validation loss {total:.3g}, at first {first:.3g}"
            )

    @torch.no_grad()
    def _back(self) -> None:
        last = [point["step"] for point in self.curve[:-1]]
        advice = f"Lower lr, now {self.cfg.lr}."
        if not last or last[-1] == 0:
            raise Diverged(f"{self.stopped}. There is no earlier good state. {advice}")
        for t, value in self.good.items():
            self.leaves[t].copy_(value)
        self.stopped += f"; kept is the state of step {last[-1]:.0f}"
        warnings.warn(f"{self.stopped}. {advice}", stacklevel=4)

    def _save(self, path: Path | None, stamp: str) -> None:
        """Values, moments, last good state and step: at once or not at all. A divergent state is not written."""
        if path is None or self.stopped or not self.world.is_main:
            return
        tensors = {f"value/{t}": leaf.detach() for t, leaf in self.leaves.items()}
        tensors |= {f"good/{t}": value for t, value in self.good.items()}
        for t, leaf in self.leaves.items():
            tensors |= {f"adam/{t}/{key}": value for key, value in self.adam.state.get(leaf, {}).items()}
        head = {"step": str(self.step), "curve": json.dumps(self.curve), "seconds": str(self.seconds)}
        _checkpoint.write(path, stamp, head, tensors)

    @torch.no_grad()
    def _resume(self, path: Path, stamp: str) -> None:
        head, tensors = _checkpoint.read(path, stamp)
        for t, leaf in self.leaves.items():
            leaf.copy_(tensors[f"value/{t}"])
            self.good[t] = tensors[f"good/{t}"].to(leaf.device)
            prefix = f"adam/{t}/"
            state = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            if state:
                self.adam.state[leaf] = {k: v if k == "step" else v.to(leaf.device) for k, v in state.items()}
        self.step, self.seconds = int(head["step"]), float(head["seconds"])
        self.curve = json.loads(head["curve"])
