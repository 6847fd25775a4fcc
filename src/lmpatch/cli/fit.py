"""``lmpatch fit``: facts in, patch folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    Settings,
    Text,
    material,
    new_path,
    open_model,
    patched,
)
from .screen import keep, progress, say


def fit(
    context: typer.Context,
    model: Model,
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A name from `lmpatch methods`.")],
    facts: Annotated[
        Path, typer.Argument(metavar="FACTS", help="A JSONL file, one fact (or question with context) a line.")
    ],
    out: Out,
    settings: Settings = None,
    text: Text = None,
    anchors: Anchors = None,
    editor: EditorFile = None,
    patch: Patches = None,
    mount: Mount = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    download: Download = False,
) -> None:
    """Make a patch that writes facts into a model.

    Patches given with -p are on the model meanwhile: the new patch is made for a model that already has them.

    \b
    Examples:
      lmpatch fit gemma-3-270m rome facts.jsonl -o eiffel
      lmpatch fit gemma-3-270m ircan questions.jsonl -o listens --set neurons=8 --set factor=5
      lmpatch fit ./my-model memit more.jsonl -o more -p eiffel --set layers=5,6,7
    """
    from .. import api, registry
    from ..settings import parse

    new_path(out)
    module = registry.get("methods", method)
    chosen = parse(module.Config, settings or [])
    edits = api.read(module, facts, check=True)
    lm = open_model(model, dtype, device, download)
    keep(context, f"The model is as it was and {out} was not written.")
    with patched(lm, patch or [], mount), progress() as bar:
        made = api.fit(lm, method, edits, progress=bar, **material(text, anchors, editor), **chosen)
    made.save(out)
    say(made.summary())
    say(f"saved in {out}")
