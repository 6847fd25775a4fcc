"""Probe forwards: run a model on a few tokens while watching, or changing, what its modules return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import Hook, Stop, hooked

SENTENCE = "The quick brown fox jumps over the lazy dog and runs away."
LENGTH = 5

Change = Callable[[Tensor], "Tensor | None"]
"""Receives what a module returned, [1, T, width]; returns its replacement, or None to leave it."""


@dataclass(frozen=True)
class Call:
    """One call of one module during a probe forward."""

    name: str
    d_in: int
    d_out: int
    projection: bool
    leaf: bool
    same_input: bool
    """A projection that read the same values as the projection called just before it."""


def probe_ids(model: Any, tokenizer: Any) -> Tensor:
    """``LENGTH`` token ids, [1, T], on the embedding's device; without a tokenizer spread over the vocabulary."""
    embedding = model.get_input_embeddings()
    if tokenizer is not None:
        ids = tokenizer(SENTENCE)["input_ids"][:LENGTH]
    else:
        ids = torch.linspace(3, embedding.num_embeddings - 1, LENGTH).long().tolist()
    return torch.tensor([ids], device=embedding.weight.device)


def first_tensor(value: Any) -> Tensor | None:
    """The hidden state in what a module takes or returns: itself, or the first tensor of a tuple."""
    values = value if isinstance(value, tuple | list) else [value]
    return next((v for v in values if isinstance(v, Tensor)), None)


@torch.no_grad()
def forward(model: Any, ids: Tensor, changes: Mapping[str, Change] | None = None, stop: str | None = None) -> Any:
    """Run the model on ``ids``; returns the logits [1, T, vocab], or None when stopped after module ``stop``."""

    def changing(change: Change) -> Callable[..., Any]:
        def run(module: nn.Module, args: Any, output: Any) -> Any:
            state = first_tensor(output)
            new = None if state is None else change(state)
            return new if new is None or isinstance(output, Tensor) else (new, *output[1:])

        return run

    def end(*_: Any) -> None:
        raise Stop

    hooks = [Hook(model.get_submodule(name), changing(change)) for name, change in (changes or {}).items()]
    if stop is not None:
        hooks.append(Hook(model.get_submodule(stop), end))
    with hooked(*hooks), suppress(Stop):
        return model(input_ids=ids, use_cache=False).logits
    return None


@torch.no_grad()
def trace(model: Any, ids: Tensor) -> list[Call]:
    """Every module call of one forward, in the order in which the calls ended."""
    calls: list[Call] = []
    previous: list[Tensor | None] = [None]

    def width(state: Tensor | None) -> int:
        return state.shape[-1] if state is not None and state.ndim else 0

    def watching(name: str, projection: bool, leaf: bool) -> Callable[..., None]:
        def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entered, left, same = first_tensor((*args, *kwargs.values())), first_tensor(output), False
            if projection:
                before, previous[0] = previous[0], entered
                if before is not None and entered is not None:
                    near = before.shape == entered.shape and before.device == entered.device
                    same = before is entered or (near and torch.equal(before, entered))
            calls.append(Call(name, width(entered), width(left), projection, leaf, same))

        return run

    hooks = [
        Hook(module, watching(name, is_projection(module), next(module.children(), None) is None), kwargs=True)
        for name, module in model.named_modules()
    ]
    with hooked(*hooks):
        model(input_ids=ids, use_cache=False)
    return calls


def is_projection(module: nn.Module) -> bool:
    """Linear, Conv1D, or a quantised linear of any kind (those keep ``out_features``; only Conv1D counts by ``nf``)."""
    return hasattr(module, "out_features") or hasattr(module, "nf")


def mixes_tokens(model: Any, ids: Tensor, sources: Sequence[str], target: str) -> bool:
    """Does what ``sources`` return at the last token but one reach ``target`` at the last token?"""
    seen: list[Tensor] = []

    def push(state: Tensor) -> Tensor:
        state = state.clone()
        state[..., -2, :] *= -2  # [1, T, width], or [T, width] where a model flattens the batch
        return state

    def keep(state: Tensor) -> None:
        seen.append(state[..., -1, :].float())

    for pushed in ((), sources):
        forward(model, ids, {**dict.fromkeys(pushed, push), target: keep}, stop=target)
    return not torch.allclose(seen[0], seen[1], rtol=1e-2, atol=1e-3 * float(seen[0].norm()))


def post_norm(model: Any, ids: Tensor, block: str, down: str) -> bool:
    """Is the block's output deaf to the size of what the down-projection returns? Only a norm makes it so."""
    outputs: list[Tensor] = []
    forward(model, ids, {block: outputs.append}, stop=block)
    size = float(outputs[0].float().square().mean().sqrt())
    small, large = 8 * size, 128 * size
    for scale in (small, large):

        def resize(y: Tensor, scale: float = scale) -> Tensor:
            return y * (scale / y.float().square().mean(-1, keepdim=True).sqrt()).to(y.dtype)

        forward(model, ids, {down: resize, block: outputs.append}, stop=block)
    moved = (outputs[2].float() - outputs[1].float()).square().mean().sqrt()
    return float(moved) < 0.05 * (large - small)


@torch.no_grad()
def embed_scale(model: Any, ids: Tensor, embed: str, block: str) -> float:
    """Differences between two rows of tokens, so that position embeddings cancel."""
    other = ids.roll(1, dims=1)
    weight = model.get_submodule(embed).weight
    rows = nn.functional.embedding(ids, weight) - nn.functional.embedding(other, weight)  # [1, T, d]
    states: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    with hooked(Hook(model.get_submodule(block), take, before=True, kwargs=True)):
        for tokens in (ids, other):
            forward(model, tokens, stop=block)
    ratio = float((states[0] - states[1]).float().norm() / rows.float().norm())
    ratio *= (rows.shape[-1] / states[0].shape[-1]) ** 0.5  # norms to RMS, where a projection changes the width
    return 1.0 if abs(ratio - 1.0) < 1e-2 else ratio
