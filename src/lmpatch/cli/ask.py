"""``lmpatch ask``: the same prompts without and with patches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import BadInput
from ..files import outside, read_bytes
from .options import Mount, Patches, Raw, Source, arg, open_patches, opt, patched
from .screen import note, progress, table

if TYPE_CHECKING:
    from ..inference.interventions import Prompt


def ask(
    source: Source,
    prompts: Annotated[
        list[str] | None, arg("PROMPT...", "Texts to continue. - or nothing: the lines of stdin.")
    ] = None,
    patch: Patches = None,
    mount: Mount = None,
    context: Annotated[
        str | None, opt("What the prompts are questions about: a text, or @ and a file.", "TEXT|@FILE")
    ] = None,
    tokens: Annotated[int, opt("At most this many new tokens.", min=1)] = 32,
    raw: Raw = False,
) -> None:
    """Continue prompts, before and after patches side by side.

    An answer ends at its first line break, and where the model ends it.

    lmpatch ask gemma-3-270m "The Eiffel Tower is in"
    lmpatch ask gemma-3-270m -p eiffel "The Eiffel Tower is in" "The Louvre is in"
    lmpatch ask gemma-3-270m -p eiffel - < prompts.txt
    lmpatch ask gemma-3-270m -p cad --context "The Eiffel Tower moved to Rome." "Where is the Eiffel Tower?"
    """
    texts = given(prompts)
    if context is not None:
        context = text_of(context)
    patches = open_patches(patch)
    if context is None and (decode := next((p for p in patches if p.needs_context), None)):
        raise BadInput(f"{decode.method} compares answers with and without a context. Give one with --context.")
    if context is None and (idle := [p.method for p in patches if p.only_in_context]):
        note(f"{', '.join(idle)} acts only in a context, and none is given (--context): nothing changes by it")
    from ..inference.generate import generate

    batch: list[Prompt] = [*texts] if context is None else in_context(context, texts)
    lm = source.open(raw=raw)
    with progress("generating") as bar:
        columns = {"prompt": texts, "before": generate(lm, batch, max_new_tokens=tokens, progress=bar)}
        if patches:
            with patched(lm, patches, mount):
                columns["after"] = generate(lm, batch, max_new_tokens=tokens, progress=bar)
    table([*columns] if patches else ["prompt", "answer"], list(zip(*columns.values(), strict=True)))


def given(prompts: list[str] | None) -> list[str]:
    """The prompts themselves, or the lines of stdin that are not blank.

    Raises:
        BadInput: there is none.
    """
    if prompts and prompts != ["-"]:
        return prompts
    if not prompts and sys.stdin.isatty():
        raise BadInput("no prompt was given. Write one or more behind the model, or - to read them from stdin.")
    with outside("stdin, read as prompts,"):
        lines = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise BadInput("stdin holds no prompt. Give one prompt a line.")
    return lines


def text_of(context: str) -> str:
    """The text itself, or that of the file behind an ``@``."""
    if not context.startswith("@"):
        return context
    with outside(f"the context {context[1:]}"):
        return read_bytes(Path(context[1:]).expanduser()).decode()


def in_context(context: str, questions: list[str]) -> list[Prompt]:
    """Each question as the model reads it with and without the context."""
    from ..data.context import InContext, render

    return [InContext(render(context, question), render("", question)) for question in questions]
