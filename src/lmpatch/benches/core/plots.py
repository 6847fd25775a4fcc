"""Small plots as inline SVG. They take their colours from the page, so they work on light and dark.

Points and lines carry the numbers of their runs; a list below the plot names them, however long the names are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 360, 260, 46, 42, 14, 30
HUES = 10  # that a page has, in the order of its runs
GAP = 11.0  # between two labels


def scatter(points: Sequence[tuple[int, str, float, float]], x_label: str, y_label: str) -> str:
    """Points (number of the run, name, x, y) of shares; the axes hold every one."""
    xs, ys = _Scale([x for _, _, x, _ in points]), _Scale([y for *_, y in points])
    spots = [(LEFT + xs.at(x) * _INNER[0], _y(ys.at(y))) for _, _, x, y in points]
    marks = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="s{i % HUES}">'
        f"<title>{escape(name)}: {100 * a:.1f}, {100 * b:.1f}</title></circle>"
        for (i, name, a, b), (x, y) in zip(points, spots, strict=True)
    ]
    marks += _numbers([(i, x + 8, y + 4) for (i, *_), (x, y) in zip(points, spots, strict=True)])
    ticks = [(xs.at(tick), f"{100 * tick:.0f}") for tick in xs.ticks]
    return _frame(ticks, ys, x_label, y_label, "".join(marks))


def curves(
    lines: Sequence[tuple[int, str, Sequence[float | None]]], labels: Sequence[str], x_label: str, y_label: str
) -> str:
    """Lines (number of the run, name, shares) over the same labels; None leaves a gap."""
    step = 1 / max(1, len(labels) - 1)
    ys = _Scale([v for _, _, values in lines for v in values if v is not None])
    marks, ends = [], []
    for i, name, values in lines:
        spots = [(LEFT + j * step * _INNER[0], _y(ys.at(v))) for j, v in enumerate(values) if v is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="s{i % HUES}"/>' for x, y in spots)
        marks.append(f'<g><title>{escape(name)}</title><polyline points="{path}" class="l{i % HUES}"/>{dots}</g>')
        ends += [(i, spots[-1][0] + 8, spots[-1][1] + 4)] if spots else []
    marks += _numbers(ends)
    return _frame([(j * step, text) for j, text in enumerate(labels)], ys, x_label, y_label, "".join(marks))


class _Scale:
    """From values to 0..1. It runs from 0 to 1 at least, and further where a value does."""

    def __init__(self, values: Iterable[float]) -> None:
        values = list(values)
        self.low, self.high = min([0.0, *values]), max([1.0, *values])
        self.ticks = [self.low + (self.high - self.low) * share for share in (0.0, 0.25, 0.5, 0.75, 1.0)]

    def at(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


_INNER = (WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM - TOP)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * _INNER[1]


def _numbers(places: Iterable[tuple[int, float, float]]) -> list[str]:
    """The runs' numbers at (x, y), pushed apart where they would cover each other."""
    marks: list[str] = []
    placed: list[tuple[float, float]] = []
    for i, x, y in sorted(places, key=lambda place: place[2]):
        while any(abs(x - a) < 2 * GAP and abs(y - b) < GAP for a, b in placed):
            y += GAP / 2
        placed.append((x, y))
        marks.append(f'<text x="{x:.1f}" y="{y:.1f}" class="name">{i + 1}</text>')
    return marks


def _frame(ticks: Sequence[tuple[float, str]], ys: _Scale, x_label: str, y_label: str, inside: str) -> str:
    right, parts = WIDTH - RIGHT, []
    for tick in ys.ticks:
        y = _y(ys.at(tick))
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" class="tick">{100 * tick:.0f}</text>')
    for share, text in ticks:
        x = LEFT + share * _INNER[0]
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle" class="tick">{escape(text)}</text>'
        )
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle" class="axis">{escape(x_label)}</text>')
    turned = f"translate(11 {HEIGHT / 2 - 10}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle" class="axis">{escape(y_label)}</text>')
    label = escape(f"{y_label} against {x_label}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}{inside}</svg>'
