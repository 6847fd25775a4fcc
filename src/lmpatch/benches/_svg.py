"""Two small plots as inline SVG. They take their colours from the page, so they work on light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 340, 250, 44, 40, 14, 14
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def scatter(points: Sequence[tuple[str, float, float]], x_label: str, y_label: str) -> str:
    """Named points in the unit square."""
    marks = []
    for i, (name, x, y) in enumerate(points):
        px, py = _x(x), _y(y)
        near_edge = px > WIDTH - 110
        anchor, dx = ("end", -9) if near_edge else ("start", 9)
        dy = 4 + 13 * sum(abs(px - _x(a)) < 60 and abs(py - _y(b)) < 12 for _, a, b in points[:i])  # labels apart
        marks.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" class="s{i % 6}"><title>{escape(name)}: {x:.3f}, {y:.3f}'
            f'</title></circle><text x="{px + dx:.1f}" y="{py + dy:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
        )
    ticks = [(value, f"{100 * value:.0f}") for value in TICKS]
    return _frame(ticks, x_label, y_label, "".join(marks))


def curves(
    lines: Sequence[tuple[str, Sequence[float | None]]], labels: Sequence[str], x_label: str, y_label: str
) -> str:
    """One line per name over the same labels; None leaves a gap."""
    step = 1 / max(1, len(labels) - 1)
    marks = []
    for i, (name, values) in enumerate(lines):
        spots = [(_x(j * step), _y(v)) for j, v in enumerate(values) if v is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="s{i % 6}"/>' for x, y in spots)
        x, y = spots[0] if spots else (LEFT, TOP)
        marks.append(f'<polyline points="{path}" class="l{i % 6}"/>{dots}')
        marks.append(f'<text x="{x + 6:.1f}" y="{y + 16:.1f}">{escape(name)}</text>')
    return _frame([(j * step, label) for j, label in enumerate(labels)], x_label, y_label, "".join(marks))


def _x(value: float) -> float:
    return LEFT + value * (WIDTH - LEFT - RIGHT)


def _y(value: float) -> float:
    return HEIGHT - BOTTOM - min(1.0, max(0.0, value)) * (HEIGHT - BOTTOM - TOP)


def _frame(x_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str, inside: str) -> str:
    lines = [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(v):.1f}" y2="{_y(v):.1f}" class="grid"/>' for v in TICKS]
    ys = [
        f'<text x="{LEFT - 6}" y="{_y(v) + 4:.1f}" text-anchor="end" class="tick">{100 * v:.0f}</text>' for v in TICKS
    ]
    xs = [
        f'<text x="{_x(v):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle" class="tick">{escape(t)}</text>'
        for v, t in x_ticks
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    names = (
        f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle" class="axis">{escape(x_label)}</text>'
        f'<text transform="translate(11 {HEIGHT / 2 - 10}) rotate(-90)" text-anchor="middle" class="axis">'
        f"{escape(y_label)}</text>"
    )
    drawn = "".join([*lines, *ys, *xs, names, inside])
    label = escape(f"{y_label} against {x_label}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{drawn}</svg>'
