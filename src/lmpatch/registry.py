"""What methods, probes and benches there are: the files of each folder are the registry.

A module in ``methods/``, ``probes/`` or ``benches/`` whose name has no leading underscore is listed by its name.
Another package adds its own through the entry-point group ``lmpatch.methods`` (``.probes``, ``.benches``)::

    [project.entry-points."lmpatch.methods"]
    mine = "my_package.mine"
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

from .errors import BadInput, UnknownName

KINDS = {"methods": "method", "probes": "probe", "benches": "bench"}


def names(kind: str) -> list[str]:
    """The names of one kind, sorted. No module is imported.

    Args:
        kind: ``methods``, ``probes`` or ``benches``.
    Raises:
        BadInput: another kind.
    """
    return sorted({*_files(kind), *_outsiders(kind)})


def get(kind: str, name: str) -> ModuleType:
    """The module of that name.

    Raises:
        UnknownName: there is none; the message lists the nearest names.
    """
    if name in _files(kind):
        return importlib.import_module(f"{__package__}.{kind}.{name}")
    outsiders = _outsiders(kind)
    if name in outsiders:
        module: ModuleType = outsiders[name].load()
        return module
    known = names(kind)
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(known) or 'none'}."
    raise UnknownName(f"no {KINDS[kind]} is called {name!r}. {hint}")


def _files(kind: str) -> list[str]:
    if kind not in KINDS:
        raise BadInput(f"no kind {kind!r} of module. There are: {', '.join(KINDS)}.")
    folder = importlib.import_module(f"{__package__}.{kind}")
    shared = vars(folder).get("shared", ())  # folders inside it that are none of its kind
    files = pkgutil.iter_modules(folder.__path__)
    return [module.name for module in files if not module.name.startswith("_") and module.name not in shared]


def _outsiders(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"lmpatch.{kind}")}
