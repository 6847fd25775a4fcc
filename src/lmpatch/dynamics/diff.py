"""What one model loses beside another, or with a patch beside without, token by token on the same text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInput
from .audit import Config as AuditConfig
from .audit import Interval, bucketed, draw_point, drawing, drawn, intervals, span_label, statistics, too_few
from .counts import Counts, own_counts
from .losses import Losses

PAYING = 20  # kinds of tokens that are listed


@dataclass(frozen=True)
class Config(AuditConfig):
    """How two runs are compared, and what the gate allows."""

    tau: float = 0.02
    """Nats by which a bucket may lose, and the balanced loss."""
    times: float = 2.0
    """How many times the move of the mean loss the balanced loss may move."""


@dataclass(frozen=True)
class Moved:
    """How far one number moved, B less A."""

    name: str
    types: int
    tokens: int
    value: float
    interval: Interval | None
    few: bool = False


@dataclass(frozen=True)
class Payer:
    """A kind of token that pays: positions times mean loss is among the largest."""

    token: int
    written: str
    tokens: int
    value: float
    """Mean move of its loss, nats."""


@dataclass(frozen=True)
class Diff:
    """What ``compare`` found."""

    a: Losses
    b: Losses
    counts: Counts
    config: Config
    mean: Moved
    balanced: Moved
    apart: Interval | None
    """95 % of the balanced loss's move less ``times`` the mean loss's."""
    buckets: tuple[Moved, ...]
    payers: tuple[Payer, ...]

    @property
    def failures(self) -> list[str]:
        """What the gate refuses, in words; nothing where it lets pass."""
        found = [
            f"tokens counted {b.name}: loss rises by at least {b.interval[0]:.3f} nats ({self.config.tau} allowed)"
            for b in self.buckets
            if b.interval and not b.few and b.interval[0] > self.config.tau
        ]
        if self.apart and self.apart[0] > 0 and self.balanced.value > self.config.tau:
            found.append(
                f"the balanced loss moves by {self.balanced.value:+.3f} nats, the mean by {self.mean.value:+.3f}: more "
                f"than {self.config.times:g} times as far"
            )
        return found

    def table(self) -> tuple[list[str], list[tuple[object, ...]]]:
        """Column names, and a row for both means and each bucket."""
        rows = [self.mean, self.balanced, *self.buckets]
        return ["count", "kinds", "tokens", "moved", "95 %"], [
            (
                row.name + (" (few)" if row.few else ""), row.types, row.tokens, f"{row.value:+.4f}",
                f"{row.interval[0]:+.4f} to {row.interval[1]:+.4f}" if row.interval else "",
            )
            for row in rows
        ]  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "a": [self.a.model, *self.a.patches], "b": [self.b.model, *self.b.patches],
            "counted_in": self.counts.source,
            "config": asdict(self.config), "mean": asdict(self.mean), "balanced": asdict(self.balanced),
            "buckets": [asdict(bucket) for bucket in self.buckets],
            "payers": [asdict(payer) for payer in self.payers], "failures": self.failures,
        }  # fmt: skip

    def plot(self, path: str | Path) -> None:
        """Write a PNG: how far each bucket moved, with intervals."""
        axes, save = drawing(path)
        for bucket in self.buckets:
            draw_point(axes, bucket.name, bucket.value, bucket.interval, bucket.few)
        axes.axhline(0, color="grey", lw=1)
        axes.axhline(self.mean.value, color="C1", lw=1, label="mean loss")
        axes.axhline(self.balanced.value, color="C3", lw=1, label="balanced loss")
        axes.set(xlabel=f"count of the token in {self.counts.source}", ylabel="nats, B less A")
        save()


def compare(
    a: Losses,
    b: Losses,
    counts: Counts | None = None,
    cfg: Config = Config(),
    *,
    written: Callable[[int], str] = str,
) -> Diff:
    """What B loses beside A, paired by token.

    Args:
        written: how a token is written, from its id.
    Raises:
        BadInput: the two are not of the same text in the same tokens, or of another tokenizer than the counts.
    """
    cfg.check()
    if a.tokenizer != b.tokenizer:
        raise BadInput(
            f"{a.model} and {b.model} have other tokenizers: their tokens cannot be compared one by one. Audit each "
            "alone."
        )
    if a.text != b.text or not torch.equal(a.target, b.target) or not torch.equal(a.document, b.document):
        raise BadInput("the two runs are not of the same text, cut the same way. Audit both with the same settings.")
    counts = counts or own_counts(a)
    counts.check(a)
    of_type, numbers = bucketed(a, counts, cfg)
    n = len(numbers)
    delta = b.nll.double().numpy() - a.nll.double().numpy()
    value = statistics(a, of_type, n, cfg)(delta)
    draws = drawn(a, lambda weights: statistics(a, of_type, n, cfg, weights), cfg, delta)
    ends: Sequence[Interval | None] = intervals(draws) or [None] * len(value)
    apart = None if draws is None else intervals(draws[:, 1:2] - cfg.times * draws[:, :1])
    types, places = a.types
    m = torch.bincount(places, minlength=len(types))
    total = torch.bincount(places, torch.from_numpy(delta), minlength=len(types))
    buckets = []
    for k in range(n):
        inside = of_type == k
        near = counts.n[types[inside]]
        label, kinds, tokens = span_label(int(near.min()), int(near.max())), int(inside.sum()), int(m[inside].sum())
        buckets.append(Moved(label, kinds, tokens, float(value[2 + k]), ends[2 + k], too_few(kinds, tokens)))
    worst = total.sort(descending=True, stable=True).indices[:PAYING].tolist()
    payers = tuple(
        Payer(int(types[i]), written(int(types[i])), int(m[i]), float(total[i] / m[i])) for i in worst if total[i] > 0
    )
    enough = m >= cfg.min_count
    whole = Moved("all tokens", len(types), len(a), float(value[0]), ends[0])
    balanced = Moved("all kinds, balanced", int(enough.sum()), int(m[enough].sum()), float(value[1]), ends[1])
    return Diff(a, b, counts, cfg, whole, balanced, apart[0] if apart else None, tuple(buckets), payers)
