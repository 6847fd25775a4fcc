"""The page of a report: one file from the templates beside this one. No script, nothing loaded, light and dark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import MissingExtra
from .adapter import Adapter
from .contract import BASE, Curve, Example, Scatter
from .plots import HUES, curves, scatter
from .tables import Grid, label, measure_of, show

SHOWN = 12  # examples of each kind of question


def document(bench: Adapter, runs: Sequence[Any], sentences: Sequence[str], grids: Sequence[Grid]) -> str:
    """The whole page."""
    record = runs[0].record
    about = [record["base_model"], record.get("dtype"), record.get("data_name"), record.get("protocol_id")]
    return _render(
        "page.html.j2",
        title=f"{bench.name}: {record['base_model']}",
        question=bench.question,
        about=[text for text in about if text],
        sentences=sentences,
        names=[run.title for run in runs],
        bars=_bars(runs),
        figures=_figures(bench, runs),
        grids=grids,
        examples=[(run.name, _examples(runs, run)) for run in runs if not run.record["baseline"]] or [
            (run.name, _examples(runs, run)) for run in runs[:1]
        ],
        records=[(run.name, _record(run)) for run in runs],
    )  # fmt: skip


def fragment(sentences: Sequence[str], grids: Sequence[Grid]) -> str:
    """Sentences and tables, to stand in another page."""
    return _render("fragment.html.j2", sentences=sentences, grids=grids)


@cache
def _environment() -> Any:
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise MissingExtra('a page needs jinja2. Run: pip install "lmpatch[bench]"') from error
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["hues"] = HUES
    environment.filters["drawn"] = Markup  # SVG of this package, whose texts are escaped already
    return environment


def _render(template: str, **values: Any) -> str:
    text: str = _environment().get_template(template).render(**values)
    return text


def _bars(runs: Sequence[Any]) -> list[tuple[str, list[tuple[str, str, list[dict[str, Any]]]]]]:
    """Group → (number, what it means, a bar a run) of the shares a run is remembered by."""
    groups: dict[str, dict[str, Any]] = {}
    for run in runs:
        for name in run.metrics():
            measure = measure_of(run, name)
            if measure.headline and measure.unit == "%":
                groups.setdefault(measure.group, {})[name] = measure
    return [(group, [(label(n), m.means, _bar(runs, n)) for n, m in some.items()]) for group, some in groups.items()]


def _bar(runs: Sequence[Any], name: str) -> list[dict[str, Any]]:
    bars = []
    chance = runs[0].chances.get(name)
    for i, run in enumerate(runs):
        if (number := run.metrics().get(name)) is not None:
            error, measure = number.error or 0.0, measure_of(run, name)
            low, high = max(0.0, number.value - error), min(1.0, number.value + error)  # shares end at 0 and 100 %
            text = show(measure, number.value) + (f" ±{show(measure, error)}" if number.error is not None else "")
            bars.append({"hue": i % HUES, "name": run.name, "share": number.value, "low": low, "high": high,
                         "text": text, "chance": chance})  # fmt: skip
    return bars


def _figures(bench: Adapter, runs: Sequence[Any]) -> list[tuple[str, str]]:
    """(title, SVG) of every plot of the bench that has something to show."""
    figures: list[tuple[str, str]] = []
    for plot in bench.PLOTS:
        if isinstance(plot, Curve):
            lines = [(i, run.name, dict(plot.points(run.rows))) for i, run in enumerate(runs)]
            labels = [text for text in plot.labels if any(text in values for _, _, values in lines)]
            drawn = [(i, name, [values.get(text) for text in labels]) for i, name, values in lines if values]
            figures += [(plot.title, curves(drawn, labels, plot.x, plot.y))] if drawn else []
        elif isinstance(plot, Scatter):
            figures += _scatters(plot, runs)
    return figures


def _scatters(plot: Scatter, runs: Sequence[Any]) -> list[tuple[str, str]]:
    members = dict.fromkeys(n for run in runs for n in run.metrics() if n == plot.y or n.startswith(f"{plot.y}/"))
    figures = []
    for name in [member for member in members if "@" not in member]:
        points = [
            (i, run.name, x.value, y.value)
            for i, run in enumerate(runs)
            if (x := run.metrics().get(plot.x)) and (y := run.metrics().get(name))
        ]
        if points:
            title = plot.title + (f": {label(name.partition('/')[2])}" if "/" in name else "")
            figures.append((title, scatter(points, f"{label(plot.x)}, %", f"{label(name)}, %")))
    return figures


def _examples(runs: Sequence[Any], run: Any) -> list[tuple[str, int, list[tuple[Example, str | None]]]]:
    """Kind → how many answers there are, and some of them with what the unpatched model said."""
    base = next((each for each in runs if each.name == BASE), None)
    before = {row.key(): row.example() for row in base.rows} if base is not None and base is not run else {}
    kinds: dict[str, list[tuple[Example, str | None]]] = {}
    for row in run.rows:
        if (example := row.example()) is not None:
            was = before.get(row.key())
            kinds.setdefault(row.where(), []).append((example, was.answer if was else None))
    return [(kind.replace("_", " "), len(pairs), _some(pairs)) for kind, pairs in kinds.items()]


def _some(pairs: list[tuple[Example, str | None]]) -> list[tuple[Example, str | None]]:
    """Those that moved most where that is known, else evenly taken."""
    if any(example.moved is not None for example, _ in pairs):
        return sorted(pairs, key=lambda pair: -(pair[0].moved or 0.0))[:SHOWN]
    return pairs[:: max(1, -(-len(pairs) // SHOWN))]


def _record(run: Any) -> str:
    """Everything that decides the run's numbers; the numbers themselves are left out."""
    return json.dumps({k: v for k, v in run.record.items() if k != "metrics"}, indent=2, ensure_ascii=False)
