"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what) by everything that takes long."""


def progress_bar() -> Progress:
    """A ``progress=`` for notebooks and scripts: a tqdm bar for each piece of work, closed when the work is done.

    In a notebook with ipywidgets it is a widget, else a line of text on stderr.
    """
    from tqdm.auto import tqdm

    bars: dict[str, Any] = {}

    def report(done: int, total: int, what: str) -> None:
        bar = bars.get(what)
        if bar is None:
            bar = bars[what] = tqdm(total=total, desc=what)
        elif done < bar.n or total != bar.total:  # the same work once more
            bar.reset(total)
        bar.update(done - bar.n)
        if done >= total:
            bars.pop(what).close()

    return report
