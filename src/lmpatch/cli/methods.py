"""``lmpatch methods``: what can make a patch, and with which settings."""

from __future__ import annotations

import inspect
from typing import Annotated

from .options import arg, named
from .screen import say, table

AIMS = {
    "facts": "correct facts",
    "context": "follow the context, or the model's own knowledge",
    "documents": "use documents that answer, ignore those that do not",
}


def methods(
    name: Annotated[
        str | None,
        arg("[NAME]", "Show the settings of this one.", autocompletion=named("methods", "probes", "benches")),
    ] = None,
) -> None:
    """The methods by what they are for, the probes and the benches; with a name, the settings of that one.

    lmpatch methods
    lmpatch methods rome
    """
    from .. import registry
    from ..config import describe_fields

    if name is None:
        listed = registry.listing("methods")
        for aim in dict.fromkeys([*AIMS, *(each.aim for each in listed)]):
            rows = [(each.name, each.what) for each in listed if each.aim == aim]
            table(["method", "what it does"], rows, AIMS.get(aim, aim or "others"), key=aim or "others")
        for kind, one in (("probes", "probe"), ("benches", "bench")):
            table([one, "what it does"], [(each.name, each.what) for each in registry.listing(kind)], kind, key=kind)
        return
    kind = next((kind for kind in registry.KINDS if name in registry.names(kind)), "methods")
    module = registry.get(kind, name)  # raises UnknownName with the nearest names
    doc = inspect.cleandoc(module.__doc__ or "")
    say(doc, name=name, kind=registry.KINDS[kind], doc=doc)
    configs = {"settings": module.Config, "training": getattr(module, "Training", None)}
    for key, config in configs.items():
        if config:
            title = "to train its editor" if key == "training" else None
            table(["setting", "takes", "default", "meaning"], describe_fields(config), title, key=key)
