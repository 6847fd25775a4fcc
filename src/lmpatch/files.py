"""Files: where the cache is, a reader that checks type and size first, a writer that leaves all or nothing."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BadInput, CannotWrite, LmpatchError

FULL = ("No space left", "File too large", "quota exceeded", "os error 28", "os error 27", "os error 122")


def cache_dir() -> Path:
    """Where converted models and statistics are kept: $LMPATCH_CACHE, $XDG_CACHE_HOME/lmpatch or ~/.cache/lmpatch."""
    if own := os.environ.get("LMPATCH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmpatch"


@contextmanager
def outside(what: str, error: type[LmpatchError] = BadInput) -> Iterator[None]:
    """Whatever a library raises inside the block, about a file that came from outside, becomes one line of ours.

    Args:
        what: the file and what it should be, ``"config.json of MODEL"``.
        error: the class it becomes. Errors of lmpatch pass as they are; so do ``MemoryError`` and interrupts.
    """
    try:
        yield
    except (LmpatchError, MemoryError):
        raise
    except FileNotFoundError as cause:
        raise error(f"{what} cannot be read: there is no such file.") from cause
    except Exception as cause:  # libraries raise classes of their own
        lines = str(cause).splitlines() or [type(cause).__name__]
        raise error(f"{what} cannot be read: {lines[0][:200]}.") from cause


def read_bytes(path: Path, what: str = "", error: type[LmpatchError] = BadInput, limit: int | None = None) -> bytes:
    """The bytes of an ordinary file; its type and size are looked at before it is opened.

    Args:
        what: what the file should be, for the message; its path where empty.
        limit: refuse more bytes than this.
    Raises:
        error: there is no such file, it is a folder, pipe or device, too large, or cannot be read.
    """
    what = f"{what} {path}".strip()
    with outside(what, error):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{what} is no ordinary file. Give the path of one.")
        if limit is not None and status.st_size > limit:
            raise error(f"{what} has {status.st_size:,} bytes; at most {limit:,} are expected there.")
        return path.read_bytes()


@contextmanager
def _refused(path: Path, error: type[LmpatchError] = CannotWrite) -> Iterator[None]:
    """What the disk refuses inside the block becomes one line of ours, whichever library was told."""
    try:
        yield
    except LmpatchError:
        raise
    except Exception as cause:
        why = (str(cause).splitlines() or [type(cause).__name__])[0]
        if not isinstance(cause, OSError) and not any(sign in why for sign in FULL):
            raise
        raise error(
            f"{path} cannot be written ({why}). What was there is whole; free some space or write elsewhere."
        ) from cause


@contextmanager
def replacing(path: Path, error: type[LmpatchError] = CannotWrite) -> Iterator[Path]:
    """A name beside ``path`` to write a file under, which takes its place once the block ends well.

    After an error nothing is left of it and ``path`` is as it was. Folders on the way are made. A file that must
    outlast a power cut is synced in the block.

    Raises:
        error: the disk is full, or refuses.
    """
    work = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # of its own: several processes may write one cache
    with _refused(path, error):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            try:
                work.touch()
                rights = stat.S_IMODE(work.stat().st_mode)
                yield work
                work.chmod(rights)  # safetensors writes files that nobody else may read
                os.replace(work, path)
            finally:
                work.unlink(missing_ok=True)
        finally:
            work.unlink(missing_ok=True)  # an interrupt may have stopped the first


def sync(path: Path) -> None:
    """Have the file or folder on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(path: Path, *, replace: tuple[str, ...] = ()) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` once the block ends well; after an error ``path`` is as it was.

    Args:
        replace: a folder that is there already is replaced if it holds these files and no others.
    Raises:
        BadInput: something else is there.
        CannotWrite: the disk is full, or refuses.
    """
    path = Path(os.path.realpath(path.expanduser()))
    if path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} in (set(), set(replace))):
        raise BadInput(f"{path} exists and is not what would be replaced. Give another path, or remove it first.")
    new, old = (path.parent / f".{path.name}.{uuid.uuid4().hex}.{end}" for end in ("new", "old"))

    def clear() -> None:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

    with _refused(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            try:
                new.mkdir()
                yield new
                rights = new.stat().st_mode & 0o666
                for file in (*new.rglob("*"), new):
                    if file.is_file():
                        file.chmod(rights)  # as in ``replacing``
                    sync(file)
                if path.exists():
                    os.replace(path, old)  # a folder cannot be renamed over a full one
                os.replace(new, path)
                sync(path.parent)
            finally:
                clear()
        finally:
            clear()  # an interrupt may have stopped the first
