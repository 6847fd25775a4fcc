"""``lmpatch train``: facts in, an editor out, which later edits reuse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Download, Dtype, Model, Raw, Settings, Shard, named, new_path, open_model
from .screen import keep, progress, say


def train(
    context: typer.Context,
    model: Model,
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD", help="A method that learns ahead of its edits: recipe.", autocompletion=named("methods")
        ),
    ],
    facts: Annotated[list[Path], typer.Argument(metavar="FACTS...", help="JSONL files of facts to learn from.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The editor: one .safetensors file.")],
    unrelated: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Questions with answers that no fact touches.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="A sentence encoder: a folder or a hub id. Default: the packaged MiniLM.")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Checkpoint and curves; a run there goes on. Default: FILE.work"),
    ] = None,
    settings: Settings = None,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    download: Download = False,
    shard: Shard = False,
) -> None:
    """Train an editor for a model. Stopped, the same command goes on from its last step.

    \b
    Examples:
      lmpatch train gemma-3-270m recipe facts.jsonl --unrelated nq.jsonl -o mine.safetensors --dtype bfloat16
      accelerate launch -m lmpatch train ./my-model recipe facts.jsonl -o mine.safetensors --shard
    """
    from .. import api, registry
    from ..config import parse
    from ..data.edits import read_asks, read_edits
    from ..distributed import world
    from ..errors import BadInput

    new_path(out)
    training = registry.method(method).training
    if training is None:
        raise BadInput(f"{method} learns nothing ahead of its edits. Use lmpatch fit.")
    chosen = parse(training, settings or [], method)
    edits = [edit for path in facts for edit in read_edits(path)]
    asks = read_asks(unrelated) if unrelated else []
    lm = open_model(model, dtype, device, download, shard, raw)
    folder = work or out.with_name(f"{out.name}.work")
    keep(context, f"{folder} holds the last whole step; the same command goes on from there.")
    with progress() as bar:
        editor = api.train(
            lm, method, edits, unrelated=asks, out=folder, encoder=encoder, download=download, progress=bar, **chosen
        )
    if world().is_main:
        editor.save(out)
    say(editor.summary(), method=method, hash=editor.hash())
    say(f"saved in {out}; curves in {folder}", path=out, work=folder)
