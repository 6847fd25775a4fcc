"""A report in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ._grid import Cell, Grid

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text


def tables(grids: Iterable[Grid]) -> Group:
    """One rich table per grid."""
    from rich.console import Group
    from rich.table import Table

    made = []
    for grid in grids:
        table = Table(title=grid.title, caption=grid.note, title_justify="left", caption_justify="left")
        for i, column in enumerate(grid.columns):
            table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in grid.rows:
            table.add_row(*map(_text, row))
        made.append(table)
    return Group(*made)


def _text(cell: Cell) -> Text:
    from rich.text import Text

    return Text.assemble(cell.text, ("\n" + cell.sub if cell.sub else "", "dim"))
