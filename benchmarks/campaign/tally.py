"""What became of every input, and the table of it."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmpatch
from lmpatch.errors import LmpatchError

COLUMNS = ("inputs", "refused", "same", "tracebacks", "wrong")
HEADS = ("kind", "inputs", "refused", "accepted with the same meaning", "tracebacks", "silently wrong")
EVERY = 10.0  # seconds between two lines of progress
PATIENCE = 30  # seconds after which an input counts as a hang
SRC = str(Path(lmpatch.__file__).parent)


class Wrong(Exception):
    """What was accepted is not what was written."""


class Hang(BaseException):
    """It took longer than ``PATIENCE``."""


class Tally:
    """Counts by kind, and what failed."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.failures: list[dict[str, Any]] = []
        self.say, self.begun, self.last = say, time.monotonic(), time.monotonic()

    def run(self, kind: str, number: int, what: str, act: Callable[[], object]) -> None:
        """One input: ``act`` raises ``LmpatchError`` where it is refused, ``Wrong`` where it should have been."""
        self.counts[kind]["inputs"] += 1
        try:
            with patience():
                act()
            self.counts[kind]["same"] += 1
        except LmpatchError:
            self.counts[kind]["refused"] += 1
        except Wrong as error:
            self.fail(kind, number, what, "wrong", str(error))
        except (Exception, Hang, SystemExit) as error:
            self.fail(kind, number, what, "tracebacks", f"{type(error).__name__}: {error}", error)
        self.tell()

    def fail(self, kind: str, number: int, what: str, how: str, line: str, error: BaseException | None = None) -> None:
        """Count and keep a failure, with the place in lmpatch that it came from."""
        self.counts[kind][how] += 1
        frames = traceback.extract_tb(error.__traceback__) if error else []
        own = [f for f in frames if f.filename.startswith(SRC)]
        place = f"{own[-1].filename.removeprefix(SRC)}:{own[-1].lineno} {own[-1].name}" if own else ""
        head = " ".join(line.split())[:200]
        self.failures.append({"kind": kind, "number": number, "input": what, "how": how, "error": head, "at": place})

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
