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
from .interventions import Pair, Prompt, Streams, combined, in_context, initial_states, longest, stored_changes, streams
from .tokens import each_once, padded


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
    """Score each target after its prompt, teacher-forced; one ``Score`` per prompt.

    Args:
        prompts: texts, or ``InContext`` where a decode patch is on the model: its combined distribution is scored.
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
        if any(row.target == len(row.ids) for row in rows):
            raise BadInput(f"the target of {prompt!r} is empty. Give what is to be scored.")
    scores: dict[Pair, Score] = {}
    for batch in each_once(inputs.rows, longest, batch_size // inputs.width, progress, "scoring"):
        with lm.lock:  # a patch of another thread goes on or off between two batches
            scores.update(zip(batch, score_batch(lm, inputs, batch), strict=True))
    return [scores[pair] for pair in inputs.rows]


def score_batch(lm: LM, inputs: Streams, batch: Sequence[Pair]) -> list[Score]:
    """One padded ``batch`` of prompts with their targets."""
    n, width = len(batch), inputs.width
    rows = [pair[s] for s in range(width) for pair in batch]  # stream after stream
    ids, mask = padded(lm, [row.ids for row in rows], side="right")
    starts = torch.tensor([row.target for row in rows], device=lm.device).view(width, n)
    at, context = positions(mask), in_context(lm, rows)
    states = blocks(
        lm, ids, mask, position_ids=at, vectors=inputs.vectors, prompt_end=starts.flatten() - 1, in_context=context,
        changes=stored_changes(lm, rows),
    ).unflatten(0, (width, n))  # [streams, n, T, d]  # fmt: skip
    labels = [pair[0].ids[pair[0].target :] for pair in batch]
    places = [(i, k) for i, label in enumerate(labels) for k in range(len(label))]
    steps = [places]
    if inputs.rules:  # a rule goes through an answer token by token, since it may remember
        steps = [[place for place in places if place[1] == k] for k in range(max(map(len, labels)))]
    state = initial_states(lm, inputs.rules, n)
    stream = torch.arange(width, device=lm.device)[:, None]
    logprobs, argmax = [], []
    for step in steps:
        row, k = torch.tensor(step, device=lm.device).T
        label = ids[row, starts[0, row] + k]
        before = states[stream, row, starts[:, row] + k - 1]  # [streams, c, d] what predicts token k
        own = state[:, row]
        for part, z in combined(lm, before, inputs.rules, own):
            logprobs.append(-F.cross_entropy(z, label[part], reduction="none"))
            argmax.append(z.argmax(-1))
        state[:, row] = own
    order = [place for step in steps for place in step]
    logprob_of, best_of = (dict(zip(order, torch.cat(x).tolist(), strict=True)) for x in (logprobs, argmax))
    return [
        Score(label, *(tuple(values[i, k] for k in range(len(label))) for values in (logprob_of, best_of)))
        for i, label in enumerate(labels)
    ]
