"""Losses over the answers of prompts, and the one forward they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..distributed import SINGLE, World
from ..inference.forward import blocks, logits, nll, positions
from ..inference.tokens import Row, pad, pad_id
from ..models.lm import LM


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
    where = [(n, t - 1) for n, i in enumerate(own) for t in range(rows[i].target, len(rows[i].ids))]
    r, c = torch.tensor(where, dtype=torch.int64, device=lm.device).reshape(-1, 2).T
    return states[r, c], ids[r, c + 1], [own[n] for n, _ in where]


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
