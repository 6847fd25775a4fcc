"""``lmpatch ask``: the same prompts without and with patches."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Device, Download, Dtype, Model, Mount, Patches, open_model, patched
from .screen import progress, table


def ask(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more texts to continue.")],
    patch: Patches = None,
    mount: Mount = None,
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
    """
    from ..models.run import generate

    lm = open_model(model, dtype, device, download)
    with progress() as bar:
        before = generate(lm, prompts, max_new_tokens=tokens, progress=bar)
        if not patch:
            table(["prompt", "answer"], list(zip(prompts, before, strict=True)))
            return
        with patched(lm, patch, mount):
            after = generate(lm, prompts, max_new_tokens=tokens, progress=bar)
    table(["prompt", "before", "after"], list(zip(prompts, before, after, strict=True)))
