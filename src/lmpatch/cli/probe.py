"""``lmpatch probe``: look at a model without changing it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Device,
    Download,
    Dtype,
    Model,
    Mount,
    Patches,
    Raw,
    Settings,
    named,
    new_path,
    open_model,
    open_patches,
    patched,
)
from .screen import keep, progress, say, table


def probe(
    context: typer.Context,
    model: Model,
    name: Annotated[
        str, typer.Argument(metavar="PROBE", help="A name from `lmpatch methods`.", autocompletion=named("probes"))
    ],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A JSONL file, one record a line.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="OUT", help="New folder for numbers (JSONL) and pictures (PNG)."),
    ] = None,
    settings: Settings = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many records.")] = None,
    patch: Patches = None,
    mount: Mount = None,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    download: Download = False,
) -> None:
    """Look inside a model on each record of a file, and leave it as it was.

    \b
    Examples:
      lmpatch probe gemma-3-270m causal_trace facts.jsonl --limit 10 -o traces
      lmpatch probe gemma-3-270m causal_trace facts.jsonl --set kind=mlp -p eiffel
      lmpatch probe gemma-3-270m integrated_gradients questions.jsonl -o neurons
    """
    import inspect

    from .. import api, registry
    from ..config import parse

    module = registry.get("probes", name)
    chosen = parse(module.Config, settings or [])
    file: dict[str, Path] = {}
    if out is not None and "out" in inspect.signature(module.run).parameters:
        file = {"out": out / f"{name}.jsonl"}  # a stopped run goes on, so this folder may exist
    elif out is not None:
        new_path(out)
    patches = open_patches(patch)
    lm = open_model(model, dtype, device, download, raw=raw)
    if out is not None:
        keep(context, f"What was written so far is in {out}.")
    with patched(lm, patches, mount), progress(f"{name} at work") as bar:
        found = api.probe(lm, name, data, limit=limit, progress=bar, **file, **chosen)
    table(*found.table())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        found.save(out)
        say(f"saved in {out}", path=out)
