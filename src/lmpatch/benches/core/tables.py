"""The verdict and the tables of a report as plain values; the terminal and the page draw the same ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...resources import format_bytes
from .contract import BASE, Measure
from .stats import Number

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

NONE = "-"
WIDE = 6  # runs that stand side by side; more are listed below each other
NAMED = 3  # numbers that a sentence of the verdict names
SENTENCES = 4  # patched runs with a sentence each; of more, the best has one
CLEAR = 2.0  # standard errors from which a difference is called one
Moved = Mapping[str, Mapping[str, Number]]


@dataclass(frozen=True)
class Cell:
    """A value with what it rests on."""

    text: str
    sub: str = ""
    """Error, number of units, difference."""
    share: float | None = None
    """The value as a part of 1, for drawing."""
    best: bool = False
    """No other run has a better one."""
    means: str = ""
    """What a name stands for."""


@dataclass(frozen=True)
class Grid:
    """One table."""

    title: str
    note: str
    columns: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """A row of one cell is a heading."""


def measure_of(run: Any, name: str) -> Measure:
    """The measure behind a full name such as ``loc_kl/same_relation@was_wrong``."""
    measure: Measure = run.values[name][0]
    return measure


def label(name: str) -> str:
    """A full name as people read it; ``metric`` takes the same, the split apart."""
    base, _, split = name.partition("@")
    return f"{base} ({split})" if split else base


def show(measure: Measure, value: float, signed: bool = False) -> str:
    """A value in its unit."""
    sign = "+" if signed else ""
    if measure.unit == "%":
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.3g}"


def verdict(runs: Sequence[Any], moved: Moved) -> list[str]:
    """A sentence a patched run: what is clearly better, what clearly worse, and what the errors leave open."""
    if not (patched := [run for run in runs if moved.get(run.name) and not run.record["baseline"]]):
        heads = [f"{label(n)} {_value(runs[0], n)}" for n in _headlines(runs[0])][: 2 * NAMED]
        return [f"{runs[0].title}: {', '.join(heads) or 'no numbers yet'}. Nothing is patched."]
    if len(patched) <= SENTENCES:
        return [_sentence(run, moved[run.name]) for run in patched]
    first = next((n for n in _headlines(patched[0]) if measure_of(patched[0], n).better == "more"), None)
    rivals = [run for run in patched if first in run.metrics()]
    if not rivals:
        return [f"{len(patched)} patched runs; the table has their numbers."]
    best = max(rivals, key=lambda run: run.metrics()[first].value)
    return [
        f"Of {len(patched)} patched runs {best.title} has the highest {label(str(first))}.",
        _sentence(best, moved[best.name]),
    ]


def _sentence(run: Any, moved: Mapping[str, Number]) -> str:
    judged = {n: moved[n] for n in _headlines(run) if n in moved and measure_of(run, n).better}
    sides: dict[str, list[tuple[float, str]]] = {"better": [], "worse": []}
    for name, number in judged.items():
        measure, error = measure_of(run, name), number.error or 0.0
        if number.value and abs(number.value) >= CLEAR * error:
            better = (number.value > 0) == (measure.better == "more")
            text = f"{label(name)} {show(measure, number.value, True)}{f' ± {show(measure, error)}' if error else ''}"
            sides["better" if better else "worse"].append((abs(number.value) / (error or 1e-12), text))
    parts = []
    for side, pairs in sides.items():
        names = [text for _, text in sorted(pairs, key=lambda pair: -pair[0])]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        parts += [f"{side} in {', '.join(names[:NAMED])}{more}"] if names else []
    left = len(judged) - sum(map(len, sides.values()))
    parts += [f"no clear difference in {left} of {len(judged)} numbers"] if left else []
    return f"{run.title} against the unpatched model: {'; '.join(parts) or 'nothing to compare'}."


def _headlines(run: Any) -> list[str]:
    return [name for name in run.metrics() if run.values[name][0].headline]


def _value(run: Any, name: str) -> str:
    return show(measure_of(run, name), run.metrics()[name].value) + (" %" if measure_of(run, name).unit == "%" else "")


def comparison(runs: Sequence[Any], moved: Moved) -> Grid:
    """Every number of every run, baselines included, the best of each marked."""
    names = list(dict.fromkeys(n for run in runs for n in run.metrics() if measure_of(run, n).shown))
    homes = {name: next(run for run in runs if name in run.metrics()) for name in names}
    names.sort(key=lambda name: list(homes[name].bench.metrics).index(_key(homes[name], name)))
    chances = runs[0].chances if runs else {}
    heads = [
        Cell("number"),
        *([Cell("guessing")] if chances else []),
        *(Cell(run.title, "baseline" if run.record["baseline"] else "") for run in runs),
    ]
    lines: list[tuple[str, tuple[Cell, ...]]] = []
    for name in names:
        measure = measure_of(homes[name], name)
        cells = [_number(run, name, moved[run.name].get(name)) for run in runs]
        marked = _marked(runs, name, measure, cells)
        guess = [Cell(show(measure, chances[name]) if name in chances else NONE)] if chances else []
        protocol = homes[name].metrics()[name].protocol
        plain = protocol in ("", homes[name].record.get("protocol_id"))
        means = measure.means if plain else f"{measure.means} [{protocol}]"
        lines.append((measure.group, (Cell(label(name), means=means), *guess, *marked)))
    note = (
        "Shares in %. ± one standard error (the larger one where records come in clusters), n: records. Below: the "
        "difference from the unpatched model, record by record; = marks one within a standard error. ★: the best, of "
        "three or more runs without the unpatched one."
    )
    note += f" Protocol {runs[0].record['protocol_id']}." if runs and "protocol_id" in runs[0].record else ""
    if len(runs) <= WIDE:
        return Grid("Comparison", note, tuple(heads), _grouped(lines))
    kept = [line for name, (_, line) in zip(names, lines, strict=True) if measure_of(homes[name], name).headline]
    first = 2 if chances else 1
    columns = (Cell("run"), *(line[0] for line in kept))
    below = [(heads[i], *(line[i] for line in kept)) for i in range(1, first)]
    below += [(heads[first + i], *(line[first + i] for line in kept)) for i in range(len(runs))]
    return Grid("Comparison", f"{note} All other numbers: to_json().", columns, tuple(below))


def _grouped(lines: Sequence[tuple[str, tuple[Cell, ...]]]) -> tuple[tuple[Cell, ...], ...]:
    """The lines below the headings of their groups."""
    rows: list[tuple[Cell, ...]] = []
    before = ""
    for group, line in lines:
        if group and group != before:
            rows.append((Cell(group),))
        before = group
        rows.append(line)
    return tuple(rows)


def _key(run: Any, name: str) -> str:
    """The key of ``METRICS`` behind a full name."""
    measure = run.values[name][0]
    return next(str(key) for key, each in run.bench.metrics.items() if each is measure)


def _number(run: Any, name: str, moved: Number | None) -> Cell:
    number = run.metrics().get(name)
    if number is None:
        return Cell(NONE)
    measure = measure_of(run, name)
    error = f" ±{show(measure, number.error)}" if number.error is not None else ""
    dropped = f", {number.dropped} not asked" if number.dropped else ""
    weight = f" ({number.weight:,} tokens)" if number.weight else ""
    parts = [f"n={number.n}{weight}{dropped}"]
    if moved is not None:
        spread = f" ±{show(measure, moved.error)}" if moved.error is not None else ""
        parts.insert(0, f"{show(measure, moved.value, True)}{spread}{' =' if moved.within else ''}")
    share = number.value if measure.unit == "%" else None
    return Cell(show(measure, number.value) + error, "\n".join(parts), share)


def _marked(runs: Sequence[Any], name: str, measure: Measure, cells: Sequence[Cell]) -> list[Cell]:
    """The cells, the best of at least two different ones marked."""
    rivals = [run for run in runs if name in run.metrics()]
    if len(rivals) > 2:  # against itself the unpatched model is as it was; who comes next says more
        rivals = [run for run in rivals if run.name != BASE]
    values = [run.metrics()[name].value for run in rivals]
    if not measure.better or len(set(values)) < 2:
        return list(cells)
    best = max(values) if measure.better == "more" else min(values)
    return [
        Cell(cell.text, cell.sub, cell.share, run in rivals and run.metrics()[name].value == best)
        for run, cell in zip(runs, cells, strict=True)
    ]


def costs(runs: Sequence[Any]) -> Grid:
    """Seconds, bytes, and what the bench adds in ``costs``."""
    names = list(dict.fromkeys(name for run in runs for name in run.record.get("costs", {})))
    lines = []
    for run in runs:
        if run.record["baseline"] or "seconds" not in run.record:
            continue
        size = run.record.get("bytes")
        own = run.record.get("costs", {})
        cells = [
            f"{run.record['seconds']:.3g}",
            format_bytes(size) if size else NONE,
            *(own.get(n, NONE) for n in names),
        ]
        lines.append((Cell(run.title), *map(Cell, cells)))
    notes = [run.record["costs_note"] for run in runs if run.record.get("costs_note")]
    heads = ("run", "s, asking included", "patch", *names)
    return Grid("Cost", " ".join(dict.fromkeys(notes)), tuple(map(Cell, heads)), tuple(lines))


def flagged(runs: Sequence[Any]) -> Grid:
    """Tasks without files, and records that were not asked or were asked differently."""
    lines = [(Cell(task), Cell("skipped"), Cell(why)) for task, why in (runs[0].record.get("skipped") or {}).items()]
    counts = Counter((run.name, row.where(), row.flag) for run in runs for row in run.rows if row.flag)
    lines += [
        (Cell(f"{run}{f', {where}' if where else ''}"), Cell(f"{count} records"), Cell(why))
        for (run, where, why), count in counts.items()
    ]
    note = "Nothing is cut to fit, and nothing is left out without a word."
    return Grid("Flagged", note, (Cell("run"), Cell("what"), Cell("why")), tuple(lines))


def printed(sentences: Sequence[str], grids: Sequence[Grid]) -> Group:
    """Sentences and one rich table per grid."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Text(sentence, style="bold") for sentence in sentences]
    for grid in grids:
        table = Table(
            title=grid.title, caption=grid.note, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD
        )
        for i, column in enumerate(grid.columns):
            table.add_column(
                Text(column.text), justify="left" if i == 0 or grid.title == "Flagged" else "right", overflow="fold"
            )
        for row in grid.rows:
            if len(row) == 1:
                table.add_row(Text(row[0].text, style="italic"))
            else:
                table.add_row(*map(_text, row))
        parts.append(table)
    named = [cell for grid in grids for row in (grid.columns, *grid.rows) for cell in row if cell.means]
    legend = {(cell.text.partition("/")[0], cell.means): cell.text for cell in reversed(named)}
    meanings = [Text(f"{text}: {means}", style="dim") for (_, means), text in reversed(legend.items())]
    return Group(*parts, *meanings)


def _text(cell: Cell) -> Text:
    from rich.text import Text

    mark = " ★" if cell.best else ""
    return Text.assemble((cell.text + mark, "bold" if cell.best else ""), (f"\n{cell.sub}" if cell.sub else "", "dim"))
