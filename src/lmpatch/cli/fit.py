"""``lmpatch fit``: facts in, patch folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import BadInput
from .options import (
    Anchors,
    Device,
    Download,
    Dtype,
    EditorFile,
    Model,
    Mount,
    Out,
    Patches,
    Raw,
    Settings,
    Shard,
    Text,
    material,
    named,
    new_path,
    open_model,
    open_patches,
    patched,
)
from .screen import keep, progress, say


def fit(
    context: typer.Context,
    model: Model,
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="A name from `lmpatch methods`.", autocompletion=named("methods"))
    ],
    out: Out,
    facts: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FACTS]", help="A JSONL file, one fact (or question with context) a line; decode rules need none."
        ),
    ] = None,
    settings: Settings = None,
    text: Text = None,
    anchors: Anchors = None,
    editor: EditorFile = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Checkpoints of a long fit; a run there goes on where it stopped."),
    ] = None,
    patch: Patches = None,
    mount: Mount = None,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    download: Download = False,
    shard: Shard = False,
) -> None:
    """Make a patch that writes facts into a model.

    Patches given with -p are on the model meanwhile: the new patch is made for a model that already has them.

    \b
    Examples:
      lmpatch fit gemma-3-270m rome facts.jsonl -o eiffel
      lmpatch fit gemma-3-270m ircan questions.jsonl -o listens --set neurons=16 --set factor=2
      lmpatch fit gemma-3-270m cad -o trusting --set alpha=1
      lmpatch fit gemma-3-270m parenting sets/train.jsonl -o balanced --work balanced.work
      accelerate launch -m lmpatch fit ./my-model parenting sets/train.jsonl -o balanced --shard
      lmpatch fit ./my-model memit more.jsonl -o more -p eiffel --set layers=5,6,7
    """
    from .. import api, registry
    from ..config import parse
    from ..distributed import world

    new_path(out)
    found = registry.method(method)
    chosen = parse(found.config, settings or [], method)
    if facts is None and found.needs_records:
        raise BadInput(f"{method} learns from records. Name a file of them behind {method}.")
    edits = found.record.read(facts, check=True) if facts and found.record else []
    patches, files = open_patches(patch), material(text, anchors, editor)
    lm = open_model(model, dtype, device, download, shard, raw)
    kept = f" {work} holds the last whole step; the same command goes on from there." if work else ""
    keep(context, f"The model is as it was and {out} was not written.{kept}")
    with patched(lm, patches, mount), progress(f"{method} at work") as bar:
        made = api.fit(lm, method, edits, out=work, progress=bar, **files, **chosen)
    if world().is_main:
        made.save(out)
    say(made.summary(), method=method, edits=len(made.edits), bytes=made.nbytes, hash=made.hash())
    say(f"saved in {out}", path=out)
