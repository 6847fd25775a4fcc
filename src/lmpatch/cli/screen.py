"""What a command shows: tables, lines, a progress bar, one line of complaint; with ``--json`` one JSON object."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..progress import Progress

HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Signs that steer a terminal, turn the order of letters around, or are half a letter."""
EVERY = 10.0  # seconds between two lines of progress where there is no terminal
_values: ContextVar[dict[str, Any] | None] = ContextVar("values", default=None)
"""What the running command shows as one JSON object; None without ``--json``."""


@contextmanager
def output(as_json: bool) -> Iterator[None]:
    """With ``as_json``, everything shown in the block becomes one JSON object on stdout at its end."""
    values: dict[str, Any] = {}
    token = _values.set(values if as_json else None)
    done: typer.Exit | None = None
    try:
        yield
    except typer.Exit as error:  # done, with an exit code that says what was not kept
        done = error
    finally:
        _values.reset(token)
    if as_json and leads():
        ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
        text = json.dumps(values, indent=1, ensure_ascii=ascii_only, default=_plain)
        print(HIDDEN.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text), flush=True)
    if done:
        raise done


def _plain(value: object) -> object:
    """What JSON has no form for: a number of torch or numpy as a number, all else as text."""
    item = getattr(value, "item", None)
    return str(value) if item is None else item()


def leads() -> bool:
    """Of several processes only the first one speaks."""
    return os.environ.get("RANK", "0") == "0"


def clean(text: str) -> str:
    """The text with every sign of ``HIDDEN`` as an escape that can be read."""
    return HIDDEN.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


def _shown(values: dict[str, Any]) -> bool:
    """Whether text is shown; with ``--json`` the values are kept in its place."""
    if (collected := _values.get()) is not None:
        collected.update(values)
    return collected is None and leads()


def say(text: str = "", **values: object) -> None:
    """One line on stdout, as it is; with ``--json`` the values in its place."""
    if _shown(values):
        print(clean(text), flush=True)


def note(text: str) -> None:
    """One line on stderr that is no complaint."""
    if leads():
        print(clean(text), file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """One line on stderr, whatever line breaks the text has."""
    print(clean("lmpatch: " + " ".join(text.split())), file=sys.stderr, flush=True)


def keep(context: typer.Context, text: str) -> None:
    """Say what Ctrl-C would leave from here on; the error boundary prints it."""
    context.meta["kept"] = text


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None, *, key: str = "rows"
) -> None:
    """A table on stdout; numbers to the right. With ``--json`` a list of objects under ``key``."""
    if not _shown({key: [dict(zip(columns, row, strict=True)) for row in rows]}):
        return
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    grid = Table(title=title and escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        numbers = rows and all(isinstance(row[i], (int, float)) for row in rows)
        grid.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(escape(f"{value:.3g}" if isinstance(value, float) else str(value)) for value in row))
    draw(grid)


def draw(drawing: Any, **values: object) -> None:
    """Anything rich can draw, on stdout; with ``--json`` the values in its place."""
    if _shown(values):
        from rich.console import Console
        from rich.segment import Segment, Segments

        console = Console()
        parts = [Segment(clean(part.text), part.style) for part in console.render(drawing)]
        with console.capture() as drawn:  # rich ends the process with code 1 where the reader went away
            console.print(Segments(parts), end="", crop=False)
        print(drawn.get(), end="", flush=True)


@contextmanager
def progress(start: str = "working") -> Iterator[Progress]:
    """A ``progress(done, total, what)`` callback: a bar for each ``what`` on a terminal, elsewhere a line every ten
    seconds on stderr, which says ``start`` until the first call.
    """
    from rich.console import Console

    console = Console(stderr=True)
    with _bars(console) if console.is_terminal and leads() else _lines(start) as report:
        yield report


@contextmanager
def _bars(console: Any) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    words = TextColumn("{task.description}", markup=False)
    columns: list[Any] = [words, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    # what a command says in a block goes to stdout: through the bar only where that is the same terminal
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bars:
        tasks: dict[str, Any] = {}

        def report(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(clean(what), total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


@contextmanager
def _lines(start: str) -> Iterator[Progress]:
    state, stop, begun = [start], Event(), monotonic()

    def tick() -> None:
        while not stop.wait(EVERY):
            note(f"{state[0]} ({monotonic() - begun:.0f} s)")

    def report(done: int, total: int, what: str) -> None:
        state[0] = f"{what}: {done:,} of {total:,}"

    thread = Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        stop.set()
        thread.join()
