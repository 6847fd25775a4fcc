"""Rows whose states below a block are kept: blocks that nothing trains run once, however often a row is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..inference.replay import record
from ..inference.tokens import Row, each_once
from ..models.lm import LM
from ..progress import Progress

BATCH = 32  # rows of one forward


class Cached:
    """The states [tokens, d] of rows as they enter one block, in the dtype of the model.

    Rows are padded on the right and their blocks are causal, so what a block is called with (mask, rotary tables) is
    the same for all rows: it is recorded of the longest one and cut.
    """

    def __init__(self, lm: LM, rows: Iterable[Row], lowest: int, progress: Progress | None = None) -> None:
        """Run the rows once, in batches that depend on nothing but the rows: a later run has the same bits.

        Args:
            rows: their last tokens are predicted and not read.
            lowest: the block.
        """
        self.lm, self.lowest = lm, lowest
        self._states: dict[tuple[int, ...], Tensor] = {}
        reads = [row.ids[:-1] for row in rows]
        for batch in each_once(reads, len, BATCH, progress, "reading rows"):
            recording = record(lm, batch, [0] * len(batch), ends=[0] * len(batch), lowest=lowest, last=lowest)
            states = recording.hidden[lowest]  # [n, S, d]
            self._states |= {ids: state[: len(ids)].clone() for ids, state in zip(batch, states, strict=True)}
        longest = max(self._states, key=len)
        self._frame = record(lm, [longest], [0], ends=[0], lowest=lowest).bare()

    def states(self, rows: Sequence[Row]) -> Tensor:
        """[n, S, d] after the last block, of each row's tokens but the last; padding is on the right.

        Hooks and patches that are on the model act from the block on, and gradients flow into them.
        """
        kept = [self._states[row.ids[:-1]] for row in rows]
        mask = torch.zeros(len(rows), self._frame.mask.shape[1], dtype=torch.int64, device=self.lm.device)
        for real, state in zip(mask, kept, strict=True):
            real[self._frame.prefix : self._frame.prefix + len(state)] = 1
        ends = torch.tensor([self._frame.prefix + row.target - 1 for row in rows], device=self.lm.device)
        same = torch.zeros(len(rows), dtype=torch.int64, device=self.lm.device)
        recording = replace(self._frame.select(same), mask=mask, prompt_end=ends)
        return recording.forward(pad_sequence(kept, batch_first=True), self.lowest)
