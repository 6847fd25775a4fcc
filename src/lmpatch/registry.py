"""What methods, probes and benches there are: the files of each folder are the registry.

A module or package in ``methods/``, ``probes/`` or ``benches/`` whose name has no leading underscore is listed by its
name. Another package adds its own through the entry-point group ``lmpatch.methods`` (``.probes``, ``.benches``)::

    [project.entry-points."lmpatch.methods"]
    mine = "my_package.mine"

Listing reads files as text and imports none of them. A folder whose ``__init__`` names no ``Config`` is no module of
its own but holds what several share.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from .data.record import Record
from .errors import BadInput, UnknownName

KINDS = {"methods": "method", "probes": "probe", "benches": "bench"}


@dataclass(frozen=True)
class Listed:
    """What can be known of a module without importing it."""

    name: str
    what: str
    """The first line of its docstring."""
    aim: str
    """``facts``, ``context``, ``documents``, or nothing."""
    module: str
    """The file or folder it is in; for another package's, the module."""
    aliases: tuple[str, ...] = ()
    """What papers also call it, where that may mean another method, too. No call takes one."""


@dataclass(frozen=True)
class Method:
    """A method as every caller sees it; what it does not have is None. See ``lmpatch.methods``."""

    name: str
    doc: str
    record: type[Record] | None
    needs_records: bool
    config: type[Any]
    fit: Callable[..., Any]
    takes: frozenset[str]
    """Keywords of ``fit`` beside ``progress``."""
    fit_each: Callable[..., Any] | None
    estimate: Callable[..., int] | None
    train: Callable[..., Any] | None
    training: type[Any] | None
    data: type[Any] | None
    """What ``train`` reads beside plain records: a ``TrainingData`` of records and more."""
    editor_for: Callable[..., Any] | None
    """The editor of a model, which a memory on disk is made with."""

    def material(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """See ``taken``: what was given, for ``fit``."""
        return taken(self.name, self.takes, given)

    def training_data(self, records: Any, extra: Mapping[str, Any]) -> Any:
        """What ``train`` reads: the records, or a ``TrainingData`` of them and of what else was given."""
        known = frozenset(field.name for field in fields(self.data)) if self.data else frozenset()
        values = taken(self.name, known, extra)
        return self.data(records, **values) if self.data and values else records


def taken(name: str, takes: frozenset[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not None; ``BadInput`` if one of them is not taken."""
    values = {key: value for key, value in given.items() if value is not None}
    for key in values:
        if key not in takes:
            raise BadInput(f"{name} reads no {key}. Leave {key} out.")
    return values


def method(name: str) -> Method:
    """The method of that name; ``UnknownName`` names the nearest."""
    module = get("methods", name)
    has = partial(getattr, module)
    return Method(
        name=name, doc=inspect.cleandoc(module.__doc__ or ""), record=has("Record", None), config=module.Config,
        needs_records=has("needs_records", True), fit=module.fit, takes=keywords(module.fit),
        fit_each=has("fit_each", None), estimate=has("estimate", None), editor_for=has("editor_for", None),
        train=has("train", None), training=has("Training", None), data=has("TrainingData", None),
    )  # fmt: skip


def keywords(function: Callable[..., Any]) -> frozenset[str]:
    """The names a function takes by keyword alone, but for ``progress``."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY) - {"progress"}


def names(kind: str) -> list[str]:
    """The names of one kind (``methods``, ``probes``, ``benches``), sorted. No module is imported.

    Raises:
        BadInput: another kind.
    """
    return sorted({*_own(kind), *_outsiders(kind)})


def listing(kind: str) -> list[Listed]:
    """Every name of one kind with what it does, by aim and name. Nothing is imported."""
    outside = {name: Listed(name, f"from {p.value}", "", p.value) for name, p in _outsiders(kind).items()}
    return sorted((outside | _own(kind)).values(), key=lambda each: (each.aim, each.name))


def get(kind: str, name: str) -> Any:
    """The module of that name, or its entry in a module of several.

    Raises:
        UnknownName: there is none; the message lists the nearest names.
    """
    own = _own(kind)
    if name in own:
        module = importlib.import_module(f"{__package__}.{kind}.{own[name].module}")
        return module if own[name].module == name else module.entry(name)
    if (outsider := _outsiders(kind).get(name)) is not None:
        return outsider.load()
    if called := [listed for listed in own.values() if name.upper().replace("_", "-") in listed.aliases]:
        which = " ".join(f"{listed.name} is {listed.what}" for listed in called)
        raise UnknownName(f"no {KINDS[kind]} is called {name!r}: papers call several so. {which} Name one of them.")
    known = names(kind)
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(known) or 'none'}."
    raise UnknownName(f"no {KINDS[kind]} is called {name!r}. {hint}")


def _own(kind: str) -> dict[str, Listed]:
    """What the files of the folder hold, by name."""
    if kind not in KINDS:
        raise BadInput(f"no kind {kind!r} of module. There are: {', '.join(KINDS)}.")
    own: dict[str, Listed] = {}
    for folder in importlib.import_module(f"{__package__}.{kind}").__path__:
        for path in sorted(Path(folder).iterdir()):
            source = path / "__init__.py" if path.is_dir() else path
            if not path.name.startswith("_") and source.suffix == ".py" and source.is_file():
                own |= {listed.name: listed for listed in _read(source, path.stem, path.is_dir())}
    return own


@cache
def _read(source: Path, stem: str, folder: bool) -> tuple[Listed, ...]:
    """The entries of one file, read as text."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.alias, ast.ClassDef))}
    if folder and "Config" not in defined:
        return ()
    literals = {}
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="AIM" | "ENTRIES" | "ALIASES" as name)], value=value):
                literals[name] = ast.literal_eval(value)
    first = (ast.get_docstring(tree) or "").partition("\n")[0].replace("``", "")
    entries = literals.get("ENTRIES", {stem: first})
    aliases = {name: tuple(also) for name, also in literals.get("ALIASES", {}).items()}
    return tuple(
        Listed(name, what, literals.get("AIM", ""), stem, aliases.get(name, ())) for name, what in entries.items()
    )


def _outsiders(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"lmpatch.{kind}")}
