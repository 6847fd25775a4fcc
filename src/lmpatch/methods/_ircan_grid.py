"""Accuracy of many (count, factor) settings at once, without editing a weight.

Multiplying a down-projection's column is multiplying its input. So settings travel as rows of one batch, each with its
own factors, and start at the lowest scaled block, from states that were computed once. The edit acts on every token,
so every token above that block is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.context import ContextRecord
from ..models.lm import LM
from ..models.replay import Recording, record
from ..models.run import HEAD_CHUNK, Progress, hooked, logits
from ..models.tokens import Row, batches_of_tokens, encode_all
from ..probes.integrated_gradients import first_visible
from ..units.address import Neuron

TOKENS = 4096  # per forward; more gains nothing on a CPU


@torch.no_grad()
def accuracies(
    lm: LM,
    records: Sequence[ContextRecord],
    neurons: Sequence[Neuron],
    settings: Sequence[tuple[int, float]],
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Share of records answered as their context says, for each setting.

    With options: the letter with the highest logit is the answer's. Without: each token of the answer is the argmax
    behind the right ones, which is when greedy generation begins with the answer.

    Args:
        neurons: ranked; a setting (h, factor) scales the first h of them.
    Returns:
        [settings], in 0..1.
    """
    told = encode_all(lm, [r.prompt for r in records], [r.answer for r in records])
    letters = [_letters(lm, r) for r in records]
    lowest = min((n.layer for n in neurons), default=lm.layout.n_layers)
    right = torch.zeros(len(settings), device=lm.device)
    done = 0
    for batch in batches_of_tokens([len(row.ids) for row in told], TOKENS // 4):  # four settings or more a forward
        rows = [told[i] for i in batch]
        recording = record(lm, [row.ids[:-1] for row in rows], [0] * len(rows), lowest=lowest)
        each = max(1, TOKENS // (len(rows) * recording.suffix))
        for start in range(0, len(settings), each):
            part = slice(start, start + each)
            states = scaled_states(recording, lowest, neurons, settings[part])
            right[part] += _right(lm, states, rows, [letters[i] for i in batch])
        done += len(batch)
        if progress:
            progress(done, len(records), "trying settings")
    return right / len(records)


def scaled_states(
    recording: Recording, lowest: int, neurons: Sequence[Neuron], settings: Sequence[tuple[int, float]]
) -> Tensor:
    """States after the last block under each setting, [settings, n, S, d]."""
    lm, n, c = recording.lm, recording.n, len(settings)
    hidden = recording.hidden[lowest].repeat(c, 1, 1)  # [c * n, S, d], setting after setting
    rows = torch.arange(n, device=hidden.device).repeat(c)
    handles = []
    for layer in sorted({neuron.layer for neuron in neurons}):
        factors = torch.ones(c, lm.layout.d_ff)
        for row, (count, factor) in zip(factors, settings, strict=True):
            row[[neuron.index for neuron in neurons[:count] if neuron.layer == layer]] = factor
        by_row = factors.to(hidden).repeat_interleave(n, 0)[:, None]  # [c * n, 1, f]
        handles.append(lm.module(lm.layout.downs[layer]).register_forward_pre_hook(_times(by_row)))
    with hooked(*handles):
        return recording.forward(hidden, lowest, rows=rows).reshape(c, n, *hidden.shape[1:])


def _times(factors: Tensor) -> Any:
    def scale(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        whole = x.reshape(len(factors), -1, x.shape[-1]) * factors  # some models flatten rows and tokens
        return whole.reshape(x.shape), *args[1:]

    return scale


def _letters(lm: LM, record: ContextRecord) -> list[int]:
    """Token of each option's letter behind the prompt."""
    rows = encode_all(lm, [record.prompt] * len(record.options), record.letters)
    return [row.ids[first_visible(lm, row)] for row in rows]


def _right(lm: LM, states: Tensor, rows: Sequence[Row], letters: Sequence[Sequence[int]]) -> Tensor:
    """How many rows are answered right, [settings]; ``states`` are [settings, n, S, d]."""
    spots = [
        (i, t - 1, row.ids[t])
        for i, row in enumerate(rows)
        for t in ([first_visible(lm, row)] if letters[i] else range(row.target, len(row.ids)))
    ]
    row, column, label = (torch.tensor(x, device=states.device) for x in zip(*spots, strict=True))
    picked = states[:, row, column]  # [settings, spots, d]
    allowed = [letters[i] for i, _, _ in spots] * len(states)
    best = []
    for start, part in zip(range(0, len(allowed), HEAD_CHUNK), picked.flatten(0, 1).split(HEAD_CHUNK), strict=True):
        best.append(_argmax(logits(lm, part), allowed[start : start + HEAD_CHUNK]))
    missed = torch.cat(best).reshape(len(states), -1) != label  # [settings, spots]
    misses = torch.zeros(len(states), len(rows), device=states.device).index_add(1, row, missed.float())
    return (misses == 0).sum(1)


def _argmax(z: Tensor, allowed: Sequence[Sequence[int]]) -> Tensor:
    """The best token of each row of the logits [r, V], among the allowed ones where there are any."""
    best = z.argmax(-1)
    for i, tokens in enumerate(allowed):
        if tokens:
            choices = torch.tensor(tokens, device=z.device)
            best[i] = choices[z[i, choices].argmax()]
    return best


def memory(lm: LM) -> int:
    """Bytes one batch takes, rounded up."""
    layout = lm.layout
    return 4 * (TOKENS * (12 * layout.d_model + 4 * layout.d_ff) + 2 * HEAD_CHUNK * layout.vocab)
