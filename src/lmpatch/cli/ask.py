"""``lmpatch ask``: the same prompts without and with patches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import BadInput
from .options import Device, Download, Dtype, Model, Mount, Patches, open_model, patched
from .screen import progress, table

if TYPE_CHECKING:
    from ..inference.interventions import Prompt


def ask(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more texts to continue.")],
    patch: Patches = None,
    mount: Mount = None,
    context: Annotated[
        str | None,
        typer.Option(metavar="TEXT|@FILE", help="What the prompts are questions about: a text, or @ and a file."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="At most this many new tokens.")] = 32,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    download: Download = False,
) -> None:
    """Continue prompts, before and after patches side by side.

    \b
    Examples:
      lmpatch ask gemma-3-270m "The Eiffel Tower is in"
      lmpatch ask gemma-3-270m -p eiffel "The Eiffel Tower is in" "The Louvre is in"
      lmpatch ask gemma-3-270m -p cad --context "The Eiffel Tower moved to Rome." "Where is the Eiffel Tower?"
    """
    from ..inference.generate import generate

    asked: list[Prompt] = [*prompts] if context is None else in_context(context, prompts)
    lm = open_model(model, dtype, device, download)
    with progress() as bar:
        before = generate(lm, asked, max_new_tokens=tokens, progress=bar)
        if not patch:
            table(["prompt", "answer"], list(zip(prompts, before, strict=True)))
            return
        with patched(lm, patch, mount):
            after = generate(lm, asked, max_new_tokens=tokens, progress=bar)
    table(["prompt", "before", "after"], list(zip(prompts, before, after, strict=True)))


def in_context(context: str, questions: list[str]) -> list[Prompt]:
    """Each question as the model reads it with and without the context, which is a text or ``@`` and a file."""
    from ..data.context import InContext, render

    if context.startswith("@"):
        try:
            context = Path(context[1:]).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"the context {context[1:]} cannot be read ({error}). Give a text file after @.") from None
    return [InContext(render(context, question), render("", question)) for question in questions]
