"""LanceDB as a memory uses it: its errors in our words, one writer at a time, on the disk, in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..errors import LmpatchError, MissingExtra
from ..files import FULL, sync

PATIENCE = 600.0  # seconds to wait for another writer, who may be building an index
_user = 0  # the process that used LanceDB first


@contextmanager
def writing(lock: FileLock) -> Iterator[None]:
    """Be the only writer. The system frees the lock of a process that dies.

    Raises:
        LmpatchError: another process writes for minutes, or the folder cannot be written.
    """
    path = Path(lock.lock_file).parent
    same_process()
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        why = f"another process has been writing to {path} for {PATIENCE:.0f} s. Try again later."
        raise LmpatchError(why) from None
    except OSError as error:
        raise LmpatchError(f"cannot write to {path}: {error.strerror}.") from None
    try:
        yield
    finally:
        lock.release()


def same_process() -> None:
    """Raise ``LmpatchError`` in a child forked from a process that used LanceDB: without its threads calls may hang."""
    global _user
    _user = _user or os.getpid()
    if _user != os.getpid():
        raise LmpatchError(
            "this process was forked from one that had used a memory, and LanceDB may hang here. Open memories in the "
            "children alone, or start them with multiprocessing's 'spawn'."
        )


@contextmanager
def lance(failed: str, full: str = "") -> Iterator[None]:
    """LanceDB's errors as ``LmpatchError``: what failed, and after a full disk what is left."""
    same_process()
    try:
        yield
    except (LmpatchError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        why = f"the disk is full. {full}" if any(sign in text for sign in FULL) else text[:300]
        raise LmpatchError(f"{failed}: {why}") from error


def flush(folder: Path, since: int) -> None:
    """Have on the disk whatever was written below ``folder`` since this time (ns); LanceDB leaves it to the system."""
    since -= 50_000_000  # the clock of the file system is coarse
    for file in (folder, *folder.rglob("*")):
        if file.stat().st_mtime_ns >= since:
            sync(file)


def lancedb() -> Any:
    """The package, where it is installed."""
    try:
        import lancedb
    except ImportError as error:
        raise MissingExtra('a memory needs LanceDB. Run: pip install "lmpatch[memory]"') from error
    return lancedb


def matrix(column: Any) -> np.ndarray:
    """A column of vectors without nulls as [n, width]."""
    flat = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    made: np.ndarray = flat.flatten().to_numpy(zero_copy_only=False).reshape(-1, flat.type.list_size)
    return made
