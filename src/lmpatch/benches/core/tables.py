"""The verdict and the tables of a report as plain values; the terminal and the page draw the same ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...resources import format_bytes
from .contract import BASE, Measure
from .stats import REPETITION, Number

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

NONE = "-"
WIDE = 6  # runs that stand side by side; more are listed below each other
NAME = 30  # letters of a name that a terminal never breaks
NAMED = 3  # numbers that a sentence of the verdict names
SENTENCES = 4  # patched runs with a sentence each; of more, the best has one
CLEAR = 2.0  # standard errors from which a difference is called one
ENOUGH = 30  # records below which nothing is called better
NOTE = (
    "Shares in %. ± one standard error (the larger one where records come in clusters; none where all agree), n: "
    "records. Below: the difference from the unpatched model, record by record; = marks one within a standard error. "
    f"★: the best, of three or more runs without the unpatched one, from n = {ENOUGH} on."
)
Moved = Mapping[str, Mapping[str, Number]]


class Cell(NamedTuple):
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


class Grid(NamedTuple):
    """One table."""

    title: str
    note: str
    columns: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """A row of one cell is a heading."""


def label(name: str) -> str:
    """A full name as people read it; ``metric`` takes the same, the split apart."""
    base, _, split = name.partition("@")
    return f"{base} ({split})" if split else base


def show(measure: Measure, value: float, error: float | None = None, signed: bool = False) -> str:
    """A value in its unit, and its error."""
    sign, spread = "+" if signed else "", f" ±{show(measure, error)}" if error else ""
    return (f"{100 * value:{sign}.1f}" if measure.unit == "%" else f"{value:{sign}.3g}") + spread


def verdict(runs: Sequence[Any], moved: Moved) -> list[str]:
    """A sentence a patched run: what is clearly better, what clearly worse, and what the errors leave open."""
    if not (patched := [run for run in runs if moved.get(run.name) and not run.record["baseline"]]):
        first = runs[0]
        heads = [
            f"{label(n)} {show(first.measure(n), first.metrics()[n].value)}{' %' * (first.measure(n).unit == '%')}"
            for n in _headlines(first)[: 2 * NAMED]
        ]
        return [f"{first.title}: {', '.join(heads) or 'no numbers yet'}. Nothing is patched."]
    if len(patched) <= SENTENCES:
        return [_sentence(run, moved[run.name]) for run in patched]
    head = next((n for n in _headlines(patched[0]) if patched[0].measure(n).better == "more"), "")
    if not (rivals := [run for run in patched if head in run.metrics() and run.metrics()[head].n >= ENOUGH]):
        return [f"{len(patched)} patched runs; the table has their numbers."]
    best = max(rivals, key=lambda run: run.metrics()[head].value)
    told = f"Of {len(patched)} patched runs {best.title} has the highest {label(head)}."
    return [told, _sentence(best, moved[best.name])]


def _sentence(run: Any, moved: Mapping[str, Number]) -> str:
    every = [n for n in _headlines(run) if n in moved and run.measure(n).better]
    judged = [n for n in every if moved[n].n >= ENOUGH]
    sides: dict[str, list[tuple[float, str]]] = {"better": [], "worse": []}
    for name in judged:
        measure, value, error = run.measure(name), moved[name].value, moved[name].error or 0.0
        if value and abs(value) >= CLEAR * error:
            better = (value > 0) == (measure.better == "more")
            text = f"{label(name)} {show(measure, value, signed=True)}{f' ± {show(measure, error)}' if error else ''}"
            sides["better" if better else "worse"].append((-abs(value) / (error or 1e-12), text))
    parts = []
    for side, pairs in sides.items():
        names = [text for _, text in sorted(pairs, key=lambda pair: pair[0])]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        parts += [f"{side} in {', '.join(names[:NAMED])}{more}"] if names else []
    left = len(judged) - sum(map(len, sides.values()))
    parts += [f"no clear difference in {left} of {len(judged)} numbers"] if left else []
    if few := sorted({moved[n].n for n in every if n not in judged}):
        where = f" in {len(every) - len(judged)} of {len(every)} numbers" if judged else ""
        parts.append(f"too few for a verdict{where}: n = {few[0]}{f' to {few[-1]}' if len(few) > 1 else ''}")
    return f"{run.title} against the unpatched model: {'; '.join(parts) or 'nothing to compare'}."


def beaten(prompt: Any, name: str, minus: Sequence[tuple[Any, Number | None]]) -> list[str]:
    """Which patched runs lose to the best prompt in a number, and which do not beat it beyond the error.

    Args:
        minus: each run and its difference from the prompt's; None: it has none.
    """
    lost: list[tuple[str, str]] = []
    level: list[tuple[str, str]] = []
    for run, moved in minus:
        if moved is not None and (moved.value <= 0 or moved.value < CLEAR * (moved.error or 0.0)):
            clear = moved.n >= ENOUGH and moved.value < 0 and -moved.value >= CLEAR * (moved.error or 0.0)
            change = show(run.measure(name), moved.value, moved.error, signed=True)
            (lost if clear else level).append((run.title, change))
    verbs = ((lost, "loses to", "lose to"), (level, "does not clearly beat", "do not clearly beat"))
    return [
        f"{', '.join(f'{title} ({change})' for title, change in some)} {one if len(some) == 1 else many} the prompt "
        f"{prompt.title!r} in {label(name)}: prefer the prompt."
        for some, one, many in verbs
        if some
    ]


def _headlines(run: Any) -> list[str]:
    return [name for name in run.metrics() if run.measure(name).headline]


def kept(run: Any, every: bool) -> list[str]:
    """The numbers of a run that a table shows: those it is remembered by with how answers repeat themselves, or every
    one."""
    shown = [name for name in run.metrics() if run.measure(name).shown]
    few = [name for name in shown if run.measure(name).headline]
    return shown if every or not few else [name for name in shown if name in few or name in REPETITION]


def comparison(runs: Sequence[Any], moved: Moved, every: bool = True) -> Grid:
    """The numbers of every run, baselines included, the best of each marked."""
    homes: dict[str, Any] = {}  # the first run that has the number
    for run in runs:
        for name in kept(run, every):
            homes.setdefault(name, run)
    order, chances, first = list(runs[0].bench.metrics.values()), runs[0].chances, runs[0].record
    heads = [Cell("number"), *([Cell("guessing")] if chances else [])]
    heads += [Cell(run.title, "baseline" if run.record["baseline"] else "") for run in runs]
    lines: list[tuple[Measure, tuple[Cell, ...]]] = []
    for name in sorted(homes, key=lambda name: order.index(homes[name].measure(name))):
        measure, protocol = homes[name].measure(name), homes[name].metrics()[name].protocol
        own = protocol not in ("", homes[name].record.get("protocol_id"))
        means = f"{measure.means} [{protocol}]" if own else measure.means
        guess = [Cell(show(measure, chances[name]) if name in chances else NONE)] if chances else []
        lines.append((measure, (Cell(label(name), means=means), *guess, *_cells(runs, name, measure, moved))))
    note = NOTE + (f" Protocol {first['protocol_id']}." if "protocol_id" in first else "")
    if more := len({name for run in runs for name in kept(run, True)} - homes.keys()):
        note += f" {more} more numbers: --all, or table(every=True)."
    if len(runs) > WIDE:
        few = [line for measure, line in lines if measure.headline]
        columns = (Cell("run"), *(line[0] for line in few))
        below = tuple((heads[i], *(line[i] for line in few)) for i in range(1, len(heads)))
        return Grid("Comparison", f"{note} All other numbers: to_json().", columns, below)
    rows: list[tuple[Cell, ...]] = []
    group = ""
    for measure, line in lines:
        rows += [(Cell(measure.group),)] if measure.group not in ("", group) else []
        rows.append(line)
        group = measure.group
    return Grid("Comparison", note, tuple(heads), tuple(rows))


def _cells(runs: Sequence[Any], name: str, measure: Measure, moved: Moved) -> list[Cell]:
    """One a run, the best of at least two different ones marked."""
    values = {run.name: run.metrics()[name].value for run in runs if name in run.metrics()}
    if len(values) > 2:  # against itself the unpatched model is as it was; who comes next says more
        values.pop(BASE, None)
    best, enough = None, all(run.metrics()[name].n >= ENOUGH for run in runs if run.name in values)
    if measure.better and enough and len(set(values.values())) > 1:
        best = max(values.values()) if measure.better == "more" else min(values.values())
    cells = []
    for run in runs:
        if (number := run.metrics().get(name)) is None:
            cells.append(Cell(NONE))
            continue
        dropped = f", {number.dropped} not asked" if number.dropped else ""
        weight = f" ({number.weight:,} tokens)" if number.weight else ""
        sub = f"n={number.n}{weight}{dropped}"
        if (change := moved[run.name].get(name)) is not None:
            sub = f"{show(measure, change.value, change.error, True)}{' =' if change.within else ''}\n{sub}"
        share = number.value if measure.unit == "%" else None
        marked = best is not None and values.get(run.name) == best
        cells.append(Cell(show(measure, number.value, number.error), sub, share, marked))
    return cells


def costs(runs: Sequence[Any]) -> Grid:
    """Seconds, bytes, and what the bench adds in ``costs``."""
    names = list(dict.fromkeys(name for run in runs for name in run.record.get("costs", {})))
    lines = []
    for run in runs:
        if not run.record["baseline"] and "seconds" in run.record:
            size, own = run.record.get("bytes"), run.record.get("costs", {})
            cells = [run.title, f"{run.record['seconds']:.3g}", format_bytes(size) if size else NONE]
            lines.append(tuple(map(Cell, [*cells, *(own.get(name, NONE) for name in names)])))
    notes = [run.record["costs_note"] for run in runs if run.record.get("costs_note")]
    heads = ("run", "s, asking included", "patch", *names)
    return Grid("Cost", " ".join(dict.fromkeys(notes)), tuple(map(Cell, heads)), tuple(lines))


def flagged(runs: Sequence[Any]) -> Grid:
    """Tasks without files, and records that were not asked or were asked differently."""
    lines = [(task, "skipped", why) for task, why in (runs[0].record.get("skipped") or {}).items()]
    counts = Counter((run.name, row.where(), row.flag) for run in runs for row in run.rows if row.flag)
    lines += [
        (f"{run}{f', {where}' if where else ''}", f"{count} records", why)
        for (run, where, why), count in counts.items()
    ]
    note = "Nothing is cut to fit, and nothing is left out without a word."
    cells = tuple(tuple(map(Cell, line)) for line in [("run", "what", "why"), *lines])
    return Grid("Flagged", note, cells[0], cells[1:])


def printed(sentences: Sequence[str], grids: Sequence[Grid]) -> Group:
    """Sentences and one rich table per grid."""
    from rich import box
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Text(sentence, style="bold") for sentence in sentences]
    for grid in grids:
        table = Table(
            title=grid.title, caption=grid.note, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD
        )
        names = [len(row[0].text) for row in (grid.columns, *grid.rows)]
        for i, column in enumerate(grid.columns):
            justify: Any = "left" if i == 0 or grid.title == "Flagged" else "right"
            width = min(NAME, max(names)) if i == 0 else None  # a name stays whole
            table.add_column(Text(column.text), justify=justify, overflow="fold", width=width)
        for row in grid.rows:
            table.add_row(*([Text(row[0].text, style="italic")] if len(row) == 1 else map(_text, row)))
        parts.append(table)
    named = [cell for grid in grids for row in (grid.columns, *grid.rows) for cell in row if cell.means]
    legend = {(cell.text.partition("/")[0], cell.means): cell.text for cell in reversed(named)}
    meanings = [Text(f"{text}: {means}", style="dim") for (_, means), text in reversed(legend.items())]

    class Printed(Group):
        """Also as plain text, 100 columns wide."""

        def __str__(self) -> str:
            console = Console(width=100, color_system=None)
            with console.capture() as capture:
                console.print(self)
            return capture.get()

    return Printed(*parts, *meanings)


def _text(cell: Cell) -> Text:
    from rich.text import Text

    mark, sub = " ★" if cell.best else "", f"\n{cell.sub}" if cell.sub else ""
    return Text.assemble((cell.text + mark, "bold" if cell.best else ""), (sub, "dim"))
