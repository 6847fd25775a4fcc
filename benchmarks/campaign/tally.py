"""What became of every input, and the table of it."""

from __future__ import annotations

import signal
import socket
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lmpatch
from lmpatch.errors import LmpatchError

COLUMNS = ("inputs", "refused", "same", "tracebacks", "wrong")
HEADS = ("kind", "inputs", "refused", "accepted with the same meaning", "tracebacks", "silently wrong")
EVERY = 10.0  # seconds between two lines of progress
PATIENCE = 30  # seconds after which an input counts as a hang
ASKED: list[str] = []
"""Hosts that were looked for since ``no_network`` and the last input."""
SRC = str(Path(lmpatch.__file__).parent)


class Wrong(Exception):
    """What was accepted is not what was written."""


class Hang(BaseException):
    """It took longer than ``PATIENCE``."""


@dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    how: str
    """``refused``, ``same``, ``tracebacks`` or ``wrong``."""
    error: str = ""
    at: str = ""
    """The place in lmpatch that raised."""


def attempt(act: Callable[[], object]) -> Outcome:
    """``act`` raises ``LmpatchError`` where the input is refused, ``Wrong`` where it should have been."""
    ASKED.clear()
    try:
        with patience():
            act()
        if ASKED:
            raise Wrong(f"the network was asked for {ASKED[0]}")
    except LmpatchError as error:
        if ASKED:
            return Outcome("wrong", f"refused, but the network was asked for {ASKED[0]}")
        return Outcome("refused", _line(error))
    except (Exception, Hang, SystemExit) as error:
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(SRC)]
        place = f"{own[-1].filename.removeprefix(SRC)}:{own[-1].lineno} {own[-1].name}" if own else ""
        if isinstance(error, Wrong):
            return Outcome("wrong", str(error), place)
        return Outcome("tracebacks", f"{type(error).__name__}: {_line(error)}", place)
    return Outcome("same")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def no_network() -> None:
    """Have no host found from here on, and note which one was asked for: no input may lead to one."""

    def refuse(host: Any, *_: Any, **__: Any) -> Any:
        ASKED.append(str(host))
        raise socket.gaierror(socket.EAI_NONAME, "no network here")

    socket.getaddrinfo = refuse


class Tally:
    """Counts by kind, and what failed."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.failures: list[dict[str, Any]] = []
        self.say, self.begun, self.last = say, time.monotonic(), time.monotonic()

    def run(self, kind: str, number: int, what: str, act: Callable[[], object]) -> None:
        """One input, tried and counted."""
        self.add(kind, number, what, attempt(act))

    def add(self, kind: str, number: int, what: str, outcome: Outcome) -> None:
        """Count an outcome, and keep it if it is a failure."""
        self.counts[kind].update(["inputs", outcome.how])
        if outcome.how in ("tracebacks", "wrong"):
            self.failures.append({"kind": kind, "number": number, "input": what, **asdict(outcome)})
        self.tell()

    def tell(self, force: bool = False) -> None:
        """A line of progress, every ten seconds."""
        now = time.monotonic()
        if force or now - self.last >= EVERY:
            self.last = now
            done = {column: sum(counts[column] for counts in self.counts.values()) for column in COLUMNS}
            self.say(f"{now - self.begun:6.0f} s  " + "  ".join(f"{name} {count:,}" for name, count in done.items()))

    def table(self) -> str:
        """Everything that was counted."""
        rows = [[kind, *(f"{counts[column]:,}" for column in COLUMNS)] for kind, counts in self.counts.items()]
        widths = [max(len(row[i]) for row in [list(HEADS), *rows]) for i in range(len(HEADS))]
        lines = []
        for kind, *cells in [list(HEADS), *rows]:
            numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([kind.ljust(widths[0]), *numbers]))
        return "\n".join(lines)

    @property
    def failed(self) -> int:
        """Tracebacks and silently wrong ones."""
        return len(self.failures)


@contextmanager
def patience(seconds: int = PATIENCE) -> Iterator[None]:
    """Raise ``Hang`` in the block once it has taken so long. Reads of a pipe end too. POSIX, main thread."""

    def ring(*_: Any) -> None:
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def to_stdout(line: str) -> None:
    """A line that is seen at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
