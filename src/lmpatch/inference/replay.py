"""Replay: run a batch once, then recompute only what a change can reach.

A change at block ``l``, token ``t`` can alter nothing below ``l`` and nothing before ``t``. ``record`` runs a batch
once and keeps, for each row, the keys and values of the tokens before ``t``, the hidden states entering every
block from ``t`` on, and the arguments each block was called with. ``Recording.forward`` then calls the blocks
themselves with those arguments, from any block, on any rows, with gradients where asked. Nothing about a
particular architecture is known here: masks, rotary tables and caches come from the model's own forward.

Rows are laid out so that every row's ``t`` falls in the same column::

    column      0 ........ P-1 | P          P+1 ...
    row 0       pad pad a  b   | t          c   d
    row 1       pad e   f  g   | t          h   pad
                prefix: K/V    | suffix: hidden states

Column 0 is padding in every row. A mask therefore always exists: without any padding transformers passes
``None`` and lets the attention kernel assume a causal square, which a suffix is not. The prefix runs in pieces, so that
no mask has the size T x T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ..models.hooks import Hook, hooked
from ..models.lm import LM
from .forward import Pass, blocks, during, first, positions
from .tokens import padded

PIECE = 1024  # columns of the prefix that run at once


class _Prefix(DynamicLayer):
    """Keys and values of the prefix. ``update`` returns prefix + new and stores nothing, so calls repeat."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values  # [n, heads, P, head_dim]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


@dataclass(frozen=True)
class Recording:
    """What one clean pass leaves behind. Made by ``record``."""

    lm: LM
    prefix: int
    """P: columns before the suffix, padding included."""
    hidden: dict[int, Tensor]
    """Block index → [n, S, d] entering that block; the highest index: leaving the last one that ran."""
    keys: dict[int, Tensor]
    """Block index → [n, width] input of the down-projection at column t."""
    values: dict[int, Tensor]
    """Block index → [n, d] output of the down-projection at column t."""
    past: dict[int, tuple[Tensor, Tensor]]
    """Block index → keys and values [n, heads, P, head_dim] of the prefix."""
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
    """Block index → the arguments the model called it with."""
    mask: Tensor
    """[n, P + S] 1 at real tokens."""
    prompt_end: Tensor | None
    """[n] the column of each row's last prompt token, if ``record`` got it."""
    in_context: Tensor | None = None
    """[n] bool, which rows carry a context; None: no row does."""
    row_state: dict[Any, Tensor | None] = field(default_factory=dict)
    """What patches know of each row behind the prefix; see ``Pass``."""

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.mask)

    @property
    def suffix(self) -> int:
        """S: columns from t on, padding included."""
        return self.mask.shape[1] - self.prefix

    def bare(self) -> Recording:
        """Without the states, for a caller that keeps those it starts from."""
        return replace(self, hidden={}, keys={}, values={})

    def select(self, rows: Tensor) -> Recording:
        """The same recording for these rows only, in this order; a row may repeat."""
        names = ("hidden", "keys", "values", "past", "calls", "mask")
        known = dict(zip(("prompt_end", "in_context", "row_state"), _picked(rows, *self._known()), strict=True))
        return replace(self, **known, **{name: _rows(getattr(self, name), rows, self.n) for name in names})

    def _known(self) -> tuple[Any, ...]:
        """What patches are told of the rows."""
        return self.prompt_end, self.in_context, self.row_state

    def forward(self, hidden: Tensor, layer: int, *, rows: Tensor | None = None, end: int | None = None) -> Tensor:
        """Run blocks ``layer`` .. ``end``-1 on the suffix.

        Args:
            hidden: [r, s, d] entering block ``layer``: the first s suffix columns (usually all S).
            rows: [r] which recorded row each of them continues; None: all, in order.
            end: None: through the last block.
        Returns:
            [r, s, d] leaving block ``end``-1.
        """
        width = hidden.shape[1]
        mask = self.mask[:, : self.prefix + width]
        known = self._known()
        if rows is not None:
            mask, known = mask[rows], _picked(rows, *known)
        for i in range(layer, self.lm.layout.n_layers if end is None else end):
            call, past = self.calls[i], self.past[i]
            if rows is not None:
                call, past = _rows((call, past), rows, self.n)
            if width < self.suffix:
                call = _columns(call, width, self.suffix, self.prefix)
            hidden = self._call(i, hidden, call, past, mask, *known)
        return hidden

    def fan(self, hidden: Tensor, layer: int, *, end: int | None = None) -> Tensor:
        """Run blocks ``layer`` .. ``end``-1 on many versions of token t at once. The suffix must be that token alone.

        Each version sees the prefix and itself. They stand side by side as columns of one suffix, so the prefix's
        keys and values are shared; as rows, each would need a copy of them.

        Args:
            hidden: [n, v, d] for each recorded row v versions of what enters block ``layer``.
        Returns:
            [n, v, d] leaving block ``end``-1.
        """
        assert self.suffix == 1, "only versions of a last token can stand side by side"
        versions = hidden.shape[1]
        mask = F.pad(self.mask[:, : self.prefix], (0, versions), value=1)
        for i in range(layer, self.lm.layout.n_layers if end is None else end):
            call = _fanned(self.calls[i], versions)
            hidden = self._call(i, hidden, call, self.past[i], mask, *self._known(), versions=True)
        return hidden

    def _call(
        self, layer: int, hidden: Tensor, call: Any, past: Any, mask: Tensor, *known: Any, versions: bool = False
    ) -> Tensor:
        """One block, called as it was; patches on the model see the pass that ``mask`` and ``ends`` say."""
        layers: list[Any] = [_Prefix(*past)] * (layer + 1)  # blocks look themselves up by their index
        args, kwargs = _map(_with_cache(call, Cache(layers=layers)), _flat)
        end, has, row_state = known
        now = None if end is None else Pass(mask, hidden.shape[1], end, has, dict(row_state), versions)
        with self.lm.lock, during(now):
            return first(self.lm.module(self.lm.layout.blocks[layer])(hidden, *args, **kwargs))


