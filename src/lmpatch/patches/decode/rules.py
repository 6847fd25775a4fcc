"""The rules of context-aware decoding: what a model says with a context, weighed against what it says without.

Most are of the power family, log p = τ log p_context + (1 - τ) log p_bare (up to a constant): τ = 0 is the answer from
memory, 1 the answer with the context, between them is a mixture, and above 1 the context counts more than it did.
They differ in where τ comes from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.special import entr

from ...errors import BadInput
from ...inference.interventions import Rule


def mixed(with_context: Tensor, without_context: Tensor, tau: Tensor | float) -> Tensor:
    """The power family, written over ``with_context``. To normalise it would shift the logits of all tokens alike."""
    return with_context.lerp_(without_context, 1 - tau)  # τ = 1 gives back every bit


def divergence(with_context: Tensor, without_context: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the two next-token distributions, [n, 1] nats in 0..ln 2."""
    p, q = with_context.softmax(-1), without_context.softmax(-1)
    return (_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2).clamp(0, math.log(2))


def _entropy(p: Tensor) -> Tensor:
    """In nats, [n, 1]."""
    out: Tensor = entr(p).sum(-1, keepdim=True)
    return out


@dataclass(frozen=True)
class Power(Rule):
    """A fixed τ. CAD (arXiv:2305.14739) of strength s is τ = 1 + s."""

    tau: float = 0.5
    """p = p_context^tau p_without^(1 - tau), normalised: 0 is the answer from memory, 1 the answer with the context,
    above 1 is CAD with a strength of tau - 1. The paper tries 0.25, 0.5 and 0.75."""

    pointwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _need(math.isfinite(self.tau), "tau", self.tau, "a finite number; 1 is the model with its context")

    def combine(self, with_context: Tensor, without_context: Tensor, state: Tensor) -> Tensor:
        return mixed(with_context, without_context, self.tau)


@dataclass(frozen=True)
class AdaCAD(Rule):
    """τ = 1 + the divergence of the two distributions in nats: little changes where they agree (arXiv:2409.07394)."""

    floor: float = 0.0
    """The strength is at least this. The default is the paper's for questions; long answers take 0.3."""

    def __post_init__(self) -> None:
        _need(0 <= self.floor < math.inf, "floor", self.floor, "a number from 0")

    def combine(self, with_context: Tensor, without_context: Tensor, state: Tensor) -> Tensor:
        return mixed(with_context, without_context, 1 + divergence(with_context, without_context).clamp(min=self.floor))


@dataclass(frozen=True)
class Arr(Rule):
    """τ = 1 ± the divergence in units of ln 2; plus where the model is surer with the context (arXiv:2606.10298)."""

    def combine(self, with_context: Tensor, without_context: Tensor, state: Tensor) -> Tensor:
        share = divergence(with_context, without_context) / math.log(2)  # [n, 1]
        surer = _log_top(with_context) > _log_top(without_context)
        return mixed(with_context, without_context, 1 + torch.where(surer, share, -share))


def _log_top(z: Tensor) -> Tensor:
    """Log probability of the first choice, [n, 1]."""
    return z.amax(-1, keepdim=True) - z.logsumexp(-1, keepdim=True)


UNDECIDED, CONTEXT, PRIOR = 0, 1, 2  # whom ``Grd`` trusts in an answer


@dataclass(frozen=True)
class Grd(Rule):
    """Trusts the context or the model for a whole answer, from the first token on which they differ (arXiv:2606.10298).

    The model is trusted if without context it is sure of its token and surer than with the context. Then every
    disagreement is decided for it: τ = (1 - lam) τ*, where τ* is the mixture in which both tokens are equally likely.
    """

    lam: float = 0.75
    """λ: where the model is trusted, 0 leaves the two tokens even, 1 takes the model's own distribution. Default:
    released."""
    gate: Literal["full", "confidence", "entropy"] = "full"
    """What makes the model trusted: p(its token) > 0.5 without context, a lower entropy than with it, or both."""

    def __post_init__(self) -> None:
        _need(0 <= self.lam <= 1, "lam", self.lam, "a number in 0..1")
        known = self.gate in ("full", "confidence", "entropy")
        _need(known, "gate", self.gate, "one of full, confidence, entropy")

    def combine(self, with_context: Tensor, without_context: Tensor, state: Tensor) -> Tensor:
        ours, theirs = with_context.argmax(-1, keepdim=True), without_context.argmax(-1, keepdim=True)  # [n, 1]
        differ = ours != theirs
        sure = _log_top(without_context) > math.log(0.5)  # [n, 1]
        surer = _entropy(without_context.softmax(-1)) < _entropy(with_context.softmax(-1))
        trusts = {"confidence": sure, "entropy": surer, "full": surer & sure}[self.gate]
        fresh = differ & (state == UNDECIDED)[:, None]
        state.copy_(torch.where(fresh, torch.where(trusts, PRIOR, CONTEXT), state[:, None])[:, 0])
        for_context = with_context.gather(-1, ours) - with_context.gather(-1, theirs)
        for_prior = without_context.gather(-1, theirs) - without_context.gather(-1, ours)
        even = for_prior / (for_context + for_prior).clamp(min=torch.finfo(with_context.dtype).tiny)  # τ*
        tau = torch.where(differ & (state == PRIOR)[:, None], (1 - self.lam) * even, 1.0)
        return mixed(with_context, without_context, tau)


@dataclass(frozen=True)
class Coiecd(Rule):
    """Log p_context for tokens near the context's first choice, log p_bare for the rest, both plus ``alpha`` times
    their difference (arXiv:2402.11893).

    The paper compares a token's information with the entropy without context. That entropy is the same for every token
    and cancels: what is left is p_context > its maximum / ratio, unless the first choice alone is above that.
    """

    alpha: float = 1.0
    """How often log p with context minus log p without is added to every token. Defaults: released."""
    ratio: float = 4.0
    """Tokens within this factor of the context's first choice are near, unless the first choice is alone."""
    tail: bool = False
    """As released, tokens below ``ratio`` times the smallest probability count as near, too."""

    def __post_init__(self) -> None:
        _need(math.isfinite(self.alpha), "alpha", self.alpha, "a finite number")
        _need(1 <= self.ratio < math.inf, "ratio", self.ratio, "a number from 1")

    def combine(self, with_context: Tensor, without_context: Tensor, state: Tensor) -> Tensor:
        with_context, without_context = with_context.log_softmax(-1), without_context.log_softmax(-1)
        near = with_context > with_context.amax(-1, keepdim=True) - math.log(self.ratio)
        near &= near.sum(-1, keepdim=True) > 1
        if self.tail:
            near |= with_context < with_context.amin(-1, keepdim=True) + math.log(self.ratio)
        return torch.where(near, with_context, without_context) + self.alpha * (with_context - without_context)


def _need(good: bool, name: str, value: object, what: str) -> None:
    if not good:
        raise BadInput(f"{name} is {value!r}. Give {what}.")
