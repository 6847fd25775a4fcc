"""Editor files: found by method and model, and refused once a byte or a word of them was altered."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from tiny import tiny_lm

from lmpatch import BadInput, BadPatch, WrongModel
from lmpatch.models.lm import LM
from lmpatch.patches import editor as editors
from lmpatch.patches.base import ANY, Base
from lmpatch.patches.editor import KEY, Editor, find_editor, load_editor

PACKAGED_HASHES = {
    "recipe-gemma-3-270m": "9480f32cd156d9e7bd29f87b4e92d92a118c07fb4d52d45df4c5c2cfd8b0722e",
    "recipe-retrieval": "8160b4862f2ffeb27561a8147b5c862ae70ff00fb053875afe67b6356d70cbba",
    "recipe-smollm2-135m-instruct": "847970db6f6b97290edf7003dd96795a7df97894782cfe14537015f9f2e4bae0",
}


def make(lm: LM, method: str = "mine", value: float = 1.0) -> Editor:
    return Editor(method, {"steps": 3}, Base(lm.fingerprint(), lm.name), {"rank": 1}, {"w": torch.full((2,), value)})


def rewrite(path: Path, change: Any) -> None:
    """The same tensors under a changed header."""
    with safe_open(path, "pt") as file:
        head = json.loads(file.metadata()[KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    change(head)
    safetensors.torch.save_file(tensors, path, {KEY: json.dumps(head)})


@pytest.mark.parametrize("field", ["config", "base", "parts", "made", "method", "sha256"])
def test_a_changed_word_of_any_header_field_is_refused(tmp_path: Path, field: str) -> None:
    path = tmp_path / "e.safetensors"
    make(tiny_lm("llama")).save(path)

    def change(head: dict[str, Any]) -> None:
        if field == "base":
            head["base"]["name"] = "another"
        elif isinstance(head[field], dict):
            head[field]["new"] = 1
        else:
            head[field] += "x"

    rewrite(path, change)
    with pytest.raises(BadPatch, match="altered"):
        load_editor(path)


@pytest.mark.parametrize(
    "head", ["[]", '{"schema": 3}', '{"schema": 2}', '{"schema": 2, "base": {"name": 1}}', "no json"]
)
def test_a_header_that_lmpatch_does_not_write_is_refused(tmp_path: Path, head: str) -> None:
    path = tmp_path / "e.safetensors"
    safetensors.torch.save_file({"w": torch.ones(1)}, path, {KEY: head})
    with pytest.raises(BadPatch):
        load_editor(path)


def test_a_file_of_the_first_release_still_opens(tmp_path: Path) -> None:
    path, editor = tmp_path / "e.safetensors", make(tiny_lm("llama"))
    head = {"schema": 1, "method": "mine", "config": editor.config, "parts": editor.parts, "made": {}}
    head |= {"base": {"fingerprint": editor.base.fingerprint, "name": editor.base.name}, "sha256": editor.hash()}
    safetensors.torch.save_file(editor.tensors, path, {KEY: json.dumps(head)})
    loaded = load_editor(path)
    assert (loaded.hash(), loaded.base, loaded.config) == (editor.hash(), editor.base, editor.config)
    rewrite(path, lambda head: head.update(parts={"rank": 2}))
    with pytest.raises(BadPatch, match="altered"):
        load_editor(path)


def test_the_packaged_editors_open_and_are_found_for_their_model_and_for_any() -> None:
    paths = sorted(editors.PACKAGED.glob("*.safetensors"))
    assert [path.stem for path in paths] == list(PACKAGED_HASHES)
    for path in paths:
        editor = load_editor(path)
        assert (editor.method, editor.hash()) == ("recipe", PACKAGED_HASHES[path.stem])
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()[KEY])["schema"] == editors.SCHEMA
    found = find_editor("recipe", tiny_lm("llama"))
    assert found.base.any_model and found.hash() == PACKAGED_HASHES["recipe-retrieval"]
    with pytest.raises(BadInput, match="no other editor for tiny-llama comes with lmpatch.*lmpatch train"):
        find_editor("other", tiny_lm("llama"))


def test_an_editor_that_is_the_rest_of_another_is_read_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    base = Editor("mine", {}, ANY, {"any": 1}, {"shared": torch.arange(3.0)})
    own = editors.joined(make(lm), base)
    assert set(own.tensors) == {"shared", *make(lm).tensors} and own.parts == {"any": 1, **make(lm).parts}
    own.save(tmp_path / "own.safetensors")
    with pytest.raises(BadPatch, match="the rest of another editor"):
        load_editor(tmp_path / "own.safetensors")
    base.save(tmp_path / "base.safetensors")
    found = load_editor(tmp_path / "own.safetensors")
    assert found.hash() == own.hash() and found.base == make(lm).base
    with safe_open(tmp_path / "own.safetensors", "pt") as file:
        assert set(file.keys()) == set(make(lm).tensors)
    assert find_editor("mine", lm, tmp_path).hash() == own.hash()
    assert find_editor("mine", tiny_lm("gpt2"), tmp_path).hash() == base.hash()  # what fits any model
    found.save(tmp_path / "whole.safetensors", whole=True)
    (tmp_path / "base.safetensors").unlink()
    assert load_editor(tmp_path / "whole.safetensors").hash() == own.hash()
    Editor("mine", {}, ANY, {"any": 1}, {"shared": torch.arange(3.0) + 1}).save(tmp_path / "base.safetensors")
    with pytest.raises(BadPatch, match="the rest of another editor"):  # not the one it was saved on
        load_editor(tmp_path / "own.safetensors")
    rewrite(tmp_path / "own.safetensors", lambda head: head.update(on="0" * 64))
    with pytest.raises(BadPatch, match="altered"):
        load_editor(tmp_path / "own.safetensors")


@pytest.mark.slow
def test_an_editor_is_found_by_method_and_model_in_the_package_and_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama")
    make(lm, value=1.0).save(tmp_path / "a.safetensors")
    make(tiny_lm("gpt2"), value=2.0).save(tmp_path / "b.safetensors")
    make(lm, "other", value=3.0).save(tmp_path / "c.safetensors")
    for where in ({"editor": tmp_path}, {}):
        if not where:
            monkeypatch.setattr(editors, "PACKAGED", tmp_path)
        assert [
            float(find_editor(method, tiny_lm(family), **where).tensors["w"][0])
            for method, family in (("mine", "llama"), ("mine", "gpt2"), ("other", "llama"))
        ] == [1, 2, 3]
        with pytest.raises(BadInput, match="no other editor for tiny-gpt2"):
            find_editor("other", tiny_lm("gpt2"), **where)


def test_an_installed_package_offers_a_folder_of_editors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    (tmp_path / "offers_editors").mkdir()
    (tmp_path / "offers_editors" / "__init__.py").touch()
    make(lm).save(tmp_path / "offers_editors" / "mine-llama.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("some", "offers_editors", "lmpatch.editors")
    monkeypatch.setattr(editors, "entry_points", lambda group: [point] if group == point.group else [])
    assert find_editor("mine", lm).hash() == make(lm).hash()


@pytest.mark.slow
def test_an_editor_at_hand_or_in_a_file_must_be_of_this_method_and_model(tmp_path: Path) -> None:
    lm, path = tiny_lm("llama"), tmp_path / "e.safetensors"
    make(lm).save(path)
    for given in (path, str(path), make(lm)):
        assert find_editor("mine", lm, given).hash() == make(lm).hash()
        with pytest.raises(BadPatch, match="editor of mine, other was asked for"):
            find_editor("other", lm, given)
        with pytest.raises(WrongModel, match="trained for tiny-llama"):
            find_editor("mine", tiny_lm("gpt2"), given)
    with pytest.raises(BadPatch, match="no editor"):
        find_editor("mine", lm, tmp_path / "none.safetensors")
