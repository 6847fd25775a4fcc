"""Inputs tried in a process of their own: one that hangs in a library's own code, or is killed, fails alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from .tally import PATIENCE, Outcome, Tally, attempt

Make = Callable[[int], tuple[str, Callable[[], None]]]
"""Number of an input -> what it is, and the call that tries it."""
BATCH = 500  # inputs of one process


def try_all(tally: Tally, kind: str, numbers: Sequence[int], make: Make) -> None:
    """Try every input; POSIX only, since a process is forked with all that is loaded."""
    left = list(numbers)
    while left:
        mine, theirs = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if child == 0:
            mine.close()
            _work(theirs, left[:BATCH], make)
        theirs.close()
        left = left[_listen(tally, kind, mine, child, min(BATCH, len(left))) :]
        mine.close()


def _work(pipe: Connection, numbers: Sequence[int], make: Make) -> None:
    try:
        for number in numbers:
            what, act = make(number)
            pipe.send((number, what, None))
            pipe.send((number, what, attempt(act)))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _listen(tally: Tally, kind: str, pipe: Connection, child: int, count: int) -> int:
    """Count what the child says; how many inputs are done with. The one it dies of is a failure."""
    done, number, what = 0, -1, "making an input"
    while done < count:
        try:
            if not pipe.poll(PATIENCE + 10):
                raise TimeoutError
            number, what, outcome = pipe.recv()
        except (EOFError, TimeoutError) as error:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            how = "Hang: killed" if isinstance(error, TimeoutError) else f"the process died, status {status}"
            tally.add(kind, number, what, Outcome("tracebacks", how))
            return done + 1
        if outcome is not None:
            tally.add(kind, number, what, outcome)
            done += 1
        tally.tell()
    os.waitpid(child, 0)
    return done
