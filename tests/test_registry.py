"""The files are the registry."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import lmpatch.methods
from lmpatch import registry
from lmpatch.errors import BadInput, UnknownName


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A further folder of the methods package."""
    monkeypatch.setattr(lmpatch.methods, "__path__", [*lmpatch.methods.__path__, str(tmp_path)])
    return tmp_path


def test_a_new_file_is_listed_and_found_and_an_underscore_hides_it(folder: Path) -> None:
    (folder / "scratch_new.py").write_text('"""New."""\n')
    (folder / "_shared_new.py").write_text('"""Shared."""\n')
    assert "scratch_new" in registry.names("methods")
    assert "_shared_new" not in registry.names("methods")
    assert registry.get("methods", "scratch_new").__doc__ == "New."


def test_names_are_sorted() -> None:
    for kind in registry.KINDS:
        assert registry.names(kind) == sorted(registry.names(kind))


def test_another_package_adds_a_method_through_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="outside", value="json", group="lmpatch.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    assert "outside" in registry.names("methods")
    assert "outside" not in registry.names("benches")
    assert registry.get("methods", "outside").__name__ == "json"


def test_an_unknown_name_lists_the_nearest(folder: Path) -> None:
    (folder / "scratch_new.py").write_text("")
    with pytest.raises(UnknownName, match=r"no method is called 'Scratch-Nex'. Did you mean scratch_new"):
        registry.get("methods", "Scratch-Nex")


def test_an_unknown_name_with_nothing_near_lists_all(folder: Path) -> None:
    (folder / "scratch_new.py").write_text("")
    with pytest.raises(UnknownName, match=r"There are: .*scratch_new"):
        registry.get("methods", "????")


def test_an_ambiguous_field_name_is_refused_and_both_meanings_are_near() -> None:
    with pytest.raises(UnknownName, match="r_rome"):
        registry.get("methods", "R-ROME")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(BadInput, match="no kind 'spells'"):
        registry.names("spells")
