"""``lmpatch compare``: which editor should I take, for these facts and this model?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as o
from .options import arg, opt
from .screen import keep, note, progress, say, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..benches.facts.compare import Expected


def compare(
    context: typer.Context,
    source: o.Source,
    facts: Annotated[Path, arg("FACTS", "A JSONL file, one fact a line.")],
    methods: Annotated[
        list[str] | None,
        opt(
            "A method, with settings of its own behind it: 'memit solver=alphaedit'. May repeat. Default: every method "
            "that writes facts, as it comes.",
            "METHOD",
            "-m",
            "--method",
            autocompletion=o.named("methods"),
        ),
    ] = None,
    editors: Annotated[
        list[Path] | None, opt("What lmpatch train wrote for one of the methods; may repeat.", "FILE", "--editor")
    ] = None,
    settings: o.Settings = None,
    text: o.Text = None,
    anchors: o.Anchors = None,
    unrelated: o.Unrelated = None,
    limit: o.Limit = None,
    out: Annotated[
        Path | None,
        o.out_option("OUT", "Folder for patches, rows and report.html; a run there is continued.", o.writable),
    ] = None,
    mount: o.Mount = None,
    raw: o.Raw = False,
) -> None:
    """Which editor should I take? Each method writes all facts and is asked the same, beside the unpatched model and
    the fact in the prompt.

    It says first how long each takes. Then: answers as they are generated, teacher-forced numbers as in papers, costs,
    and in words which editor to take and why not the others. With -o the patches are kept, so that the one you choose
    is there already.

    lmpatch compare gemma-3-270m facts.jsonl -o compared
    lmpatch compare gemma-3-270m facts.jsonl -m rome -m "memit solver=alphaedit" -m rag --limit 100
    lmpatch compare ./my-model facts.jsonl --editor mine.safetensors --set cases=50 --json
    """
    from .. import api
    from ..benches.facts.compare import Config
    from ..config import parse
    from ..data.edits import read_edits
    from ..data.lines import read_text
    from ..patches.editor import load_editor

    chosen = parse(Config, settings or [], "compare")
    trained = [load_editor(path) for path in editors or []]
    words, further = read_text(text) if text else None, read_edits(anchors) if anchors else None
    kept = f"What was written and asked is in {out}; the same command goes on from there."
    lm = source.open(raw=raw)
    keep(context, kept if out else "Nothing was kept: give -o.")
    with progress("comparing") as bar:
        found = api.compare(
            lm, facts, methods or None, editors=trained, text=words, anchors=further, unrelated=unrelated, mount=mount,
            limit=limit, out=out, progress=bar, expect=_expect, **chosen,
        )  # fmt: skip
    for each in found.tables():
        table(each.columns, each.rows, title=each.title, key=each.key)
    say("\n".join(found.advice()), **found.summary())
    if out is not None:
        page = found.report.save_html(out / "report.html")
        say(f"patches, rows and page in {out}: {page}", path=out, page=page)


def _expect(expected: Sequence[Expected]) -> None:
    """How long and how much memory, before the work."""
    from ..resources import format_bytes

    for each in expected:
        note(each.name + (f" cannot run: {each.why}" if each.why else f": about {_long(each.seconds)}"))
    most = format_bytes(max(each.bytes for each in expected))
    note(f"in all about {_long(sum(each.seconds for each in expected))}, and {most} on top of the model")


def _long(seconds: float) -> str:
    if seconds > 2 * 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{max(1, round(seconds)):.0f} seconds"
