"""Rows that run once below the block that is trained, with the positions that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..inference.forward import nll
from ..inference.replay import Recording, record
from ..inference.tokens import Row
from ..models.hooks import Hook, hooked
from ..models.lm import LM
from .losses import answer_places


@dataclass(frozen=True)
class Recorded:
    """Rows recorded below a block. Made by ``recorded``."""

    lm: LM
    lowest: int
    """The block from which they run again."""
    recording: Recording
    """Of what stands before the suffix; states above ``lowest`` are computed again at each step."""
    hidden: Tensor
    """[n, S, d] what enters block ``lowest``."""
    row: Tensor
    """[m] row of each position that predicts a target token."""
    column: Tensor
    """[m] its column of the recording's suffix."""
    label: Tensor
    """[m] that token."""
    weight: Tensor
    """[m] share of the mean over rows of the mean over their target tokens."""

    def states(self, hooks: Sequence[Hook] = ()) -> Tensor:
        """[m, d] after the last block at the positions that are scored; ``hooks`` are on."""
        with hooked(*hooks):
            out = self.recording.forward(self.hidden, self.lowest)
        return out[self.row, self.column]

    def loss(self, hooks: Sequence[Hook] = ()) -> Tensor:
        """Mean over rows of the mean over target tokens of -log p, nats, with gradients."""
        with torch.enable_grad():
            return (nll(self.lm, self.states(hooks), self.label) * self.weight).sum()


def recorded(
    lm: LM, rows: Sequence[Row], lowest: int, *, from_answer: bool = False, prompt_last: bool = False
) -> Recorded:
    """Run rows with targets once.

    Args:
        lowest: the block that is trained.
        from_answer: nothing is trained that acts before the last prompt token, so only what follows runs again.
        prompt_last: all target tokens are scored on the one distribution after the prompt, and are not read.
    """
    ids = [row.ids[: row.target] if prompt_last else row.ids[:-1] for row in rows]
    at = [row.target - 1 if from_answer else 0 for row in rows]
    ends = torch.tensor([row.target - 1 for row in rows], device=lm.device)
    row, column, label = answer_places(rows, lm.device)
    column = (ends[row] if prompt_last else column) - torch.tensor(at, device=lm.device)[row]
    shares = [1 / (len(row.ids) - row.target) / len(rows) for row in rows]
    weight = torch.tensor(shares, device=lm.device)[row]
    recording = record(lm, ids, at, ends=ends.tolist(), lowest=lowest)
    return Recorded(lm, lowest, recording.bare(), recording.hidden[lowest], row, column, label, weight)
