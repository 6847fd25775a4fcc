"""``lmpatch example``: a small file of facts to start with."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from ..errors import BadInput
from .options import new_path
from .screen import say


def example(
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="The file to write. It must not exist yet.")
    ] = Path("facts.jsonl"),
) -> None:
    """Write a small file of facts, the one the demo and the first page use.

    \b
    Examples:
      lmpatch example
      lmpatch example -o my-facts.jsonl
    """
    text = own_facts().read_text(encoding="utf-8")
    try:
        new_path(out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{out} cannot be written ({error.strerror}). Give another -o.") from None
    facts = text.count("\n")
    say(f"{facts} facts written to {out}", facts=facts, path=out)


def own_facts(name: str = "facts.jsonl") -> Path:
    """A file of the project's facts: packaged with a wheel, in ``examples/`` of a checkout."""
    packaged = Path(str(files("lmpatch.data"))) / name
    return packaged if packaged.is_file() else Path(__file__).parents[3] / "examples" / name
