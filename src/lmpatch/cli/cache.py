"""``lmpatch cache``: what lmpatch keeps for later in the user's cache, and how large it is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated

from ..errors import BadInput
from ..files import cache_dir
from ..resources import format_bytes
from .options import opt
from .screen import say, table

KNOWN = {
    "moments": "covariances of activations, for rome and memit",
    "samples": "texts that models wrote themselves, for covariances",
    "closed_book": "answers without documents, for the bench rag and parenting",
    "rates": "speeds of this processor, kept by an earlier release",
}
MODEL = re.compile(r".+-[0-9a-f]{16}")


def cache(
    clear: Annotated[bool, opt("Remove what is listed. It is made again when it is needed.", None, "--clear")] = False,
) -> None:
    """What lmpatch keeps on this machine: converted models and statistics, with their paths and sizes.

    lmpatch cache
    lmpatch cache --clear
    """
    found = kept()
    sizes = [sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in found]
    rows = [(path.name, what, format_bytes(size)) for (path, what), size in zip(found.items(), sizes, strict=True)]
    say(f"{cache_dir()}: {format_bytes(sum(sizes))}", path=cache_dir(), bytes=sum(sizes), cleared=clear)
    table(["folder", "what", "size"], rows)
    for path in found if clear else ():
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise BadInput(f"{path} cannot be removed ({error.strerror}). Remove it by hand.") from error
    if clear:
        say(f"removed {len(found)} folders")


def kept() -> dict[Path, str]:
    """The folders that lmpatch made, and what each holds; whatever else lies there is somebody's."""
    folders = sorted(path for path in cache_dir().glob("*") if path.is_dir() and not path.is_symlink())
    model = "a converted model, 32 bits a weight"
    what = {path: KNOWN.get(path.name) or (model if _is_model(path) else "") for path in folders}
    return {path: text for path, text in what.items() if text}


def _is_model(path: Path) -> bool:
    return MODEL.fullmatch(path.name) is not None and (path / "config.json").is_file()
