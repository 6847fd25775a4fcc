"""Who pays while the mean loss looks fine: losses by how frequent a token is.

Source: "The Fair Language Model Paradox" (arXiv:2410.11985): its balanced loss, a mean over kinds of tokens in place of
a mean over tokens, and its head, the one per cent of kinds that is most frequent.

Differs: intervals are bootstrapped over documents, since tokens of one document depend on each other; a calibration
error and a copy baseline stand beside accuracy, which moves least.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput, MissingExtra
from .counts import Counts, own_counts
from .losses import Losses

BINS = 10  # of equal mass, for the calibration error
FEW_TYPES, FEW_TOKENS = 30, 100  # below them a bucket says little
Interval = tuple[float, float]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Config:
    """How losses become numbers."""

    min_count: int = 5
    """Positions that a kind of token needs to take part in the balanced loss."""
    base: float = 3.0
    """Buckets are powers of it: a token is in bucket floor(log_base n)."""
    draws: int = 200
    """Resamplings of the documents, for intervals of 95 %."""
    seed: int = 0
    """Of the resamplings."""

    def check(self) -> None:
        """Raise ``BadInput`` where a value is out of range."""
        if self.min_count < 1 or self.base <= 1 or self.draws < 0:
            raise BadInput(
                f"min_count is {self.min_count}, base {self.base}, draws {self.draws}. Wanted: at least 1, above 1, at "
                "least 0."
            )


@dataclass(frozen=True)
class Bucket:
    """Tokens that are about equally frequent."""

    low: int
    high: int
    """Counts ``low`` to ``high`` in the frequency source."""
    types: int
    """Kinds of tokens that occur in the text."""
    tokens: int
    """Positions."""
    nll: float
    """Nats, mean over positions."""
    interval: Interval | None
    """95 % of ``nll`` over documents; None for a single document."""
    by_type: float
    """Mean over kinds of tokens of each one's mean loss."""
    excess: float
    """``by_type`` beside that of the unigram model; negative beats it."""
    accuracy: float
    """Share of positions where the token is the first choice."""
    calibration: float
    """Mean distance of confidence and accuracy, over ten bins of equal mass."""
    rank: float
    """Median of how many tokens are held likelier."""
    seen: float
    """Share of positions whose token stands earlier in the piece: what copying could know."""

    @property
    def few(self) -> bool:
        """Too few kinds or positions to say much."""
        return too_few(self.types, self.tokens)

    @property
    def label(self) -> str:
        return span_label(self.low, self.high)


