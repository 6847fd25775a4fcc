"""``lmpatch probe``, ``bench`` and ``doctor``: look at a model, measure it, prove that patches work on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .options import arg, opt
from .screen import draw, keep, progress, say, table


def probe(
    context: typer.Context,
    source: o.Source,
    name: Annotated[str, arg("PROBE", "A name from `lmpatch methods`.", autocompletion=o.named("probes"))],
    data: Annotated[Path, arg("DATA", "A JSONL file, one record a line.")],
    out: Annotated[
        Path | None, o.out_option("OUT", "New folder for numbers (JSONL) and pictures (PNG).", o.writable)
    ] = None,
    settings: o.Settings = None,
    limit: o.Limit = None,
    patch: o.Patches = None,
    mount: o.Mount = None,
    raw: o.Raw = False,
) -> None:
    """Look inside a model on each record of a file, and leave it as it was.

    lmpatch probe gemma-3-270m causal_trace facts.jsonl --limit 10 -o traces
    lmpatch probe gemma-3-270m causal_trace facts.jsonl --set kind=mlp -p eiffel
    lmpatch probe gemma-3-270m integrated_gradients questions.jsonl -o neurons
    """
    from .. import api, registry
    from ..config import parse

    module = registry.get("probes", name)
    chosen = parse(module.Config, settings or [])
    if out is not None and "out" in registry.keywords(module.run):
        chosen["out"] = out / f"{name}.jsonl"  # a stopped run goes on, so this folder may exist
    else:
        o.new_path(out)
    patches = o.open_patches(patch)
    lm = source.open(raw=raw)
    if out is not None:
        keep(context, f"What was written so far is in {out}.")
    with o.patched(lm, patches, mount), progress(f"{name} at work") as bar:
        found = api.probe(lm, name, data, limit=limit, progress=bar, **chosen)
    table(*found.table())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        found.save(out)
        say(f"saved in {out}", path=out)


def bench(
    context: typer.Context,
    source: o.Source,
    name: Annotated[str, arg("BENCH", "A name from `lmpatch methods`.", autocompletion=o.named("benches"))],
    data: Annotated[Path, arg("DATA", "What the bench reads: a JSONL file of facts, or a folder of tasks.")],
    files: o.Material,
    patch: o.Patches = None,
    method: Annotated[str | None, opt("Make the patches with this method.", "METHOD")] = None,
    method_settings: Annotated[
        list[str] | None, opt("A setting of the method; may repeat.", "KEY=VALUE", "--method-set")
    ] = None,
    settings: o.Settings = None,
    limit: o.Limit = None,
    unrelated: o.Unrelated = None,
    out: Annotated[
        Path | None, o.out_option("OUT", "Folder for rows and report.html; a run there is continued.", o.writable)
    ] = None,
    mount: o.Mount = None,
    every: Annotated[bool, opt("Show every number, not only those a run is remembered by.", None, "--all")] = False,
    raw: o.Raw = False,
) -> None:
    """Measure a model on data: with patches, with patches a method makes, or alone.

    The unpatched model is always in the table, for facts also the fact in the prompt. Several patches are put on in
    this order.

    lmpatch bench gemma-3-270m facts facts.jsonl -p eiffel
    lmpatch bench gemma-3-270m general data -p eiffel --set n=100 -o runs/general
    lmpatch bench gemma-3-270m facts counterfact.jsonl --method memit --set n=100 --limit 100 -o runs/memit
    """
    from .. import api, registry
    from ..config import parse

    chosen = parse(registry.get("benches", name).Config, settings or [])
    of_method = parse(registry.get("methods", method).Config, method_settings or []) if method else {}
    patches, material = o.open_patches(patch), files.read()
    kept = f"What was scored is in {out}; the same command goes on from there." if out else "Nothing was kept: give -o."
    lm = source.open(raw=raw)
    keep(context, kept)
    with progress(f"{name} at work") as bar:
        report = api.bench(
            lm, name, data, patch=patches or None, method=method, method_settings=of_method,
            mount=mount, limit=limit, unrelated=unrelated, out=out, progress=bar,
            **material, **chosen,
        )  # fmt: skip
    draw(report.table(every), **report.summary(every))
    if out is not None:
        page = report.save_html(out / "report.html")
        say(f"rows and page in {out}: {page}", path=out, page=page)


def doctor(source: o.Source) -> None:
    """Prove on a model of yours that patches work on it, and print what fits in memory.

    Every hook fires, a patch of zeros changes no bit, all mounts agree, removal restores every bit, padding moves
    nothing, replay equals the plain forward, no weight is missing, a text comes back from its tokens, threads get their
    own answers, an interrupt leaves no trace. Exit code 1 if one of these fails.

    lmpatch doctor gemma-3-270m
    lmpatch doctor ./my-model --dtype bfloat16
    """
    from ..doctor import examine, footprint

    lm = source.open()
    with progress("examining") as bar:
        findings = examine(lm, progress=bar)
    rows = [("yes" if found.holds else "NO", found.claim, found.detail) for found in findings]
    table(["", "proof", "figure"], rows, title=lm.name, key="proofs")
    table(["memory", "needed"], footprint(lm), key="memory")
    if not all(finding.holds for finding in findings):
        raise typer.Exit(1)
