"""Where files go and how they are written: the cache folder, and files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import BadInput


def cache_dir() -> Path:
    """Where converted models and statistics are kept: $LMPATCH_CACHE, $XDG_CACHE_HOME/lmpatch or ~/.cache/lmpatch."""
    if own := os.environ.get("LMPATCH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmpatch"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file under, which takes its place once the block ends well.

    After an error nothing is left of it and ``path`` is as it was. Folders on the way are made. A file that must
    outlast a power cut is synced in the block.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # of its own: several processes may write one cache
    try:
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the file or folder on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(path: Path, *, replace: tuple[str, ...] = ()) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` once the block ends well; after an error nothing is left of it.

    Args:
        replace: a folder that is there already is replaced if it holds these files and no others.
    Raises:
        BadInput: something else is there.
    """
    path = Path(os.path.realpath(path.expanduser()))
    if path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} in (set(), set(replace))):
        raise BadInput(f"{path} exists and is not what would be replaced. Give another path, or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.parent / f".{path.name}.{uuid.uuid4().hex}.{end}" for end in ("new", "old"))
    new.mkdir()
    try:
        yield new
        for file in (*new.rglob("*"), new):
            sync(file)
        if path.exists():
            os.replace(path, old)  # a folder cannot be renamed over a full one
        try:
            os.replace(new, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
        sync(path.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
