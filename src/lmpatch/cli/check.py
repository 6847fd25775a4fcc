"""``lmpatch check``: the gate before a patch is given away."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import BadInput
from . import options as o
from .options import arg, opt
from .screen import keep, note, progress, say, table

COLUMNS = ("", "check", "value", "limit", "unpatched", "fact in prompt", "n")


def check(
    context: typer.Context,
    patch: Annotated[Path, arg("PATCH", "A patch or memory folder.")],
    facts: Annotated[
        Path | None, arg("[FACTS]", "A JSONL file of the facts it should state. Default: the facts it holds.")
    ] = None,
    model: Annotated[
        str | None,
        opt(
            "The model it is for: a name, a folder, a hub id or a .gguf file. Default: as the patch names it.", "MODEL"
        ),
    ] = None,
    settings: o.Settings = None,
    limit: o.Limit = None,
    out: Annotated[
        Path | None, o.out_option("OUT", "Folder for rows and report.html; a check there is continued.", o.writable)
    ] = None,
    mount: o.Mount = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    download: o.Download = False,
    partial: o.Partial = False,
    raw: o.Raw = False,
) -> None:
    """Ask a patch everything it must stand before it is given away, and hold each number against a limit.

    It asks the facts, other wordings, neighbours, and the probe pack: negation, the old fact mentioned, true or false,
    from the object back, a further step, long answers. It measures repetition and the perplexity of plain text.

    A limit is a setting: efficacy=0.95, or none to leave it out. docs/benches.md lists them. Exit code 1 if one is
    missed.

    lmpatch check eiffel
    lmpatch check eiffel facts.jsonl --set efficacy=0.95 --set repeats=0.1 -o checked
    lmpatch check eiffel --model ./my-model --set negation=none --json
    """
    from .. import api
    from ..benches.facts import gate
    from ..config import parse

    limits = parse(gate.Config, settings or [], "check")
    (opened,) = o.open_patches([patch])
    name = model or opened.base.name
    if model is None and not (name in o.MODELS or "/" in name or Path(name).exists()):
        raise BadInput(f"{patch} was made for a model named {name!r}, which is not here. Name it: --model MODEL.")
    lm = o.Source(name, dtype, device, download, partial).open(raw=raw)
    goes_on = (
        f"What was scored is in {out}; the same command goes on from there." if out else "Nothing was kept: give -o."
    )
    keep(context, goes_on)
    with progress("checking") as bar:
        verdict = api.check(
            lm, opened, facts, mount=mount, limit=limit, out=out, progress=bar, expect=_expect, **limits
        )
    lines = [dict(zip(COLUMNS, line, strict=True)) for line in gate.shown(verdict.lines)]
    table(COLUMNS, [list(line.values()) for line in lines], title=f"{patch} on {lm.name}")
    say(str(verdict), passed=verdict.passed, missed=verdict.missed, checks=[asdict(line) for line in verdict.lines])
    if out is not None:
        page = verdict.report.save_html(out / "report.html")
        say(f"rows and page in {out}: {page}", path=out, page=page)
    if not verdict.passed:
        raise typer.Exit(1)


def _expect(seconds: float, facts: int) -> None:
    much = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{max(1, round(seconds)):.0f} seconds"
    note(f"asking {facts} facts takes about {much}")
