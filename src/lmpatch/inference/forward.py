"""One pass through a model: its blocks, its head, and losses of its logits.

Only the positions asked for go through the head: for Gemma-3-270M one position of the head costs 1.7 times all blocks.
The head works in chunks, so ``[tokens, vocab]`` never exists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from ..models.hooks import Hook, Stop, hooked
from ..models.lm import LM

HEAD_CHUNK = 128  # positions per head call: 128 x 262,144 fp32 logits are 134 MB


@contextmanager
def frozen(lm: LM) -> Iterator[None]:
    """No weight asks for a gradient inside, nor does another thread change one; the flags are as before outside."""
    with lm.lock:
        trainable = [p for p in lm.model.parameters() if p.requires_grad]

        def ask(flag: bool) -> None:
            for p in trainable:
                p.requires_grad_(flag)

        try:
            try:
                ask(False)
                yield
            finally:
                ask(True)
        finally:
            ask(True)  # an interrupt may have stopped the first


@contextmanager
def attention_to_train(lm: LM) -> Iterator[None]:
    """On a CPU the backward pass of PyTorch's fused attention is slow: products and a softmax stand for it inside."""
    before = lm.model.config._attn_implementation
    if lm.device.type != "cpu" or before != "sdpa":
        yield
        return
    try:
        lm.model.set_attn_implementation("eager")
        yield
    finally:
        lm.model.set_attn_implementation(before)


@dataclass(frozen=True)
class Pass:
    """One forward of a padded batch, as a hook sees it: which of its tokens are prompt, and which are answer."""

    mask: Tensor
    """[n, columns] 1 at real tokens; columns in the cache included."""
    width: int
    """t: columns that run now, the last ones."""
    prompt_end: Tensor
    """[n] the column of each row's last prompt token."""
    in_context: Tensor | None = None
    """[n] bool, which rows carry a context; None: no row does."""
    row_state: dict[Any, Tensor | None] = field(default_factory=dict)
    """What hooks know of each row from pass to pass of one batch, by a key of their own: a tensor with an entry a row,
    or None, where nothing is left to do for any row."""
    versions: bool = False
    """The columns that run now are versions of one token, side by side."""
    changes: Mapping[int, Tensor] | None = None
    """See ``interventions.stored_changes``."""

    @property
    def start(self) -> int:
        """The first column that runs now; 0 where the prompt begins."""
        return self.mask.shape[1] - self.width

    def answering(self) -> Tensor:
        """[n, t] True from each row's last prompt token on, where what is read decides the answer. Padding is False."""
        return self.mask[:, self.start :].bool() & (self.columns() >= self.prompt_end[:, None])

    def deciding(self) -> Tensor:
        """[n, t] True at each row's last prompt token, where what is read decides what a patch looks up."""
        return self.mask[:, self.start :].bool() & (self.columns() == self.prompt_end[:, None])

    def decided(self) -> bool:
        """Every row's last prompt token runs now, or has run."""
        return bool((self.prompt_end < self.mask.shape[1]).all())

    def columns(self) -> Tensor:
        """[t] the columns that run now; of versions of one token each its column."""
        columns = torch.arange(self.start, self.mask.shape[1], device=self.mask.device)
        return torch.full_like(columns, self.start) if self.versions else columns


_pass: ContextVar[Pass | None] = ContextVar("lmpatch_pass", default=None)  # each thread has its own


def current_pass() -> Pass | None:
    """The forward that runs, for a hook; None in a call of the model that is not lmpatch's, or has no answer."""
    return _pass.get()


@contextmanager
def during(now: Pass | None) -> Iterator[None]:
    """Hooks see this pass inside the block."""
    before = _pass.get()
    try:
        try:
            _pass.set(now)
            yield
        finally:
            _pass.set(before)
    finally:
        _pass.set(before)  # an interrupt may have stopped the first


def first(output: Any) -> Tensor:
    """A block's hidden states, whether it returns a tensor or a tuple."""
    out: Tensor = output[0] if isinstance(output, tuple) else output
    return out


