"""``lmpatch show``, ``merge`` and ``export``: what can be done with patch folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .options import Device, Download, Dtype, Model, Out, new_path, open_model, open_patch
from .screen import say

if TYPE_CHECKING:
    from ..patches.patch import Patch

Folder = Annotated[Path, typer.Argument(metavar="PATCH", help="A patch or memory folder.")]


def show(patch: Folder) -> None:
    """What a patch holds, what it was made for and how. Needs no model.

    \b
    Example:
      lmpatch show eiffel
    """
    opened = open_patch(patch)
    say(opened.summary(), **_json(opened))


def _json(patch: Patch) -> dict[str, object]:
    base = {"name": patch.base.name, "fingerprint": patch.base.fingerprint}
    known = {"kind": patch.kind, "method": patch.method, "config": patch.config, "base": base, "made": patch.made}
    return known | {"edits": list(patch.edits), "bytes": patch.nbytes, "hash": patch.hash()}


def merge(
    patches: Annotated[list[Path], typer.Argument(metavar="PATCH...", help="Two or more patch folders.")],
    out: Out,
) -> None:
    """Several patches of one model as one patch: additions sum, scales multiply.

    \b
    Example:
      lmpatch merge eiffel colosseum -o monuments
    """
    from ..patches.file import load_patch
    from ..patches.merge import merge as merged

    new_path(out)
    patch = merged(*(load_patch(path) for path in patches))
    patch.save(out)
    say(patch.summary(), **_json(patch))
    say(f"saved in {out}", path=out)


def export(
    model: Model,
    patch: Annotated[Path, typer.Option("-p", "--patch", metavar="PATCH", help="The patch folder to export.")],
    out: Out,
    to: Annotated[
        Literal["peft", "checkpoint"], typer.Option(help="A LoRA adapter, or a whole patched model.")
    ] = "peft",
    rank: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="PEFT: cut every change to this rank at most. Default: exact."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    download: Download = False,
) -> None:
    """Write a patch in a form that other libraries load without lmpatch.

    \b
    Examples:
      lmpatch export gemma-3-270m -p eiffel --to peft -o adapter
      lmpatch export gemma-3-270m -p tuned --rank 64 -o adapter
      lmpatch export gemma-3-270m -p eiffel --to checkpoint -o gemma-in-rome
    """
    from ..patches.export import export as write
    from ..patches.file import load_patch

    new_path(out)
    loaded = load_patch(patch)
    lm = open_model(model, dtype, device, download)
    done = write(lm, loaded, to=to, out=out, rank=rank)
    say(f"{to} written to {out}", path=out, to=to, ranks=done.ranks, discarded=done.discarded)
    lost = max(done.discarded.values(), default=0.0)
    if lost > 0:
        say(f"rank {rank} leaves out at most {lost:.2%} of a change (share of its squared norm)")
