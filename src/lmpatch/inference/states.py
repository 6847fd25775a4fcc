"""Hidden states at the last token of a prompt, and what they say about the next one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BadInput
from ..models.lm import LM
from ..progress import Progress
from .forward import HEAD_CHUNK, blocks, logits, positions
from .interventions import Prompt, Streams, in_context, interventions, stored_changes, streams
from .tokens import Row, each_once, padded


@torch.no_grad()
def hidden(lm: LM, prompts: Sequence[Prompt], *, batch_size: int = 64, progress: Progress | None = None) -> Tensor:
    """The state [n, d] fp32 after the last block, before the final norm, at each prompt's last token.

    Raises:
        BadInput: a decode patch is on the model, which changes no state; ``next_logits`` shows it.
    """
    if any(intervention.rules for intervention in interventions(lm)):
        raise BadInput("a decode patch combines logits, and states do not show it. Call next_logits, or take it off.")
    return last_states(lm, streams(lm, prompts), batch_size=batch_size, progress=progress)[0]


def last_states(lm: LM, inputs: Streams, *, batch_size: int = 64, progress: Progress | None = None) -> Tensor:
    """The state after the last block at the last token of every row, [streams, n, d] fp32."""
    rows = [pair[s] for s in range(inputs.width) for pair in inputs.rows]
    done: dict[Row, Tensor] = {}
    for batch in each_once(rows, lambda row: len(row.ids), batch_size, progress, "reading states"):
        ids, mask = padded(lm, [row.ids for row in batch], side="left")
        ends, at = torch.full((len(batch),), ids.shape[1] - 1, device=lm.device), positions(mask)
        states = blocks(
            lm, ids, mask, position_ids=at, vectors=inputs.vectors, prompt_end=ends, in_context=in_context(lm, batch),
            changes=stored_changes(lm, batch),
        )  # fmt: skip
        done.update(zip(batch, states[:, -1].float(), strict=True))
    return torch.stack([done[row] for row in rows]).view(inputs.width, len(inputs.rows), -1)


@torch.no_grad()
def next_kl(lm: LM, base_hidden: Tensor, now_hidden: Tensor, *, chunk: int = HEAD_CHUNK // 2) -> Tensor:
    """KL(p_base || p_now), [n] nats, of next-token distributions from states: 2.5 kB a prompt instead of 1 MB.

    Args:
        base_hidden: [n, d] from ``hidden`` on the model before the change.
        now_hidden: the same on the changed model, whose head must be as before.
    """
    out = []
    for a, b in zip(base_hidden.split(chunk), now_hidden.split(chunk), strict=True):
        p, q = (logits(lm, h.to(lm.dtype)).log_softmax(-1) for h in (a, b))
        out.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(out)