def positions(mask: Tensor) -> Tensor:
    """Position ids [n, T] that count real tokens only, so padding moves nothing."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def blocks(
    lm: LM,
    ids: Tensor,
    mask: Tensor,
    *,
    position_ids: Tensor,
    cache: Cache | None = None,
    last: int | None = None,
    vectors: Tensor | None = None,
    prompt_end: Tensor | None = None,
    in_context: Tensor | None = None,
    row_state: dict[Any, Tensor | None] | None = None,
    changes: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Run the embedding and blocks 0..last and stop there: no final norm, no head.

    Args:
        ids: [n, t] token ids; -1 - i stands for row i of ``vectors``.
        mask: [n, t] or, with a cache, [n, cached + t].
        last: 0-based block to stop after; None: the last one.
        vectors: [m, d] in the space of the embedding module's output. Gradients flow into them.
        prompt_end, in_context, changes: see ``Pass``; patches that act on the answer, only in a context, or on some
            rows, need them.
        row_state: see ``Pass``; the same for all passes of a batch, with its rows. None: this is the only pass.
    Returns:
        [n, t, d] what block ``last`` hands on.
    """
    kept: list[Tensor] = []

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        if not kept:
            kept.append(first(output))
            raise Stop

    def insert(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        assert vectors is not None
        rows = vectors.to(embedded.dtype)[(-1 - ids).clamp(min=0)]
        return torch.where((ids < 0)[..., None], rows, embedded)  # [n, t, d]

    hooks = [Hook(lm.module(lm.layout.blocks[-1 if last is None else last]), stop)]
    if vectors is not None:
        hooks.append(Hook(lm.module(lm.layout.embed), insert))
    kwargs: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": cache is not None}
    if "position_ids" in inspect.signature(lm.model.forward).parameters:
        kwargs["position_ids"] = position_ids
    known = {} if row_state is None else row_state
    now = None if prompt_end is None else Pass(mask, ids.shape[1], prompt_end, in_context, known, changes=changes)
    with lm.lock, during(now), hooked(*hooks), suppress(Stop):
        lm.model(input_ids=ids.clamp(min=0), **kwargs)
    return kept[0]


def logits(lm: LM, hidden: Tensor) -> Tensor:
    """Logits [..., V] of the states [..., d] after the last block, fp32 or where the model is fp64."""
    with lm.lock:
        for name in lm.layout.tail:
            hidden = lm.module(name)(hidden)
    return capped(lm, hidden if hidden.dtype == torch.float64 else hidden.float())


@dataclass(frozen=True)
class ShortHead:
    """The head for some tokens, and one more class for all others. Their summed probability is known where the short
    head was made, and taken to stay in proportion to it: exact there, and near it little is lost."""

    lm: LM
    tokens: Tensor
    """[k] sorted ids."""
    weight: Tensor
    """[k, d] their rows of the head, and ``bias`` [k]."""
    bias: Tensor | None
    others: Tensor
    """[n] for each state it was made for: log of the summed exp of the other tokens' logits."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[c, k] of states [c, d] after the last block, fp32."""
        with self.lm.lock:
            for name in self.lm.layout.tail[:-1]:
                hidden = self.lm.module(name)(hidden)
        z = F.linear(hidden, self.weight, self.bias)
        return capped(self.lm, z if z.dtype == torch.float64 else z.float())


@torch.no_grad()
def short_head(lm: LM, hidden: Tensor, count: int, always: Tensor) -> ShortHead | None:
    """The head for the ``count`` tokens that are likeliest in any of the states [n, d], and those of ``always``.

    None where there are no more, or where the head is no plain projection, or a patch acts on it by a hook.
    """
    head = lm.module(lm.layout.tail[-1])
    if not isinstance(head, nn.Linear) or type(head) is not nn.Linear:
        return None
    if head._forward_hooks or head._forward_pre_hooks or count + len(always) >= lm.layout.vocab:
        return None
    best, whole = torch.full((lm.layout.vocab,), -torch.inf, device=hidden.device), []
    for part in hidden.split(HEAD_CHUNK):
        z = logits(lm, part)
        whole.append(z.logsumexp(-1))
        best = torch.maximum(best, (z - whole[-1][:, None]).amax(0))
    tokens = torch.cat([best.topk(count).indices, always]).unique()
    bias = None if head.bias is None else head.bias[tokens]
    short = ShortHead(lm, tokens, head.weight[tokens], bias, hidden.new_zeros(0))
    known = torch.cat([short.logits(part).logsumexp(-1) for part in hidden.split(HEAD_CHUNK)])
    total = torch.cat(whole)
    others = total + torch.log1p(-(known - total).exp().clamp(max=1 - 1e-6))
    return replace(short, others=others)


def capped(lm: LM, z: Tensor) -> Tensor:
    """Logits with the model's soft-cap, where it has one."""
    cap = lm.layout.softcap
    return cap * torch.tanh(z / cap) if cap else z


class _ChunkedLoss(torch.autograd.Function):
    """A loss whose gradient is taken in the forward pass, chunk by chunk; checkpointing would run the head twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, loss: Callable[[Tensor, slice], Tensor], head: Callable[[Tensor], Tensor], chunk: int
    ) -> Tensor:
        values, grads = [], []
        for start in range(0, max(1, len(hidden)), chunk):
            rows = slice(start, start + chunk)
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_()
                value = loss(head(part), rows)  # [c]
                (grad,) = torch.autograd.grad(value.sum(), part)
            values.append(value.detach())
            grads.append(grad)
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        return (grad[:, None] * saved).to(saved.dtype), None, None, None


def head_loss(
    lm: LM, hidden: Tensor, loss: Callable[[Tensor, slice], Tensor], *, chunk: int = HEAD_CHUNK,
    short: ShortHead | None = None,
) -> Tensor:  # fmt: skip
    """A loss [n] fp32 of each row's logits, differentiable in ``hidden`` [n, d]; [n, V] never exists.

    Args:
        loss: called with the logits [c, V] of some rows and the slice they are; gives [c].
        short: gives [c, k] instead.
    """
    head = short.logits if short else partial(logits, lm)
    out: Tensor = _ChunkedLoss.apply(hidden, loss, head, chunk)  # type: ignore[no-untyped-call]
    return out


def nll(lm: LM, hidden: Tensor, labels: Tensor, *, chunk: int = HEAD_CHUNK) -> Tensor:
    """-log p(label) at each row, [n] nats, differentiable in ``hidden`` [n, d].

    Args:
        labels: [n] token ids.
    """

    def loss(z: Tensor, rows: slice) -> Tensor:
        return F.cross_entropy(z, labels[rows], reduction="none")

    return head_loss(lm, hidden, loss, chunk=chunk)
