"""What the terminal shows: tables, a progress bar, one line of complaint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..progress import Progress


def _leads() -> bool:
    """Of several processes only the first one speaks."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """One line on stdout, as it is."""
    if _leads():
        typer.echo(text)


def note(text: str) -> None:
    """One line on stderr that is no complaint."""
    if _leads():
        typer.echo(text, err=True)


def complain(text: str) -> None:
    """One line on stderr, whatever line breaks the text has."""
    typer.echo("lmpatch: " + " ".join(text.split()), err=True)


def keep(context: typer.Context, text: str) -> None:
    """Say what Ctrl-C would leave from here on; the error boundary prints it."""
    context.meta["kept"] = text


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A table on stdout; numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        numbers = rows and all(isinstance(row[i], (int, float)) for row in rows)
        grid.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(escape(_cell(value)) for value in row))
    Console().print(grid)


def draw(drawing: Any) -> None:
    """Anything rich can draw, on stdout."""
    from rich.console import Console

    Console().print(drawing)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@contextmanager
def progress() -> Iterator[Progress]:
    """A ``progress(done, total, what)`` callback drawn as one bar per ``what``; silent where nobody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (console.is_terminal and _leads())) as bars:
        tasks: dict[str, Any] = {}

        def report(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report
