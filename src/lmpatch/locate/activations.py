"""What methods that look at MLP activations share: where they are, and a pass that shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UnknownLayout
from ..inference.forward import blocks, first, positions
from ..inference.tokens import Row, padded
from ..models.calls import probe_ids, trace
from ..models.hooks import Hook, hooked
from ..models.lm import LM

BATCH = 16  # texts per forward


def activations(lm: LM) -> list[str]:
    """Each block's activation module: the first of the MLP's width between the up- and the down-projection.

    Raises:
        UnknownLayout: there is none.
    """
    layout, calls = lm.layout, trace(lm.model, probe_ids(lm.model, lm.tokenizer))
    order = [call.name for call in calls]
    found = []
    for ups, down, width in zip(layout.ups, layout.downs, layout.widths, strict=True):
        between = calls[min(order.index(up) for up in ups) + 1 : order.index(down)]
        names = [c.name for c in between if c.leaf and not c.projection and c.d_in == c.d_out == width]
        if not names:
            raise UnknownLayout(
                f"no module between {', '.join(ups)} and {down} is the MLP's activation, so what is on cannot be seen. "
                "Name the layers instead: layers=..."
            )
        found.append(names[0])  # a dropout may follow it
    return found


@torch.no_grad()
def watch(lm: LM, rows: Sequence[Row], see: Callable[[int, slice, Tensor, Tensor], None]) -> None:
    """Run the rows and show the activations of every block, before any product with the other branch of a gated MLP.

    Args:
        see: called for each block and batch with the block, which rows these are, their activations [n, T, f], and
            where there are tokens [n, T] bool; the rest is padding on the right.
    Raises:
        UnknownLayout: see ``activations``.
    """
    names = activations(lm)
    for start in range(0, len(rows), BATCH):
        part = slice(start, min(start + BATCH, len(rows)))
        ids, mask = padded(lm, [row.ids for row in rows[part]], side="right")
        real = mask.bool()

        def hook(layer: int, _: Any, __: Any, output: Any, part: slice = part, real: Tensor = real) -> None:
            see(layer, part, first(output).reshape(*real.shape, -1), real)

        with hooked(*(Hook(lm.module(name), partial(hook, i)) for i, name in enumerate(names))):
            blocks(lm, ids, mask, position_ids=positions(mask))
