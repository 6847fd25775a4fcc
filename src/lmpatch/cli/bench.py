"""``lmpatch bench``: measure a model with and without patches."""

from __future__ import annotations

import json
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
    Patches,
    Raw,
    Settings,
    Text,
    material,
    named,
    open_model,
    open_patches,
    writable,
)
from .screen import draw, keep, progress, say


def bench(
    context: typer.Context,
    model: Model,
    name: Annotated[
        str, typer.Argument(metavar="BENCH", help="A name from `lmpatch methods`.", autocompletion=named("benches"))
    ],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="What the bench reads: a JSONL file of facts, or a folder of tasks.")
    ],
    patch: Patches = None,
    method: Annotated[str | None, typer.Option(metavar="METHOD", help="Make the patches with this method.")] = None,
    method_settings: Annotated[
        list[str] | None, typer.Option("--method-set", metavar="KEY=VALUE", help="A setting of the method; may repeat.")
    ] = None,
    settings: Settings = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many records.")] = None,
    unrelated: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Questions that edits must leave alone.")
    ] = None,
    text: Text = None,
    anchors: Anchors = None,
    editor: EditorFile = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="OUT", help="Folder for rows and report.html; a run there is continued."),
    ] = None,
    mount: Mount = None,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    download: Download = False,
) -> None:
    """Measure a model on data: with patches, with patches a method makes, or alone.

    The unpatched model is always in the table, for facts also the fact in the prompt. Several patches are put on in
    this order.

    \b
    Examples:
      lmpatch bench gemma-3-270m facts facts.jsonl -p eiffel
      lmpatch bench gemma-3-270m general data -p eiffel --set n=100 -o runs/general
      lmpatch bench gemma-3-270m facts counterfact.jsonl --method memit --set n=100 --limit 100 -o runs/memit
    """
    from .. import api, registry
    from ..config import parse

    chosen = parse(registry.get("benches", name).Config, settings or [])
    of_method = parse(registry.get("methods", method).Config, method_settings or []) if method else {}
    patches, files = open_patches(patch), material(text, anchors, editor)
    if out is not None:
        writable(out)
    kept = f"What was scored is in {out}; the same command goes on from there." if out else "Nothing was kept: give -o."
    lm = open_model(model, dtype, device, download, raw=raw)
    keep(context, kept)
    with progress(f"{name} at work") as bar:
        report = api.bench(
            lm, name, data, patch=patches or None, method=method, method_settings=of_method,
            mount=mount, limit=limit, unrelated=unrelated, out=out, progress=bar,
            **files, **chosen,
        )  # fmt: skip
    draw(report.table(), **json.loads(report.to_json()))
    if out is not None:
        page = report.save_html(out / "report.html")
        say(f"rows and page in {out}: {page}", path=out, page=page)
