"""Prompts that have nothing to do with any edit, and what a module reads where they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..inference.forward import Pass, blocks, current_pass, positions
from ..inference.interventions import need_window
from ..inference.tokens import Row, batches_of_rows, encode_all, padded
from ..models.hooks import Hook, hooked
from ..models.lm import LM
from ..patches.hook.operation import by_row
from ..patches.ledger import suspended
from ..progress import Progress
from .samples import own_rows

LENGTHS = (6, 9, 13, 18, 24)  # tokens of the prompts that are cut from samples, in turn
PER_WIDTH = 10  # sampled tokens over the largest MLP width: so many come with lmpatch for the packaged models
BATCH = 32  # prompts per forward


def unrelated(
    lm: LM, count: int, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> list[Row]:  # fmt: skip
    """So many prompts at most, each once.

    Args:
        text: prompts, taken as they stand. None: pieces of the model's own samples (temperature 1).
    Raises:
        BadInput: the text gives fewer than two different prompts, or one that is longer than the model's window.
    """
    texts = list(dict.fromkeys(t for t in text if t.strip())) if text is not None else _pieces(lm, count, progress)
    rows = encode_all(lm, texts[:count])
    if len(rows) < 2:
        raise BadInput(f"the text gives {len(rows)} prompts. Give at least two that have nothing to do with the edits.")
    need_window(lm, [row.ids for row in rows])
    return rows


def _pieces(lm: LM, count: int, progress: Progress | None) -> list[str]:
    with suspended(lm):  # what the model writes does not depend on its patches
        rows = own_rows(lm, PER_WIDTH * max(lm.layout.widths), 0, progress=progress)
    texts: dict[str, None] = {}
    for row in rows[:, 1:].tolist():  # without the start token
        start = 0
        while start < len(row) and len(texts) < count:
            length = LENGTHS[len(texts) % len(LENGTHS)]
            piece = lm.tokenizer.decode(row[start : start + length], skip_special_tokens=True).strip()
            if piece:
                texts[piece] = None
            start += length
    return list(texts)


@torch.no_grad()
def inputs(
    lm: LM, rows: Sequence[Row], layer: int, module: str, read: Callable[[Tensor, Pass], Iterable[Tensor]]
) -> list[Tensor]:  # fmt: skip
    """What a module of block ``layer`` reads in each row's prompt; patches on the model act.

    Args:
        read: gives of a batch [n, t, width] and its pass one tensor for each row.
    """
    found: dict[int, Tensor] = {}
    seen: list[Tensor] = []

    def see(_: Any, args: tuple[Tensor, ...]) -> None:
        now = current_pass()
        assert now is not None
        seen.extend(read(by_row(args[0], now), now))

    prompts = [row.ids[: row.target] for row in rows]
    with hooked(Hook(lm.module(module), see, before=True)):
        for batch in batches_of_rows([len(ids) for ids in prompts], BATCH):
            ids, mask = padded(lm, [prompts[i] for i in batch], side="left")
            ends = torch.full((len(batch),), ids.shape[1] - 1, device=lm.device)
            seen.clear()
            blocks(lm, ids, mask, position_ids=positions(mask), last=layer, prompt_end=ends)
            found.update(zip(batch, seen, strict=True))
    return [found[i] for i in range(len(rows))]


def at_end(x: Tensor, now: Pass) -> Iterable[Tensor]:
    """[width] fp32 of each row: what is read at its last prompt token."""
    return x[now.deciding()].float().unbind()


def at_each(x: Tensor, now: Pass) -> Iterable[Tensor]:
    """[tokens, width] fp32 of each row: what is read at its tokens but the first, where models put what goes nowhere
    else."""
    real = now.mask[:, now.start :].bool()
    return [row[here & (here.cumsum(0) > 1)].float() for row, here in zip(x, real, strict=True)]
