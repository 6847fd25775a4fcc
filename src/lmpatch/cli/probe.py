"""``lmpatch probe``: look at a model without changing it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Download, Dtype, Model, Mount, Patches, Settings, new_path, open_model, patched
from .screen import keep, progress, say, table


def probe(
    context: typer.Context,
    model: Model,
    name: Annotated[str, typer.Argument(metavar="PROBE", help="A name from `lmpatch methods`.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A JSONL file, one record a line.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="OUT", help="New folder for numbers (JSONL) and pictures (PNG)."),
    ] = None,
    settings: Settings = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many records.")] = None,
    patch: Patches = None,
    mount: Mount = "bake",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    download: Download = False,
) -> None:
    """Look inside a model on each record of a file, and leave it as it was.

    \b
    Examples:
      lmpatch probe gemma-3-270m causal_trace facts.jsonl --limit 10 -o traces
      lmpatch probe gemma-3-270m causal_trace facts.jsonl --set kind=mlp -p eiffel
    """
    from .. import api, registry
    from ..patches.patch import plain
    from ..settings import parse

    chosen = parse(registry.get("probes", name).Config, settings or [])
    if out is not None:
        new_path(out)
    lm = open_model(model, dtype, device, download)
    with patched(lm, patch or [], mount), progress() as bar:
        traces = api.probe(lm, name, data, limit=limit, progress=bar, **chosen)
    rows = []
    for trace in traces:
        token, layer = trace.best()
        best = float(trace.scores[token, layer])
        rows.append((trace.prompt, trace.answer, trace.clean, trace.corrupted, best, trace.tokens[token], layer))
    table(["prompt", "answer", "p clean", "p noisy", "p restored", "best at token", "layer"], rows)
    if out is not None:
        out.mkdir(parents=True)
        keep(context, f"What was written so far is in {out}.")
        lines = [json.dumps(plain(trace), ensure_ascii=False) + "\n" for trace in traces]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        for i, trace in enumerate(traces):
            trace.plot(out / f"{i:03d}.png")
        say(f"saved in {out}")