@torch.no_grad()
def record(
    lm: LM, rows: Sequence[Sequence[int]], at: Sequence[int], *, ends: Sequence[int] | None = None,
    in_context: Tensor | None = None, lowest: int = 0, last: int | None = None,
) -> Recording:  # fmt: skip
    """Run the rows once and keep what later replays need.

    Args:
        rows: token ids, one list a row.
        at: for each row the index t of the first token that a change can reach.
        ends: for each row the index of the last prompt token, for patches on the model that act on the answer.
        in_context: [n] bool, which rows carry a context, for patches that act only there; ``ends`` is then needed.
        lowest: the lowest block a replay will start at; states below it are not kept.
        last: the highest block a replay will run; None: the last one.
    Returns:
        a ``Recording`` whose suffix column 0 is token t of every row.
    """
    before = padded(lm, [row[:t] for row, t in zip(rows, at, strict=True)], side="left")
    behind = padded(lm, [row[t:] for row, t in zip(rows, at, strict=True)], side="right")
    ids, mask = (F.pad(torch.cat(parts, 1), (1, 0)) for parts in zip(before, behind, strict=True))  # [n, P + S]
    prefix = max(at) + 1
    place = positions(mask)
    prompt_end = None
    if ends is not None:
        prompt_end = torch.tensor([prefix - t + end for t, end in zip(at, ends, strict=True)], device=lm.device)
    cache = DynamicCache()  # every layer keeps all columns: sliding windows are the mask's business here
    top = lm.layout.n_layers - 1 if last is None else last
    row_state: dict[Any, Tensor | None] = {}
    run: Any = partial(
        blocks, lm, cache=cache, prompt_end=prompt_end, in_context=in_context, row_state=row_state, last=top
    )
    for start in range(0, prefix, PIECE):
        end = min(start + PIECE, prefix)
        run(ids[:, start:end], mask[:, :end], position_ids=place[:, start:end])
    before_suffix, layers = dict(row_state), list[Any](cache.layers)
    past = {i: (layer.keys, layer.values) for i, layer in enumerate(layers) if lowest <= i <= top}

    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    hidden: dict[int, Tensor] = {}
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}

    def enter(layer: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "hidden_states" in kwargs:
            args = (kwargs["hidden_states"], *args)
        hidden[layer] = args[0]
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls[layer] = _map(_with_cache((args[1:], others), None), partial(_by_head, len(rows), mask.shape[1]))

    def column(state: Tensor) -> Tensor:
        return state.reshape(len(rows), -1, state.shape[-1])[:, 0]  # some models flatten rows and tokens: [n*S, d]

    def take(layer: int, _: Any, args: tuple[Any, ...]) -> None:
        keys[layer] = column(args[0])

    def watch(layer: int, _: Any, __: Any, output: Any) -> None:
        values[layer] = column(first(output))

    hooks = []
    for i in range(lowest, top + 1):
        block, down = lm.module(lm.layout.blocks[i]), lm.module(lm.layout.downs[i])
        hooks.append(Hook(block, partial(enter, i), before=True, kwargs=True))
        # first: a patch may scale what the projection then reads
        hooks.append(Hook(down, partial(take, i), before=True, first=True))
        hooks.append(Hook(down, partial(watch, i)))
    with lm.lock, hooked(*hooks):
        out = run(ids[:, prefix:], mask, position_ids=place[:, prefix:])
    hidden[top + 1] = out
    return Recording(lm, prefix, hidden, keys, values, past, calls, mask, prompt_end, in_context, before_suffix)


def _picked(rows: Tensor, *each: Any) -> tuple[Any, ...]:
    return tuple(_map(one, lambda v: v[rows]) for one in each)


def _map(value: Any, change: Any) -> Any:
    """Apply ``change`` to every tensor and cache inside tuples, lists and dicts."""
    if isinstance(value, Tensor | Cache):
        return change(value)
    if isinstance(value, dict):
        return {k: _map(v, change) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_map(v, change) for v in value)
    return value


def _with_cache(value: Any, cache: Cache | None) -> Any:
    """Put ``cache`` where a cache stood; a recorded call keeps an empty one as the mark of its place."""
    return _map(value, lambda v: (cache or Cache(layers=[])) if isinstance(v, Cache) else v)


def _by_head(n: int, columns: int, v: Any) -> Any:
    """A bias of each row and head [n * heads, 1, P+S] (ALiBi) as [n, heads, 1, P+S, 1], as nothing else is."""
    alike = isinstance(v, Tensor) and v.dim() == 3 and v.shape[1:] == (1, columns) and len(v) > n and len(v) % n == 0
    return v.unflatten(0, (n, -1))[..., None] if alike else v


def _flat(v: Any) -> Any:
    """What ``_by_head`` found, as the block takes it."""
    return v.flatten(0, 1)[..., 0] if isinstance(v, Tensor) and v.dim() == 5 else v


def _rows(value: Any, rows: Tensor, n: int) -> Any:
    """Narrow what has one entry per row; tensors shared by all rows (first dimension 1) stay."""
    return _map(value, lambda v: v[rows] if isinstance(v, Tensor) and v.dim() > 1 and len(v) == n else v)


def _columns(value: Any, width: int, suffix: int, prefix: int) -> Any:
    """Narrow block arguments to the first ``width`` suffix columns."""

    def cut(v: Any) -> Any:
        if not isinstance(v, Tensor) or v.dim() < 2:
            return v
        if v.dim() == 4:  # attention mask [n, 1, S, P+S]
            return v[:, :, :width, : prefix + width]
        if v.dim() == 5:  # a bias of each head
            return v[..., : prefix + width, :]
        return v[:, :width] if v.shape[1] == suffix else v  # position ids [n, S], rotary tables [n, S, head_dim]

    return _map(value, cut)


def _fanned(value: Any, versions: int) -> Any:
    """Widen the arguments of a block called on one column to that many versions of it."""

    def widen(v: Any) -> Any:
        if not isinstance(v, Tensor) or v.dim() < 2:
            return v
        if v.dim() == 4:  # attention mask [n, 1, 1, P+1]; column 0 is padding, hence what a hidden token looks like
            itself = torch.eye(versions, dtype=torch.bool, device=v.device)
            own = torch.where(itself, v[..., -1:], v[..., :1])  # [n, 1, versions, versions]
            return torch.cat([v[..., :-1].expand(-1, -1, versions, -1), own], -1)
        if v.dim() == 5:  # a bias of each head: all versions stand where the token stood
            return torch.cat([v[..., :-1, :], v[..., -1:, :].expand(-1, -1, -1, versions, -1)], -2)
        return v.expand(-1, versions, *v.shape[2:]) if v.shape[1] == 1 else v  # position ids, rotary tables

    return _map(value, widen)
