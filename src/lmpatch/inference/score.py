"""Targets scored under teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..errors import BadInput
from ..models.lm import LM
from ..progress import Progress
from .forward import blocks, positions
from .interventions import Pair, Prompt, Streams, combined, initial_states, longest, streams
from .tokens import pad, pad_id


@dataclass(frozen=True)
class Score:
    """A target under teacher forcing; one entry per target token."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    argmax: tuple[int, ...]

    @property
    def total(self) -> float:
        """Log probability of the whole target, nats."""
        return sum(self.logprobs)

    @property
    def accuracy(self) -> float:
        """Share of target tokens that are the model's first choice given the right ones before."""
        return sum(a == b for a, b in zip(self.ids, self.argmax, strict=True)) / len(self.ids)


@torch.no_grad()
def score(
    lm: LM, prompts: Sequence[Prompt], targets: Sequence[str], *, batch_size: int = 64, progress: Progress | None = None
) -> list[Score]:
    """Score each target after its prompt, teacher-forced.

    Args:
        prompts: texts, or ``InContext`` where a decode patch is on the model: its combined distribution is scored.
    Returns:
        one ``Score`` per prompt, in the order given.
    Raises:
        BadInput: nothing stands before a target, the two are longer than the model's window, or a decode patch is on
            and a prompt is a plain text.
    """
    inputs = streams(lm, prompts, targets)
    for prompt, rows in zip(prompts, inputs.rows, strict=True):
        if not all(row.target for row in rows):
            raise BadInput(
                f"nothing stands before the target of {prompt!r}: the tokenizer adds no start token. Give a prompt."
            )
    asked = [(tuple(row.ids for row in rows), tuple(row.target for row in rows)) for rows in inputs.rows]
    queue = sorted(set(asked), key=lambda key: longest(key[0]))
    done: dict[tuple[Pair, tuple[int, ...]], Score] = {}
    size = max(1, batch_size // inputs.width)
    for start in range(0, len(queue), size):
        batch = queue[start : start + size]
        done.update(zip(batch, _scores(lm, inputs, batch), strict=True))
        if progress:
            progress(start + len(batch), len(queue), "scoring")
    return [done[key] for key in asked]


def _scores(lm: LM, inputs: Streams, batch: Sequence[tuple[Pair, tuple[int, ...]]]) -> list[Score]:
    """One batch of ``score``: (ids, where the target begins) of each stream of each prompt."""
    n, width = len(batch), inputs.width
    rows = [pair[s] for s in range(width) for pair, _ in batch]
    starts = torch.tensor([targets for _, targets in batch], device=lm.device).T  # [streams, n]
    ids, mask = pad(rows, pad_id(lm), side="right")
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    states = blocks(lm, ids, mask, position_ids=positions(mask), vectors=inputs.vectors)  # [streams * n, T, d]
    states = states.unflatten(0, (width, n))
    labels = [pair[0][targets[0] :] for pair, targets in batch]
    spots = [(i, k) for i, label in enumerate(labels) for k in range(len(label))]
    # a rule goes through an answer token by token, since it may remember; without one all tokens are alike
    steps = [[s for s in spots if s[1] == k] for k in range(max(map(len, labels)))] if inputs.rules else [spots]
    state = initial_states(lm, inputs.rules, n)
    found: dict[tuple[int, int], tuple[float, int]] = {}
    for step in steps:
        row, k = torch.tensor(step, device=lm.device).T
        want = ids[row, starts[0, row] + k]
        picked = states[torch.arange(width, device=lm.device)[:, None], row, starts[:, row] + k - 1]  # [streams, c, d]
        known, logp, best = state[:, row], [], []
        for part, z in combined(lm, picked, inputs.rules, known):
            logp.append(-F.cross_entropy(z, want[part], reduction="none"))
            best.append(z.argmax(-1))
        state[:, row] = known
        found.update(zip(step, zip(torch.cat(logp).tolist(), torch.cat(best).tolist(), strict=True), strict=True))
    each = [[found[i, k] for k in range(len(label))] for i, label in enumerate(labels)]
    return [
        Score(label, tuple(p for p, _ in tokens), tuple(a for _, a in tokens))
        for label, tokens in zip(labels, each, strict=True)
    ]
