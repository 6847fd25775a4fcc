"""``fit`` checks everything before it starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from tiny import tiny_lm

from lmpatch import api, registry
from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput, Contradiction, NotEnoughMemory, UnknownName
from lmpatch.models.lm import LM
from lmpatch.patches.patch import Patch

EDIT = Edit("The Eiffel Tower is in", target="Rome", subject="Eiffel Tower")


@dataclass(frozen=True)
class Config:
    """A scratch method's numbers."""

    steps: int = 1
    """Steps."""


class Scratch(ModuleType):
    """A method that only remembers how it was called."""

    Record = Edit
    Config = Config

    def fit(self, lm: LM, edits: Sequence[Edit], cfg: Config, *, progress: Any = None) -> Patch:
        """Keep the call; the patch is that of a rule."""
        self.call = edits, cfg, progress
        return api.fit(lm, "cad", [])


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Scratch:
    module = Scratch("scratch")
    monkeypatch.setitem(sys.modules, "scratch", module)
    monkeypatch.setattr(api, "check_harm", lambda *_, **__: None)  # what it makes is no patch
    real = registry.get
    monkeypatch.setattr(registry, "get", lambda kind, name: module if name == "scratch" else real(kind, name))
    return module


@pytest.fixture(scope="module")
def model() -> LM:
    return tiny_lm("llama")


def test_fit_hands_the_method_its_config_and_the_progress(scratch: Scratch, model: LM) -> None:
    def progress(done: int, total: int, what: str) -> None: ...

    api.fit(model, "scratch", [EDIT], progress=progress, steps=7)
    assert scratch.call == ([EDIT], Config(7), progress)


def test_fit_without_edits_is_refused(scratch: Scratch, model: LM) -> None:
    with pytest.raises(BadInput, match="no edits"):
        api.fit(model, "scratch", [])


def test_fit_with_an_unknown_setting_is_refused(scratch: Scratch, model: LM) -> None:
    with pytest.raises(BadInput, match=r"no setting 'step'. Did you mean steps"):
        api.fit(model, "scratch", [EDIT], step=1)


def test_fit_with_an_unknown_method_is_refused(model: LM) -> None:
    with pytest.raises(UnknownName):
        api.fit(model, "no_such_method", [EDIT])


def test_fit_with_contradictory_edits_is_refused(scratch: Scratch, model: LM) -> None:
    other = Edit(EDIT.prompt, target="Oslo", subject=EDIT.subject)
    with pytest.raises(Contradiction, match=r"'Rome'.*'Oslo'"):
        api.fit(model, "scratch", [EDIT, other])


def test_text_for_a_method_that_reads_none_is_refused(scratch: Scratch, model: LM) -> None:
    with pytest.raises(BadInput, match="scratch reads no text"):
        api.fit(model, "scratch", [EDIT], text=["x"])


def test_a_run_that_would_not_fit_is_refused_before_it_starts(scratch: Scratch, model: LM) -> None:
    scratch.estimate = lambda lm, count, cfg: count << 60  # type: ignore[attr-defined]
    scratch.fit = lambda *_, **__: pytest.fail("it started")  # type: ignore[method-assign, assignment]
    with pytest.raises(NotEnoughMemory, match=r"scratch with 1 edits needs about .* GiB on cpu; .* is free"):
        api.fit(model, "scratch", [EDIT])


def test_a_run_that_fits_goes_ahead(scratch: Scratch, model: LM) -> None:
    scratch.estimate = lambda lm, count, cfg: count  # type: ignore[attr-defined]
    assert api.fit(model, "scratch", [EDIT])
