"""``lmpatch show``, ``merge`` and ``export``: what can be done with patch folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Device, Download, Dtype, Model, Out, new_path, open_model, open_patch
from .screen import say

Folder = Annotated[Path, typer.Argument(metavar="PATCH", help="A patch or memory folder.")]


def show(patch: Folder) -> None:
    """What a patch holds, what it was made for and how. Needs no model.

    \b
    Example:
      lmpatch show eiffel
    """
    say(open_patch(patch).summary())


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
    say(patch.summary())
    say(f"saved in {out}")


def export(
    model: Model,
    patch: Annotated[Path, typer.Option("-p", "--patch", metavar="PATCH", help="The patch folder to export.")],
    out: Out,
    to: Annotated[
        Literal["peft", "checkpoint"], typer.Option(help="A LoRA adapter, or a whole patched model.")
    ] = "peft",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    download: Download = False,
) -> None:
    """Write a patch in a form that other libraries load without lmpatch.

    \b
    Examples:
      lmpatch export gemma-3-270m -p eiffel --to peft -o adapter
      lmpatch export gemma-3-270m -p eiffel --to checkpoint -o gemma-in-rome
    """
    from ..patches.export import export as write
    from ..patches.file import load_patch

    new_path(out)
    loaded = load_patch(patch)
    lm = open_model(model, dtype, device, download)
    write(lm, loaded, to=to, out=out)
    say(f"{to} written to {out}")
