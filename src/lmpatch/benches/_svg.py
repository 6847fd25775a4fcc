"""Small plots as inline SVG. They take their colours from the page, so they work on light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 340, 250, 44, 40, 14, 26
HUES = 10  # that a page has, in the order of its runs
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def scatter(points: Sequence[tuple[int, str, float, float]], x_label: str, y_label: str) -> str:
    """Points (colour, name, x, y) in the unit square."""
    marks = [
        f'<circle cx="{_x(x):.1f}" cy="{_y(y):.1f}" r="6" class="s{colour % HUES}">'
        f"<title>{escape(name)}: {100 * x:.1f}, {100 * y:.1f}</title></circle>"
        for colour, name, x, y in points
    ]
    return _frame([(value, f"{100 * value:.0f}") for value in TICKS], x_label, y_label, "".join(marks))


def curves(
    lines: Sequence[tuple[int, str, Sequence[float | None]]], labels: Sequence[str], x_label: str, y_label: str
) -> str:
    """Lines (colour, name, values) over the same labels; None leaves a gap."""
    step = 1 / max(1, len(labels) - 1)
    marks = []
    for colour, name, values in lines:
        spots = [(_x(j * step), _y(v)) for j, v in enumerate(values) if v is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="s{colour % HUES}"/>' for x, y in spots)
        marks.append(f'<g><title>{escape(name)}</title><polyline points="{path}" class="l{colour % HUES}"/>{dots}</g>')
    return _frame([(j * step, label) for j, label in enumerate(labels)], x_label, y_label, "".join(marks))


Bar = tuple[int, str, float, float | None]
"""Colour, name, value, standard error."""


def bars(rows: Sequence[tuple[str, float | None, Sequence[Bar]]], x_label: str) -> str:
    """Lying bars (label, mark, bars) of values from 0 to 1, each with its error; the mark is a dashed line."""
    left = max(92, 12 + 6 * max((len(label) for label, _, _ in rows), default=0))  # 6: the width of a letter
    right, thick, gap = 14, 9, 9
    width = WIDTH - left - right
    marks, y = [], 6.0
    for label, mark, group in rows:
        tall = thick * len(group)
        middle = y + tall / 2
        marks.append(f'<text x="{left - 6}" y="{middle + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        for i, (colour, name, value, error) in enumerate(group):
            top, end, ink = y + i * thick, left + width * _unit(value), thick - 1
            marks.append(
                f'<rect x="{left}" y="{top:.1f}" width="{end - left:.1f}" height="{ink}" class="s{colour % HUES}">'
                f"<title>{escape(name)}: {100 * value:.1f}</title></rect>"
            )
            if error:
                low, high = (left + width * _unit(value + side * error) for side in (-1, 1))
                at = top + ink / 2
                marks.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{at:.1f}" y2="{at:.1f}" class="error"/>')
        if mark is not None:
            x = left + width * mark
            marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 2:.1f}" y2="{y + tall + 1:.1f}" class="mark"/>')
        y += tall + gap
    ticks = [(left + width * v, f"{100 * v:.0f}") for v in TICKS]
    lines = [f'<line x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{y:.1f}" class="grid"/>' for x, _ in ticks]
    names = [f'<text x="{x:.1f}" y="{y + 12:.1f}" text-anchor="middle" class="tick">{t}</text>' for x, t in ticks]
    names.append(
        f'<text x="{left + width / 2:.1f}" y="{y + 28:.1f}" text-anchor="middle" class="axis">{escape(x_label)}</text>'
    )
    label, drawn = escape(x_label, quote=True), "".join([*lines, *marks, *names])
    return f'<svg viewBox="0 0 {WIDTH} {y + 34:.0f}" role="img" aria-label="{label}">{drawn}</svg>'


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))


def _x(value: float) -> float:
    return LEFT + value * (WIDTH - LEFT - RIGHT)


def _y(value: float) -> float:
    return HEIGHT - BOTTOM - _unit(value) * (HEIGHT - BOTTOM - TOP)


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