@dataclass(frozen=True)
class Audit:
    """What ``by_frequency`` found."""

    losses: Losses
    counts: Counts
    config: Config
    mean: float
    """L_avg, nats per token."""
    balanced: float
    """L_bal, mean over kinds of tokens with ``min_count`` positions; NaN if there are none."""
    intervals: tuple[Interval, Interval] | None
    """95 % of both over documents; None for a single document."""
    types: int
    """Kinds that take part in the balanced loss."""
    head: float
    """Share of positions that the most frequent one per cent of kinds has."""
    buckets: tuple[Bucket, ...]
    """From rare to frequent; kinds that the source never saw first."""

    @property
    def ratio(self) -> float:
        """L_bal over L_avg."""
        return self.balanced / self.mean

    def table(self) -> tuple[list[str], list[tuple[object, ...]]]:
        """Column names, and one row a bucket; those that say little are marked."""
        columns = ["count", "kinds", "tokens", "loss", "unigram", "right", "gap", "rank", "seen"]
        return columns, [
            (
                b.label + ("*" if b.few else ""), b.types, b.tokens, f"{b.nll:.2f}{_half(b.interval)}",
                f"{b.by_type - b.excess:.2f}", f"{b.accuracy:.0%}", f"{b.calibration:.2f}", round(b.rank),
                f"{b.seen:.0%}",
            )
            for b in self.buckets
        ]  # fmt: skip

    def __str__(self) -> str:
        spans = [f" ({a:.3f} to {b:.3f})" for a, b in self.intervals] if self.intervals else ["", ""]
        few = " Rows with * have too few tokens to say much."
        own = " Counts are of the audited text itself: its rare tokens are chosen by what they are scored on."
        return (
            f"Mean loss {self.mean:.3f}{spans[0]} nats a token, {len(self.losses):,} tokens in "
            f"{self.losses.documents:,} documents. Balanced over {self.types:,} kinds: {self.balanced:.3f}{spans[1]}, "
            f"{self.ratio:.2f} times as much; perplexity per kind {math.exp(min(self.balanced, 700)):,.1f}. Guessing: "
            f"{math.log(self.losses.vocab):.3f}. The most frequent 1 % of kinds has {self.head:.0%} of the tokens."
            f"{few if any(b.few for b in self.buckets) else ''}{own if self.counts.own else ''}"
        )

    def as_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        own = ("mean", "balanced", "ratio", "intervals", "types", "head")
        return {name: getattr(self, name) for name in own} | {
            "model": self.losses.model, "patches": list(self.losses.patches), "tokens": len(self.losses),
            "documents": self.losses.documents, "counted_in": self.counts.source, "config": asdict(self.config),
            "buckets": [asdict(bucket) | {"few": bucket.few} for bucket in self.buckets],
        }  # fmt: skip

    def plot(self, path: str | Path) -> None:
        """Write a PNG: loss by bucket with intervals, beside the unigram model's."""
        axes, save = drawing(path)
        labels = [bucket.label for bucket in self.buckets]
        axes.plot(
            labels, [b.by_type - b.excess for b in self.buckets], ls="--", color="grey", label="unigram, per kind"
        )
        for bucket in self.buckets:
            draw_point(axes, bucket.label, bucket.nll, bucket.interval, bucket.few)
        axes.axhline(self.mean, color="C1", lw=1, label="mean loss")
        axes.axhline(self.balanced, color="C3", lw=1, label="balanced loss")
        axes.set(xlabel=f"count of the token in {self.counts.source}", ylabel="nats", title=self.losses.model)
        save()


