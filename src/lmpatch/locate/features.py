"""Keys and gradients: what each fact asks of a module, from one forward and one backward over its answer.

What UltraEdit computes its change from, and other methods that learn from a fact's own gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..inference.forward import nll
from ..inference.replay import record
from ..inference.tokens import Row, batches_of_rows
from ..models.lm import LM
from ..progress import Progress
from ..training.losses import answer_places
from .gradients import joined, traced

BATCH = 32  # rows per forward


@dataclass(frozen=True)
class Features:
    """Of one module, N positions that predict a target token, fact after fact."""

    fact: Tensor
    """[N] which fact each belongs to."""
    keys: Tensor
    """[N, in] the module's inputs, fp32."""
    gradients: Tensor
    """[N, out] of the summed loss with respect to its outputs, fp32."""
    sizes: Tensor
    """[N] lengths of its outputs."""

    def of(self, pick: Sequence[int]) -> Features:
        """Those of these facts alone."""
        at = torch.isin(self.fact, torch.tensor(list(pick), device=self.fact.device))
        return Features(self.fact[at], self.keys[at], self.gradients[at], self.sizes[at])


def features(
    lm: LM, rows: Sequence[Row], modules: Sequence[str], lowest: int, progress: Progress | None = None
) -> dict[str, Features]:
    """One forward over the rows, and one backward over their targets, down to the lowest module.

    A gradient at a target's position comes from there on alone, so what stands before runs without one.

    Args:
        lowest: the block of the lowest module.
    """
    parts: dict[str, list[Features]] = {name: [] for name in modules}
    done = 0
    for pick in batches_of_rows([len(row.ids) for row in rows], BATCH):
        for name, part in _batch(lm, [rows[i] for i in pick], modules, lowest).items():
            parts[name].append(
                Features(torch.tensor(pick, device=lm.device)[part.fact], part.keys, part.gradients, part.sizes)
            )
        done += len(pick)
        if progress:
            progress(done, len(rows), "reading gradients")
    return {name: joined(found) for name, found in parts.items()}


def _batch(lm: LM, rows: Sequence[Row], modules: Sequence[str], lowest: int) -> dict[str, Features]:
    ends = [row.target - 1 for row in rows]
    recording = record(lm, [row.ids[:-1] for row in rows], ends, ends=ends, lowest=lowest)
    fact, column, label = answer_places(rows, lm.device)
    column = column - torch.tensor(ends, device=lm.device)[fact]  # of the suffix

    def loss() -> Tensor:
        out = recording.forward(recording.hidden[lowest], lowest)  # [n, S, d]
        return nll(lm, out[fact, column], label).sum()

    def at(x: Tensor) -> Tensor:
        return x.reshape(len(rows), recording.suffix, -1)[fact, column].float()

    return {
        name: Features(fact, at(one.inputs), at(one.gradients), at(one.outputs).norm(dim=1))
        for name, one in traced(lm, modules, loss).items()
    }
