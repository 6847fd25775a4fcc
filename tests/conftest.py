"""Fixtures shared by all tests: tiny random models, scripts of benchmarks/."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from tiny import CORE, FAMILIES, tiny_lm

from lmpatch.models.lm import LM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
torch.set_num_threads(1)


@pytest.fixture(params=CORE)
def lm(request: pytest.FixtureRequest) -> LM:
    """A fresh tiny model of each core family."""
    return tiny_lm(request.param)


@pytest.fixture(params=FAMILIES)
def any_lm(request: pytest.FixtureRequest) -> LM:
    """A fresh tiny model of each supported family."""
    return tiny_lm(request.param)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """A script of benchmarks/ by its name, imported as when it runs; what it imported is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    known = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - known:  # names such as `facts` are another module's elsewhere
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            vars(sys.modules[parent]).pop(child, None) if parent in sys.modules else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests on the real model go to one worker, which loads it once; other families and formats are ``wide``."""
    for item in items:
        if item.get_closest_marker("real"):
            item.add_marker(pytest.mark.xdist_group("real"))
        if any(_is_wide(value) for value in getattr(item, "callspec", _NONE).params.values()):
            item.add_marker(pytest.mark.wide)


class _NONE:
    params: ClassVar[dict[str, Any]] = {}


def _is_wide(value: Any) -> bool:
    """A parameter that repeats a claim: a family but llama, a number format but fp32."""
    other = isinstance(value, str) and (value == "bf16" or (value in FAMILIES and value != "llama"))
    return other or (isinstance(value, torch.dtype) and value is not torch.float32)
