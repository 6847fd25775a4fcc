"""``lmpatch fit``: facts in, patch folder out. ``lmpatch train``: facts in, an editor out, which later edits reuse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import BadInput
from . import options as o
from .files import about
from .options import arg, opt
from .screen import keep, progress, say


def fit(
    context: typer.Context,
    source: o.Source,
    method: Annotated[str, arg("METHOD", "A name from `lmpatch methods`.", autocompletion=o.named("methods"))],
    out: o.Out,
    files: o.Material,
    facts: Annotated[
        Path | None, arg("[FACTS]", "A JSONL file, one fact (or question with context) a line; decode rules need none.")
    ] = None,
    settings: o.Settings = None,
    work: Annotated[Path | None, o.work_option("Checkpoints of a long fit; a stopped run there goes on.")] = None,
    patch: o.Patches = None,
    mount: o.Mount = None,
    force: Annotated[
        bool, opt("Save a patch that makes the model much worse at plain text, which is refused otherwise.")
    ] = False,
    raw: o.Raw = False,
    shard: o.Shard = False,
) -> None:
    """Make a patch that writes facts into a model.

    Patches given with -p are on the model meanwhile: the new patch is made for a model that already has them.

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

    found = registry.method(method)
    chosen = parse(found.config, settings or [], method)
    if facts is None and found.needs_records:
        raise BadInput(f"{method} learns from records. Name a file of them behind {method}.")
    edits = found.record.read(facts, check=True) if facts and found.record else []
    patches, material = o.open_patches(patch), files.read()
    lm = source.open(raw=raw, shard=shard)
    kept = f" {work} holds the last whole step; the same command goes on from there." if work else ""
    keep(context, f"The model is as it was and {out} was not written.{kept}")
    with o.patched(lm, patches, mount), progress(f"{method} at work") as bar:
        made = api.fit(lm, method, edits, out=work, force=force, progress=bar, **material, **chosen)
    if world().is_main:
        made.save(out)
    say(about(made), method=method, edits=len(made.edits), bytes=made.nbytes, hash=made.hash())
    say(f"saved in {out}", path=out)


def train(
    context: typer.Context,
    source: o.Source,
    method: Annotated[str, arg("METHOD", "A method that learns ahead: recipe.", autocompletion=o.named("methods"))],
    facts: Annotated[list[Path], arg("FACTS...", "JSONL files of facts to learn from.")],
    out: Annotated[Path, o.out_option("FILE", "The editor: one .safetensors file. It must not exist yet.")],
    unrelated: o.Unrelated = None,
    encoder: Annotated[
        str | None, opt("A sentence encoder: a folder or a hub id. Default: the packaged MiniLM.")
    ] = None,
    work: Annotated[Path | None, o.work_option("Checkpoint and curves, to go on from. Default: FILE.work")] = None,
    settings: o.Settings = None,
    raw: o.Raw = False,
    shard: o.Shard = False,
) -> None:
    """Train an editor for a model. Stopped, the same command goes on from its last step.

    lmpatch train gemma-3-270m recipe facts.jsonl --unrelated nq.jsonl -o mine.safetensors --dtype bfloat16
    accelerate launch -m lmpatch train ./my-model recipe facts.jsonl -o mine.safetensors --shard
    """
    from .. import api, registry
    from ..config import parse
    from ..data.edits import read_asks, read_edits
    from ..distributed import world

    training = registry.method(method).training
    if training is None:
        raise BadInput(f"{method} learns nothing ahead of its edits. Use lmpatch fit.")
    chosen = parse(training, settings or [], method)
    edits = [edit for path in facts for edit in read_edits(path)]
    chosen |= {"unrelated": read_asks(unrelated) if unrelated else [], "encoder": encoder, "download": source.download}
    lm = source.open(raw=raw, shard=shard)
    folder = work or out.with_name(f"{out.name}.work")
    keep(context, f"{folder} holds the last whole step; the same command goes on from there.")
    with progress() as bar:
        editor = api.train(lm, method, edits, out=folder, progress=bar, **chosen)
    if world().is_main:
        editor.save(out)
    say(editor.summary(), method=method, hash=editor.hash())
    say(f"saved in {out}; curves in {folder}", path=out, work=folder)
