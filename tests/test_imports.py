"""Imports point one way through the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lmpatch

SRC = Path(lmpatch.__file__).parent
ORDER = ("errors", "record", "room", "data", "models", "units", "patches", "probes", "memory", "methods")
BENCHES_KNOW = {
    "errors",
    "record",
    "room",
    "data",
    "models",
    "units",
    "patches",
    "benches",
}  # a bench receives its patch
TOP = ("settings", "registry", "api", "doctor", "cli", "__main__")  # these may know everything before them
FILES = sorted(SRC.rglob("*.py"))


def imported_parts(source: str, module: tuple[str, ...]) -> set[str]:
    """The parts of lmpatch (``models``, ``patches``, ...) that a module's source imports.

    ``module`` is its dotted path below lmpatch; a package's ``__init__`` counts as a module inside it.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lmpatch.")}
        elif isinstance(node, ast.ImportFrom):
            base = ("lmpatch", *module)[: len(module) + 1 - node.level] if node.level else ()
            path = (*base, *(node.module.split(".") if node.module else ()))
            if path[:1] == ("lmpatch",):
                found |= {path[1]} if len(path) > 1 else {alias.name for alias in node.names}
    return found


def allowed(part: str) -> set[str]:
    """The parts that ``part`` may import."""
    if part == "benches":
        return BENCHES_KNOW
    if part in TOP:
        return {*ORDER, "benches", *TOP[: TOP.index(part) + 1]}
    return set(ORDER[: ORDER.index(part) + 1])


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SRC)))
def test_a_module_imports_only_what_stands_before_it(file: Path) -> None:
    module = file.relative_to(SRC).with_suffix("").parts
    if module == ("__init__",):
        return  # the public names: it may know everything
    extra = imported_parts(file.read_text(), module) - allowed(module[0])
    assert not extra, f"{module[0]} must not import {', '.join(sorted(extra))}"


def test_every_part_has_a_place_in_the_order() -> None:
    parts = {file.relative_to(SRC).with_suffix("").parts[0] for file in FILES} - {"__init__"}
    assert parts <= {*ORDER, *TOP, "benches"}


@pytest.mark.parametrize(
    ("module", "source", "part"),
    [
        (("models", "run"), "from ..methods import rome", "methods"),
        (("models", "run"), "from .. import registry", "registry"),
        (("benches", "facts"), "from lmpatch.methods.rome import fit", "methods"),
        (("data", "__init__"), "from ..models.lm import LM", "models"),
        (("errors",), "from .record import now", "record"),
    ],
)
def test_the_walk_sees_an_import_that_points_the_wrong_way(module: tuple[str, ...], source: str, part: str) -> None:
    assert imported_parts(source, module) - allowed(module[0]) == {part}
