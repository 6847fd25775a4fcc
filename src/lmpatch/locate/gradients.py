"""What the gradient of a projection's weight is made of: its inputs, and the gradients at its outputs.

The gradient of a loss with respect to W in y = W x is the sum over tokens of g xᵀ, so one forward and backward over a
fact gives it as factors, and no matrix of the weight's size is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..inference.forward import nll
from ..inference.tokens import Row
from ..models.hooks import Hook, hooked
from ..models.lm import LM
from ..training.losses import answer_places


@dataclass(frozen=True)
class Gradients:
    """Of one projection at N tokens, row after row."""

    row: Tensor
    """[N] which row each token belongs to."""
    inputs: Tensor
    """[N, in] fp32."""
    gradients: Tensor
    """[N, out] fp32, with respect to the outputs, of the row's loss: the mean over its answer tokens, nats."""

    def of(self, rows: Sequence[int]) -> Gradients:
        """Those of these rows alone."""
        at = torch.isin(self.row, torch.tensor(list(rows), device=self.row.device))
        return Gradients(self.row[at], self.inputs[at], self.gradients[at])


ByRow = TypeVar("ByRow", bound=Any)


def joined(parts: Sequence[ByRow]) -> ByRow:
    """Batches put together again, row after row; the first field says which row each entry belongs to."""
    names = [field.name for field in fields(parts[0])]
    order = torch.cat([getattr(part, names[0]) for part in parts]).argsort(stable=True)
    whole: ByRow = type(parts[0])(*(torch.cat([getattr(part, name) for part in parts])[order] for name in names))
    return whole


def read_gradients(
    lm: LM, rows: Sequence[Row], modules: Sequence[str], run: Callable[[], Tensor], *, answers_only: bool = False
) -> dict[str, Gradients]:
    """Inputs and output gradients of projections, from one forward and one backward down to the lowest of them.

    Tokens at which inputs or gradients are zero are left out. So is the start token, whose activations are outliers.

    Args:
        run: gives the states [n, S, d] after the last block of each row's tokens but the last, padded on the right.
            It is called once, with hooks on the modules; no weight of the model may ask for a gradient.
        answers_only: the tokens where an answer token is predicted, and no others.
    """
    row, column, label = answer_places(rows, lm.device)
    share = torch.tensor([1 / (len(r.ids) - r.target) for r in rows], device=lm.device)[row]
    found = traced(lm, modules, lambda: (nll(lm, run()[row, column], label) * share).sum())
    if not answers_only:
        row, column = _tokens(lm, rows)

    def part(inputs: Tensor, gradient: Tensor) -> Gradients:
        x, g = (t.reshape(len(rows), -1, t.shape[-1])[row, column].float() for t in (inputs, gradient))
        used = x.any(1) & g.any(1)
        return Gradients(row[used], x[used], g[used])

    return {name: part(one.inputs, one.gradients) for name, one in found.items()}


@dataclass(frozen=True)
class Traced:
    """What one projection read and returned, and the gradient of the loss there, in the shapes the model has."""

    inputs: Tensor
    outputs: Tensor
    gradients: Tensor


def traced(lm: LM, modules: Sequence[str], loss: Callable[[], Tensor]) -> dict[str, Traced]:
    """One forward and one backward of a loss, down to the lowest of these projections."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def see(name: str, _: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs[name] = args[0].detach()
        outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
        return outputs[name]

    with torch.enable_grad(), hooked(*(Hook(lm.module(name), partial(see, name)) for name in modules)):
        value = loss()
        gradients = torch.autograd.grad(value, [outputs[name] for name in modules])
    return {
        name: Traced(inputs[name], outputs[name].detach(), gradient)
        for name, gradient in zip(modules, gradients, strict=True)
    }


def _tokens(lm: LM, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Row and column of every token that is read, but the start token."""
    start = lm.tokenizer.bos_token_id
    found = [(i, t) for i, row in enumerate(rows) for t in range(len(row.ids) - 1) if t or row.ids[0] != start]
    row, column = torch.tensor(found, dtype=torch.int64, device=lm.device).reshape(-1, 2).T
    return row, column
