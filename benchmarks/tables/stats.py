"""Means with half of their 95 % interval, and how they are printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

NORMAL = 1.96
"""Standard errors in half a 95 % interval."""
FEWER = 0.95
"""A cell made of a smaller share of the row's cases says of how many."""


@dataclass(frozen=True)
class Mean:
    """A mean over n independent cases."""

    value: float
    half: float
    """Half of the 95 % interval: 1.96 standard errors, s / sqrt(n) each; 0 for a single case."""
    n: int


def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> Mean:
    """Weighted mean; its error is that of a ratio, linearised (Cochran, Sampling Techniques, 1977, sec. 2.11).

    Raises:
        ValueError: no values.
    """
    n = len(values)
    if not n:
        raise ValueError("no values to take a mean of. Are rows missing?")
    weights = weights or [1.0] * n
    total = sum(weights)
    middle = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    spread = sum((w * (v - middle)) ** 2 for w, v in zip(weights, values, strict=True))
    return Mean(middle, NORMAL * sqrt(n / (n - 1) * spread) / total if n > 1 else 0.0, n)


def percent(found: Mean | None, digits: int = 0, n: int | None = None) -> str:
    """``97 ± 3 %``; ``100 % (≥ 96)`` where all cases agree. A much smaller n than the row's is added."""
    if found is None:
        return ""
    return f"{_with_half(found, 100, digits)} %{_bound(found, digits)}{_other(found, n)}"


def _bound(found: Mean, digits: int) -> str:
    """Where all cases are 0 or all are 1: the other end of Wilson's interval (1927), in %."""
    off = 100 * NORMAL**2 / (found.n + NORMAL**2)
    if found.half or found.value not in (0.0, 1.0):
        return ""
    return f" (≤ {off:.{digits}f})" if found.value == 0.0 else f" (≥ {100 - off:.{digits}f})"


def points(found: Mean | None, digits: int = 1) -> str:
    """A difference of shares, ``+9.2 ± 3.7``."""
    return "" if found is None else f"{100 * found.value:+.{digits}f} ± {100 * found.half:.{digits}f}"


def number(found: Mean | None, digits: int = 2, n: int | None = None) -> str:
    """``0.39 ± 0.07``."""
    return "" if found is None else f"{_with_half(found, 1, digits)}{_other(found, n)}"


def _with_half(found: Mean, scale: float, digits: int) -> str:
    value, half = f"{scale * found.value:.{digits}f}", f"{scale * found.half:.{digits}f}"
    value = value.removeprefix("-") if not float(value) else value
    return value if not float(half) else f"{value} ± {half}"


def _other(found: Mean, n: int | None) -> str:
    return f" (n = {found.n})" if n is not None and found.n < FEWER * n else ""


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def size(count: float) -> str:
    """Bytes, ``10.5 KiB``."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{round(count / scale, 1):g} {unit}"
    return f"{count:.0f} bytes"
