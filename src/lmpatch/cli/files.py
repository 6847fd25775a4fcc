"""``lmpatch show``, ``merge``, ``export``: what can be done with patch folders; ``cache``: what else lies on disk."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ..errors import BadInput
from ..files import cache_dir
from .options import Out, Source, arg, naming, open_patches, opt
from .screen import say, table

if TYPE_CHECKING:
    from ..patches.patch import Patch

CACHED = {
    "moments": "covariances of activations, for rome and memit",
    "samples": "texts that models wrote themselves, for covariances",
    "closed_book": "answers without documents, for rag and parenting",
}


def show(patch: Annotated[Path, arg("PATCH", "A patch or memory folder.")]) -> None:
    """What a patch holds, what it was made for and how. Needs no model.

    lmpatch show eiffel
    """
    _say(*open_patches([patch]))


def merge(
    patches: Annotated[list[Path], arg("PATCH...", "Two or more patch folders.")],
    out: Out,
) -> None:
    """Several patches of one model as one patch: additions sum, scales multiply.

    lmpatch merge eiffel colosseum -o monuments
    """
    from ..patches.file import load_patch
    from ..patches.merge import merge as merged

    if len(patches) < 2:
        raise BadInput(f"merge makes one patch of several, and {patches[0]} is one. Give two or more.")
    patch = merged(*(load_patch(path) for path in patches))
    patch.save(out)
    _say(patch)
    say(f"saved in {out}", path=out)


def export(
    source: Source,
    patch: Annotated[Path, opt("The patch folder to export.", "PATCH", "-p", "--patch")],
    out: Out,
    to: Annotated[Literal["peft", "checkpoint"], opt("A LoRA adapter, or a whole patched model.")] = "peft",
    rank: Annotated[int | None, opt("PEFT: cut every change to this rank at most. Default: exact.", "N", min=1)] = None,
) -> None:
    """Write a patch in a form that other libraries load without lmpatch.

    lmpatch export gemma-3-270m -p eiffel --to peft -o adapter
    lmpatch export gemma-3-270m -p tuned --rank 64 -o adapter
    lmpatch export gemma-3-270m -p eiffel --to checkpoint -o gemma-in-rome
    """
    from ..patches.export import export as write
    from ..patches.file import load_patch

    loaded = load_patch(patch)
    done = write(source.open(), loaded, to=to, out=out, rank=rank)
    say(f"{to} written to {out}", path=out, to=to, ranks=done.ranks, discarded=done.discarded)
    lost = max(done.discarded.values(), default=0.0)
    if lost > 0:
        say(f"rank {rank} leaves out at most {lost:.2%} of a change (share of its squared norm)")


def cache(
    clear: Annotated[bool, opt("Remove what is listed. It is made again when it is needed.", None, "--clear")] = False,
) -> None:
    """What lmpatch keeps on this machine: converted models and statistics, with their paths and sizes.

    lmpatch cache
    lmpatch cache --clear
    """
    from ..resources import format_bytes  # needs torch

    found = {path: what for path in sorted(cache_dir().glob("*")) if (what := _cached(path))}
    sizes = [sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in found]
    rows = [(path.name, what, format_bytes(size)) for (path, what), size in zip(found.items(), sizes, strict=True)]
    say(f"{cache_dir()}: {format_bytes(sum(sizes))}", path=cache_dir(), bytes=sum(sizes), cleared=clear)
    table(["folder", "what", "size"], rows)
    with naming(cache_dir(), "cleared"):
        for path in found if clear else ():
            shutil.rmtree(path)
            say(f"removed {path}")


def _cached(path: Path) -> str:
    """What a folder holds that lmpatch made; nothing for any other."""
    model = re.fullmatch(r".+-[0-9a-f]{16}", path.name) and (path / "config.json").is_file()
    ours = path.is_dir() and not path.is_symlink()
    return CACHED.get(path.name, "a converted model" if model else "") if ours else ""


def _say(patch: Patch) -> None:
    known = {"kind": patch.kind, "method": patch.method, "config": patch.config, "made": patch.made}
    base = {"name": patch.base.name, "fingerprint": patch.base.fingerprint}
    say(about(patch), **known, base=base, edits=list(patch.edits), bytes=patch.nbytes, hash=patch.hash())


def about(patch: Patch) -> str:
    """Its summary; of one that was made of settings alone, these."""
    if patch.edits or patch.nbytes:
        return patch.summary()
    settings = ", ".join(f"{name}={value}" for name, value in patch.config.items())
    return f"{patch.method} for {patch.base.name} ({patch.base.fingerprint[:12]}): {settings}"
