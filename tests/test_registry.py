"""The files are the registry."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_lm

import lmpatch.methods
from lmpatch import registry
from lmpatch.api import fit
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
    (listed,) = [each for each in registry.listing("methods") if each.name == "outside"]
    assert (listed.what, listed.aim, listed.module) == ("from json", "", "json")


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


def test_listing_gives_each_entry_its_line_and_aim_by_aim_and_name(folder: Path) -> None:
    (folder / "one.py").write_text('"""One does ``this``.\n\nMore."""\n\nAIM = "facts"\n')
    (folder / "both.py").write_text('"""Two."""\n\nAIM = "context"\nENTRIES = {"left": "Left.", "right": "Right."}\n')
    listed = registry.listing("methods")
    rows = {each.name: (each.what, each.aim) for each in listed}
    assert rows["one"] == ("One does this.", "facts")
    assert rows["left"] == ("Left.", "context") and rows["right"] == ("Right.", "context")
    assert "both" not in rows
    assert [(each.aim, each.name) for each in listed] == sorted((each.aim, each.name) for each in listed)
    assert [each.name for each in sorted(listed, key=lambda each: each.name)] == registry.names("methods")


def test_every_method_of_the_tree_says_what_it_does_and_for_what() -> None:
    for each in registry.listing("methods"):
        assert each.what.endswith("."), each
        assert each.aim in ("facts", "context", "documents"), each


@pytest.mark.slow
def test_listing_imports_neither_torch_nor_a_method() -> None:
    code = "import sys; from lmpatch import registry as r; [r.listing(kind) for kind in r.KINDS]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "lmpatch.methods" in loaded and "torch" not in loaded
    assert not [name for name in loaded if name.startswith("lmpatch.methods.")]


def test_a_module_of_several_gives_each_by_its_name(folder: Path) -> None:
    source = (
        '"""Two."""\n\nENTRIES = {"left": "Left.", "right": "Right."}\n\n\ndef entry(name):\n    return name.upper()\n'
    )
    (folder / "both.py").write_text(source)
    assert registry.get("methods", "left") == "LEFT"
    with pytest.raises(UnknownName, match="'both'"):
        registry.get("methods", "both")


def test_a_module_that_is_one_of_its_entries_is_that_one() -> None:
    assert registry.get("methods", "rome") is lmpatch.methods.rome
    assert registry.get("methods", "r_rome") is lmpatch.methods.rome.r_rome
    assert registry.method("r_rome").config is not registry.method("rome").config


def test_a_listed_name_says_which_file_it_is_in() -> None:
    modules = {each.name: each.module for each in registry.listing("methods")}
    assert (modules["cad"], modules["r_rome"], modules["recipe"]) == ("decoding", "rome", "recipe")


def test_a_folder_without_a_config_holds_what_several_share(folder: Path) -> None:
    (folder / "shared").mkdir()
    (folder / "shared" / "__init__.py").write_text('"""Shared."""\n')
    (folder / "whole").mkdir()
    (folder / "whole" / "__init__.py").write_text('"""Whole."""\n\nfrom .config import Config as Config\n')
    assert "whole" in registry.names("methods")
    assert "shared" not in registry.names("methods")


def test_what_a_method_lacks_is_none() -> None:
    cad, memit, recipe = (registry.method(name) for name in ("cad", "memit", "recipe"))
    assert not cad.needs_records and memit.needs_records
    assert (cad.estimate, cad.train, cad.training, cad.fit_each) == (None, None, None, None)
    assert memit.estimate is not None and memit.train is None
    assert recipe.train is not None and recipe.training is not None
    assert cad.doc.startswith("CAD")


def test_what_fit_takes_beside_records_is_read_from_its_signature() -> None:
    memit = registry.method("memit")
    assert memit.takes == {"text", "anchors"}
    assert memit.material({"text": ["a"], "anchors": None, "editor": None}) == {"text": ["a"]}
    with pytest.raises(BadInput, match="memit reads no editor. Leave editor out"):
        memit.material({"editor": object()})


OUTSIDE = """
from dataclasses import dataclass

from lmpatch.data.record import Record as Base
from lmpatch.errors import BadInput
from lmpatch.patches.weight.delta import LowRank
from lmpatch.patches.weight.patch import WeightPatch
import torch


@dataclass(frozen=True)
class Record(Base):
    size: float

    @classmethod
    def read(cls, path, *, limit=None, check=False):
        return [cls(float(line)) for line in path.read_text().split()[:limit]]

    @staticmethod
    def check(records):
        if any(record.size == 0 for record in records):
            raise BadInput("a size of 0 changes nothing.")


@dataclass(frozen=True)
class Config:
    pass


def fit(lm, records, cfg, *, progress=None):
    b = torch.full((lm.layout.d_model, 1), sum(record.size for record in records))
    a = torch.ones(1, lm.layout.widths[0])
    name = lm.layout.weight(lm.layout.downs[0])
    return WeightPatch.make(lm, {name: LowRank(b, a)}, method="outside", config=cfg, edits=(), seconds=0.0)
"""


@pytest.mark.slow
def test_a_record_type_from_outside_the_tree_is_read_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside_records.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    outside: Any = importlib.import_module("outside_records")
    point = EntryPoint(name="outside", value="outside_records", group="lmpatch.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    (tmp_path / "sizes").write_text("0.15\n0.2\n")
    lm = tiny_lm("llama")
    by_path = fit(lm, "outside", tmp_path / "sizes")
    assert by_path.hash() == fit(lm, "outside", [outside.Record(0.15), outside.Record(0.2)]).hash()
    (delta,) = by_path.deltas.values()  # type: ignore[attr-defined]
    assert bool((delta.b == delta.b.new_tensor(0.15 + 0.2)).all())
    with pytest.raises(BadInput, match="size of 0"):
        fit(lm, "outside", [outside.Record(0.0)])
