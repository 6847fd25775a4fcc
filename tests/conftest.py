"""Fixtures shared by all tests: tiny random models."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from tiny import CORE, FAMILIES, tiny_lm

from lmpatch.models.lm import LM

torch.set_num_threads(1)


@pytest.fixture(params=CORE)
def lm(request: pytest.FixtureRequest) -> LM:
    """A fresh tiny model of each core family."""
    return tiny_lm(request.param)


@pytest.fixture(params=FAMILIES)
def any_lm(request: pytest.FixtureRequest) -> LM:
    """A fresh tiny model of each supported family."""
    return tiny_lm(request.param)


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