def by_frequency(losses: Losses, counts: Counts | None = None, cfg: Config = Config()) -> Audit:
    """Losses by frequency.

    Args:
        counts: how frequent tokens are; None: as often as they are in the text itself, which the result says.
    Raises:
        BadInput: counts of another tokenizer, or a setting out of range.
    """
    cfg.check()
    counts = counts or own_counts(losses)
    counts.check(losses)
    of_type, lows = bucketed(losses, counts, cfg)
    found = statistics(losses, of_type, len(lows), cfg)
    values = losses.nll.double().numpy()
    ends = intervals(drawn(losses, lambda weights: statistics(losses, of_type, len(lows), cfg, weights), cfg, values))
    value = found(values)
    buckets = [
        _bucket(losses, counts, of_type, k, float(value[2 + k]), ends[2 + k] if ends else None, cfg)
        for k in range(len(lows))
    ]
    types, places = losses.types
    top = counts.n.sort(descending=True).indices[: max(1, int((counts.n > 0).sum()) // 100)]
    return Audit(
        losses, counts, cfg, float(value[0]), float(value[1]), (ends[0], ends[1]) if ends else None,
        int((torch.bincount(places) >= cfg.min_count).sum()), float(torch.isin(types, top)[places].float().mean()),
        tuple(buckets),
    )  # fmt: skip


Statistics = Callable[[Array], Array]


def statistics(losses: Losses, of_type: Tensor, buckets: int, cfg: Config, weights: Array | None = None) -> Statistics:
    """A function from a value of each position [M] to [2 + buckets]: mean, balanced mean, and mean of each bucket.

    Args:
        of_type: [K] the bucket of each kind that occurs.
        weights: [M] how often each position counts; None: once.
    """
    places = losses.types[1].numpy()
    of_position = of_type.numpy()[places]
    w = np.ones(len(places)) if weights is None else weights
    m = np.bincount(places, w, minlength=len(of_type))
    enough = (np.bincount(places) >= cfg.min_count) & (m > 0)  # of the text as it is: repeating adds no rarer kinds
    sizes = np.bincount(of_position, w, minlength=buckets)

    def found(values: Array) -> Array:
        total = np.bincount(places, w * values, minlength=len(of_type))
        with np.errstate(invalid="ignore", divide="ignore"):
            balanced = (total[enough] / m[enough]).mean() if enough.any() else np.nan
            each = np.bincount(of_position, w * values, minlength=buckets) / sizes
        return np.concatenate([[np.average(values, weights=w), balanced], each])

    return found


def drawn(losses: Losses, make: Callable[[Array], Statistics], cfg: Config, values: Array) -> Array | None:
    """Statistics of ``values`` [M] over resampled documents, [draws, 2 + buckets]; None for a single document."""
    documents = losses.document.unique(return_inverse=True)[1].numpy()
    count = int(documents.max()) + 1
    if count < 2 or cfg.draws < 2:
        return None
    draw = np.random.default_rng(cfg.seed)
    weights = (np.bincount(draw.integers(count, size=count), minlength=count) for _ in range(cfg.draws))
    return np.stack([make(each[documents].astype(float))(values) for each in weights])


def intervals(draws: Array | None) -> list[Interval] | None:
    """95 % of each column of draws [draws, n]. A bucket that a draw has nothing of is left out of that draw."""
    if draws is None:
        return None
    with warnings.catch_warnings():  # a column may be empty in every draw: NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = np.nanpercentile(draws, [2.5, 97.5], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def bucketed(losses: Losses, counts: Counts, cfg: Config) -> tuple[Tensor, list[int]]:
    """For each kind that occurs its bucket [K], and each bucket's number: floor(log_base n), or -1 where n is 0."""
    n = counts.n[losses.types[0]].double()
    number = torch.where(n > 0, (n.clamp(min=1).log() / math.log(cfg.base) + 1e-9).floor(), -1.0).long()
    present, places = number.unique(return_inverse=True)
    return places, present.tolist()


def _bucket(
    losses: Losses, counts: Counts, of_type: Tensor, k: int, nll: float, interval: Interval | None, cfg: Config
) -> Bucket:
    types, places = losses.types
    inside = of_type == k
    at = inside[places]
    m = torch.bincount(places, minlength=len(types))[inside].double()
    total = torch.bincount(places, losses.nll.double(), minlength=len(types))[inside]
    by_type = total / m
    n = counts.n[types[inside]]
    hit = losses.hit[at].double()
    return Bucket(
        int(n.min()), int(n.max()), int(inside.sum()), int(at.sum()), nll, interval, float(by_type.mean()),
        float((by_type + counts.log_unigram()[types[inside]]).mean()), float(hit.mean()),
        calibration_error(losses.confidence[at], hit), float(losses.rank[at].double().median()),
        float(losses.seen[at].double().mean()),
    )  # fmt: skip


def _half(interval: Interval | None) -> str:
    """Half of an interval's width."""
    return f" ± {(interval[1] - interval[0]) / 2:.2f}" if interval else ""


def calibration_error(confidence: Tensor, hit: Tensor) -> float:
    """Mean of |confidence - accuracy| over bins of equal mass, weighted by their sizes (Nguyen and O'Connor 2015)."""
    order = confidence.double().argsort(stable=True)
    parts = [part for part in order.tensor_split(BINS) if len(part)]
    gaps = [abs(float(confidence.double()[part].mean() - hit[part].double().mean())) for part in parts]
    return float(np.average(gaps, weights=[len(part) for part in parts]))


def too_few(types: int, tokens: int) -> bool:
    """A row of so many kinds and positions says little."""
    return types < FEW_TYPES or tokens < FEW_TOKENS


def draw_point(axes: Any, label: str, value: float, interval: Interval | None, few: bool) -> None:
    """A row of a table in a drawing, with its interval; grey where it says little."""
    low, high = interval or (value, value)
    error = [[max(0.0, value - low)], [max(0.0, high - value)]]
    axes.errorbar([label], [value], yerr=error, fmt="o", color="lightgrey" if few else "C0", capsize=3)


def span_label(low: int, high: int) -> str:
    """Counts in words."""
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def drawing(path: str | Path) -> tuple[Any, Callable[[], None]]:
    """An empty drawing, and what writes it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra('plots need matplotlib. Run: pip install "lmpatch[plot]"') from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(axis="x", labelrotation=45, labelsize=8)

    def save() -> None:
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=150, format="png")

    return axes, save
