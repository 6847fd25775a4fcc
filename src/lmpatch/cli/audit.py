"""``lmpatch audit`` and ``diff``: which tokens pay while the mean loss looks fine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .options import arg, opt
from .screen import keep, progress, say, table

Text = Annotated[Path, arg("TEXT", "Documents: a .txt file by paragraphs, or .jsonl with text.")]
Reference = Annotated[
    Path | None, opt("Where frequency is counted, best the training corpus. Default: TEXT itself.", "FILE")
]


def audit(
    context: typer.Context,
    source: o.Source,
    text: Text,
    reference: Reference = None,
    patch: o.Patches = None,
    settings: o.Settings = None,
    limit: o.Limit = None,
    out: Annotated[
        Path | None, o.out_option("OUT", "Folder for losses, numbers and a picture; a run there goes on.", o.writable)
    ] = None,
    mount: o.Mount = None,
) -> None:
    """Tell which tokens a model is bad at: its loss on TEXT by how frequent a token is.

    Intervals are over documents. The balanced loss is a mean over kinds of tokens, so that rare ones count as much as
    frequent ones. "unigram" is the loss of a model that only knows how frequent tokens are.

    lmpatch audit gemma-3-270m reviews.txt -o audited
    lmpatch audit gemma-3-270m reviews.txt --reference corpus.jsonl -p eiffel
    """
    from ..dynamics import observe

    chosen, patches = _chosen(settings), o.open_patches(patch)
    lm = source.open(raw=True)
    if out is not None:
        keep(context, f"What was read so far is in {out}; the same command goes on from there.")
    with o.patched(lm, patches, mount), progress("auditing") as bar:
        found = observe.audit(lm, text, reference=reference, limit=limit, out=out, progress=bar, **chosen)
    table(*found.table(), title=f"{lm.name}: loss by count in {found.counts.source}")
    say(str(found), **found.as_dict())
    if out is not None:
        say(f"losses, numbers and picture in {out}", path=out)


def diff(
    context: typer.Context,
    source: o.Source,
    other: Annotated[str, arg("OTHER", "A patch or memory folder, or another model with the same tokenizer.")],
    text: Text,
    reference: Reference = None,
    gate: Annotated[bool, opt("Exit code 1 where tokens pay more than tau and times allow.", None, "--gate")] = False,
    settings: o.Settings = None,
    limit: o.Limit = None,
    out: Annotated[
        Path | None, o.out_option("OUT", "Folder for losses, numbers and a picture; a run there goes on.", o.writable)
    ] = None,
    mount: o.Mount = None,
) -> None:
    """Tell which tokens pay for a patch, or for another training, on the same TEXT.

    With --gate it fails where a bucket of tokens certainly loses more than tau nats, or the balanced loss moves more
    than times as far as the mean.

    lmpatch diff gemma-3-270m eiffel reviews.txt
    lmpatch diff gemma-3-270m ./my-finetune reviews.txt --gate --set tau=0.05 -o compared
    """
    from ..dynamics import observe

    chosen = _chosen(settings)
    patches = o.open_patches([Path(other)]) if _is_patch(Path(other)) else []
    lm = source.open(raw=True)
    second = patches[0] if patches else o.Source(other, source.dtype, source.device, source.download).open(raw=True)
    if out is not None:
        keep(context, f"What was read so far is in {out}; the same command goes on from there.")
    with progress("comparing") as bar:
        found = observe.diff(
            lm, second, text, mount=mount, reference=reference, limit=limit, out=out, progress=bar, **chosen
        )
    table(*found.table(), title=f"{other} beside {lm.name}: nats by count in {found.counts.source}")
    rows = [(payer.written, payer.tokens, f"{payer.value:+.3f}") for payer in found.payers]
    table(["pays most", "tokens", "moved"], rows, key="paying")
    passed = "Nothing pays more than the gate allows."
    say("\n".join(found.failures) or passed, **found.as_dict())
    if out is not None:
        say(f"losses, numbers and picture in {out}", path=out)
    if gate and found.failures:
        raise typer.Exit(1)


def _chosen(settings: list[str] | None) -> dict[str, Any]:
    from ..config import parse
    from ..dynamics.observe import Config

    return parse(Config, settings or [], "audit")


def _is_patch(path: Path) -> bool:
    from ..memory.memory import is_memory

    return (path / "patch.json").is_file() or is_memory(path)
