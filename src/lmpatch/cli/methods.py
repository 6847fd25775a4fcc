"""``lmpatch methods``: what can make a patch, and with which settings."""

from __future__ import annotations

from typing import Annotated

import typer

from .screen import say, table


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show the settings of this one.")] = None,
) -> None:
    """The methods, probes and benches there are; with a name, the settings of that one.

    \b
    Examples:
      lmpatch methods
      lmpatch methods rome
    """
    from .. import registry
    from ..config import describe_fields

    if name is None:
        rows = [
            (kind, each, first_line(registry.get(kind, each)))
            for kind in registry.KINDS
            for each in registry.names(kind)
        ]
        table(["kind", "name", "what it does"], rows)
        return
    for kind in registry.KINDS:
        if name in registry.names(kind):
            module = registry.get(kind, name)
            say((module.__doc__ or "").strip())
            for title in ("Config", "Training"):
                if hasattr(module, title):
                    heading = "to train its editor" if title == "Training" else None
                    table(["setting", "takes", "default", "meaning"], describe_fields(getattr(module, title)), heading)
            return
    registry.get("methods", name)  # raises UnknownName with the nearest names


def first_line(module: object) -> str:
    """The first line of a module's docstring."""
    return (module.__doc__ or "").strip().partition("\n")[0].replace("``", "")
