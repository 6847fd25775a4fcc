"""The page of a report: one file from the templates beside this one. No script, nothing loaded, light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...errors import MissingExtra
from .adapter import Adapter
from .contract import BASE, Curve, Example, Json, Scatter
from .tables import Grid, label, show

SHOWN = 12  # examples of each kind of question
HUES = 10  # that a page has, in the order of its runs
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 260, 46, 330, 14, 218  # of a plot, in pixels
GAP = 11.0  # between two labels
Ticks = list[tuple[float, str]]


def document(bench: Adapter, runs: Sequence[Any], sentences: Sequence[str], grids: Sequence[Grid]) -> str:
    """The whole page."""
    patched = [run for run in runs if not run.record["baseline"]]
    return _render(
        "page.html.j2",
        bench=bench,
        runs=runs,
        about=[runs[0].record.get(key) for key in ("base_model", "dtype", "data_name", "protocol_id")],
        sentences=sentences,
        bars=_bars(runs),
        figures=[figure for plot in bench.PLOTS for figure in _figures(plot, runs)],
        grids=grids,
        examples={run.name: _examples(runs, run) for run in patched or runs[:1]},
        records={run.name: json.dumps(run.settled, indent=2, ensure_ascii=False) for run in runs},
    )


def fragment(sentences: Sequence[str], grids: Sequence[Grid]) -> str:
    """Sentences and tables, to stand in another page."""
    return _render("fragment.html.j2", sentences=sentences, grids=grids)


def _render(template: str, **values: Any) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtra('a page needs jinja2. Run: pip install "lmpatch[bench]"') from error
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    how: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=loader, **how).get_template(template, globals={"hues": HUES}).render(**values)


def _bars(runs: Sequence[Any]) -> dict[str, list[tuple[str, str, list[Json]]]]:
    """Group → (number, what it means, a bar a run) of the shares a run is remembered by."""
    groups: dict[str, list[tuple[str, str, list[Json]]]] = {}
    measures = {name: run.measure(name) for run in runs for name in run.metrics()}
    for name, measure in measures.items():
        if not measure.headline or measure.unit != "%":
            continue
        bars = []
        for i, run in enumerate(runs):
            if (number := run.metrics().get(name)) is not None:
                value, error = number.value, number.error or 0.0
                bar = {"hue": i % HUES, "name": run.name, "share": value, "chance": runs[0].chances.get(name)}
                ends = {"low": max(0.0, value - error), "high": min(1.0, value + error)}  # shares end at 0 and 100 %
                bars.append({**bar, **ends, "text": show(measure, value, number.error)})
        groups.setdefault(measure.group, []).append((label(name), measure.means, bars))
    return groups


def _figures(plot: Curve | Scatter, runs: Sequence[Any]) -> list[tuple[str, Json]]:
    """(title, what is drawn) of a plot, or of one for each member of a family; none without anything to show."""
    if isinstance(plot, Curve):
        lines = [(i, run.name, dict(plot.points(run.rows))) for i, run in enumerate(runs)]
        labels = [text for text in plot.labels if any(text in values for _, _, values in lines)]
        step = (RIGHT - LEFT) / max(1, len(labels) - 1)
        ticks = [(LEFT + j * step, text) for j, text in enumerate(labels)]
        up, grid = _axis([value for _, _, values in lines for value in values.values()], BOTTOM, TOP)
        marks = [(i, n, [(x, up(values[t])) for x, t in ticks if t in values]) for i, n, values in lines if values]
        return [(plot.title, _plot(marks, ticks, grid, plot.x, plot.y))] if marks else []
    members = dict.fromkeys(n for run in runs for n in run.metrics() if n == plot.y or n.startswith(f"{plot.y}/"))
    figures = []
    for name in [member for member in members if "@" not in member]:
        points = [
            (i, run.name, x.value, y.value)
            for i, run in enumerate(runs)
            if (x := run.metrics().get(plot.x)) and (y := run.metrics().get(name))
        ]
        if points:
            across, ticks = _axis([x for _, _, x, _ in points], LEFT, RIGHT)
            up, grid = _axis([y for *_, y in points], BOTTOM, TOP)
            marks = [(i, f"{n}: {100 * x:.1f}, {100 * y:.1f}", [(across(x), up(y))]) for i, n, x, y in points]
            title = plot.title + (f": {label(name.partition('/')[2])}" if "/" in name else "")
            figures.append((title, _plot(marks, ticks, grid, f"{label(plot.x)}, %", f"{label(name)}, %")))
    return figures


def _axis(values: Sequence[float], start: int, end: int) -> tuple[Callable[[float], float], Ticks]:
    """From values to pixels, and the ticks. It runs from 0 to 1 at least, and further where a value does."""
    low, high = min([0.0, *values]), max([1.0, *values])

    def at(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    ticks = [low + (high - low) * share for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return at, [(at(tick), f"{100 * tick:.0f}") for tick in ticks]


def _plot(
    marks: Sequence[tuple[int, str, list[tuple[float, float]]]], ticks: Ticks, grid: Ticks, x_label: str, y_label: str
) -> Json:
    """What the template draws: points or lines (number of the run, name, pixels) between ticks.

    They carry their runs' numbers, pushed apart where they would cover each other; a list below names them.
    """
    names: list[tuple[float, float, int]] = []
    ends = [(spots[-1][1] + 4, spots[-1][0] + 8, i + 1) for i, _, spots in marks if spots]
    for y, x, number in sorted(ends):
        while any(abs(x - a) < 2 * GAP and abs(y - b) < GAP for a, b, _ in names):
            y += GAP / 2
        names.append((x, y, number))
    box = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM}
    return {**box, "marks": marks, "names": names, "ticks": ticks, "grid": grid, "x_label": x_label, "y_label": y_label}


def _examples(runs: Sequence[Any], run: Any) -> list[tuple[str, int, list[tuple[Example, str | None]]]]:
    """Kind → how many answers there are, and some of them with what the unpatched model said.

    Those that moved most where that is known, else evenly taken.
    """
    base = next((each.rows for each in runs if each.name == BASE and each is not run), ())
    before = {row.key(): example.answer for row in base if (example := row.example())}
    kinds: dict[str, list[tuple[Example, str | None]]] = {}
    for row in run.rows:
        if (example := row.example()) is not None:
            kinds.setdefault(row.where(), []).append((example, before.get(row.key())))
    some = []
    for kind, pairs in kinds.items():
        few = pairs[:: max(1, -(-len(pairs) // SHOWN))]
        if any(example.moved is not None for example, _ in pairs):
            few = sorted(pairs, key=lambda pair: -(pair[0].moved or 0.0))[:SHOWN]
        some.append((kind.replace("_", " "), len(pairs), few))
    return some
