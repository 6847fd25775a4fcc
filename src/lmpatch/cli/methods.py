"""``lmpatch methods``: what can make a patch, and with which settings."""

from __future__ import annotations

from typing import Annotated

import typer

from .screen import say, table

AIMS = {
    "facts": "correct facts",
    "context": "follow the context, or the model's own knowledge",
    "documents": "use documents that answer, ignore those that do not",
}


def _names(incomplete: str) -> list[str]:
    from .. import registry

    return [name for kind in registry.KINDS for name in registry.names(kind) if name.startswith(incomplete)]


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show the settings of this one.", autocompletion=_names)
    ] = None,
) -> None:
    """The methods by what they are for, the probes and the benches; with a name, the settings of that one.

    \b
    Examples:
      lmpatch methods
      lmpatch methods rome
    """
    from .. import registry

    if name is None:
        listed = registry.listing("methods")
        for aim in dict.fromkeys([*AIMS, *(each.aim for each in listed)]):
            rows = [(each.name, each.what) for each in listed if each.aim == aim]
            table(["method", "what it does"], rows, AIMS.get(aim, aim or "others"), key=aim or "others")
        for kind, one in (("probes", "probe"), ("benches", "bench")):
            table([one, "what it does"], [(each.name, each.what) for each in registry.listing(kind)], kind, key=kind)
        return
    kind = next((kind for kind in registry.KINDS if name in registry.names(kind)), "methods")
    _settings(kind, name)


def _settings(kind: str, name: str) -> None:
    from .. import registry
    from ..config import describe_fields

    columns = ["setting", "takes", "default", "meaning"]
    if kind == "methods":
        found = registry.method(name)  # raises UnknownName with the nearest names
        say(found.doc, name=name, kind="method", doc=found.doc)
        table(columns, describe_fields(found.config), key="settings")
        if found.training:
            table(columns, describe_fields(found.training), "to train its editor", key="training")
        return
    module = registry.get(kind, name)
    doc = (module.__doc__ or "").strip()
    say(doc, name=name, kind=registry.KINDS[kind], doc=doc)
    table(columns, describe_fields(module.Config), key="settings")
