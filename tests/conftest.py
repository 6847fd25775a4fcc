"""Fixtures shared by all tests: tiny random models."""

from __future__ import annotations

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
