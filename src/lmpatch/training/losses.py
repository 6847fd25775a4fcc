"""Losses over the answers of prompts, and the one forward they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..distributed import SINGLE, World
from ..inference.forward import blocks, logits, nll, positions
from ..inference.tokens import Row, pad, pad_id
from ..models.lm import LM


def answer_places(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where an answer token is predicted: row [m], column [m], and the token [m], row after row.

    Args:
        rows: with their first token in column 0.
    """
    found = [(i, t - 1, row.ids[t]) for i, row in enumerate(rows) for t in range(row.target, len(row.ids))]
    row, column, label = torch.tensor(found, dtype=torch.int64, device=device).reshape(-1, 3).T
    return row, column, label


def answer_states(
    lm: LM, rows: Sequence[Row], world: World = SINGLE, vectors: Tensor | None = None
) -> tuple[Tensor, Tensor, list[int]]:
    """States [m, d] that predict an answer token, their labels [m], and which of the rows each belongs to.

    Args:
        world: each process runs its part of the rows, or the first one for nothing: the passes must be as many.
        vectors: [v, d] embeddings of virtual tokens, see ``inference.forward.blocks``.
    """
    own = world.part(range(len(rows)))
    ids, mask = (t.to(lm.device) for t in pad([rows[i].ids for i in own or [0]], pad_id(lm), side="right"))
    ends = torch.tensor([rows[i].target - 1 for i in own or [0]], device=lm.device)
    states = blocks(lm, ids, mask, position_ids=positions(mask), vectors=vectors, prompt_end=ends)  # [n, T, d]
    r, c, labels = answer_places([rows[i] for i in own], lm.device)
    return states[r, c], labels, [own[n] for n in r.tolist()]


def divergence(lm: LM, before: Tensor) -> Callable[[Tensor, slice], Tensor]:
    """KL(p_before || p_now) [c] nats of logits, as a loss for ``inference.forward.head_loss``.

    Args:
        before: [m, d] states of the model without the change.
    """

    def loss(z: Tensor, rows: slice) -> Tensor:
        p = torch.no_grad()(logits)(lm, before[rows]).log_softmax(-1)
        return (p.exp() * (p - z.log_softmax(-1))).sum(-1)

    return loss


def answer_loss(lm: LM, rows: Sequence[Row], world: World = SINGLE) -> Tensor:
    """Mean cross-entropy over the answer tokens of the rows, nats; the head runs at those positions only.

    Args:
        world: each process has its part of the sum; their sum is the mean.
    """
    states, labels, _ = answer_states(lm, rows, world)
    return nll(lm, states, labels).sum() / sum(len(row.ids) - row.target for row in rows)
