"""Imports point one way through the package: from file to file, type hints included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lmpatch

SRC = Path(lmpatch.__file__).parent
BASE = ("errors", "files", "progress", "provenance", "tensor_file", "resources", "distributed", "config")
ORDER = (
    *BASE,
    "data",
    "models",
    "inference",
    "retrieval",
    "patches",
    "probes",
    "dynamics",
    "memory",
    "training",
    "locate",
    "methods",
)
BENCHES_KNOW = {*BASE, "data", "models", "inference", "patches", "benches"}  # a bench receives its patch
TOP = ("registry", "api", "doctor", "cli", "__main__")  # these may know everything before them
FILES = sorted(SRC.rglob("*.py"))
MODULES = {".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}


def imports(source: str, module: str, package: bool = False) -> set[str]:
    """The modules of lmpatch that a module's source imports, at the top, in a function or for type hints.

    Args:
        module: its dotted name below lmpatch.
        package: it is a package's ``__init__``.
    """
    targets = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = ["lmpatch", *module.split(".")]
            base = here[: len(here) - node.level + package] if node.level else []
            path = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{path}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("lmpatch."):
                inner = name.removeprefix("lmpatch.")
                targets.add(inner if inner in MODULES else inner.rpartition(".")[0] or inner)
    return targets


def allowed(part: str) -> set[str]:
    """The parts that ``part`` may import."""
    if part == "benches":
        return BENCHES_KNOW
    if part in TOP:
        return {*ORDER, "benches", *TOP[: TOP.index(part) + 1]}
    return set(ORDER[: ORDER.index(part) + 1])


def upwards(source: str, module: str, package: bool = False) -> set[str]:
    """The parts it imports and must not."""
    return {target.partition(".")[0] for target in imports(source, module, package)} - allowed(module.partition(".")[0])


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        stack = [start]
        while stack:
            for target in graph.get(stack.pop(), set()) - seen:
                seen.add(target)
                stack.append(target)
        reach[start] = seen
    groups = {tuple(sorted(b for b in graph if b in reach[a] and a in reach[b])) for a in graph if a in reach[a]}
    return sorted(map(list, groups))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_a_module_imports_only_what_stands_before_it(name: str) -> None:
    extra = upwards(MODULES[name].read_text(), name, MODULES[name].name == "__init__.py")
    assert not extra, f"{name} must not import {', '.join(sorted(extra))}"


@pytest.mark.slow
def test_no_two_files_import_each_other() -> None:
    graph = {
        name: imports(file.read_text(), name, file.name == "__init__.py") - {name}
        for name, file in MODULES.items()
        if name != "__init__"
    }
    assert circles(graph) == []


def test_every_part_has_a_place_in_the_order() -> None:
    parts = {name.partition(".")[0] for name in MODULES} - {"__init__"}
    assert parts <= {*ORDER, *TOP, "benches"}


@pytest.mark.parametrize(
    ("module", "source", "part"),
    [
        ("inference.score", "from ..methods import rome", "methods"),
        ("inference.score", "from .. import registry", "registry"),
        ("inference.score", "if TYPE_CHECKING:\n    from ..patches.patch import Patch", "patches"),
        ("benches.facts", "from lmpatch.methods.rome import fit", "methods"),
        ("errors", "from .provenance import now", "provenance"),
    ],
)
def test_the_walk_sees_an_import_that_points_the_wrong_way(module: str, source: str, part: str) -> None:
    assert upwards(source, module) == {part}


def test_the_walk_sees_a_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
