"""Patch and editor files of others, whose hashes are right: each lie is one line; nothing waits or fills the memory."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import tiny_lm

from lmpatch.errors import BadPatch, LmpatchError, NotEnoughMemory
from lmpatch.inference.interventions import Insert
from lmpatch.methods import recipe
from lmpatch.patches.base import Base
from lmpatch.patches.editor import KEY, Editor, find_editor, load_editor
from lmpatch.patches.file import load_patch
from lmpatch.patches.format import HEADER, TENSORS, sealed
from lmpatch.patches.memory.patch import MemoryPatch, retriever_of
from lmpatch.patches.merge import merge
from lmpatch.patches.weight.delta import LowRank, Rows, Scale, Sparse
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.retrieval import Scope


@pytest.fixture
def folder(random_patch, tmp_path: Path) -> Path:
    random_patch(tiny_lm("llama")).save(tmp_path / "patch")
    return tmp_path / "patch"


def reseal(folder: Path, **changes: Any) -> None:
    (folder / HEADER).write_bytes(sealed(json.loads((folder / HEADER).read_bytes()) | changes))


def one_line(call: Callable[[], Any], error: type[LmpatchError] = BadPatch) -> str:
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def in_time(call: Callable[[], Any]) -> None:
    """``call`` ends; a reader of a pipe would not."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("escape", [r"\ud800", r"a\udfff", r"\ud83d x"])
def test_half_a_character_in_a_header_is_one_line(folder: Path, escape: str) -> None:
    raw = (folder / HEADER).read_bytes()
    (folder / HEADER).write_bytes(raw.replace(b'"method": "random_low_rank"', f'"method": "{escape}"'.encode()))
    assert "patch.json" in one_line(lambda: load_patch(folder))


@pytest.mark.parametrize("levels", [101, 400, 900, 990, 1100, 50_000])
@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_a_deep_header_is_one_line(folder: Path, levels: int, pair: str) -> None:
    reseal(folder, notes={"d": "@"})
    deep = "[" * levels + "]" * levels if pair == "[]" else '{"a":' * levels + "1" + "}" * levels
    raw = (folder / HEADER).read_bytes()
    (folder / HEADER).write_bytes(raw.replace(b'"@"', deep.encode()))
    one_line(lambda: load_patch(folder))


@pytest.mark.parametrize(
    "made",
    [
        {"seconds": "x"}, {"seconds": None}, {"seconds": [1]}, {"seconds": True}, {"seconds": 10**400},
        {"weight_norms": []}, {"weight_norms": None}, {"weight_norms": 1}, {"weight_norms": {"a": "x"}},
        {"weight_norms": {"a": None}}, {"weight_norms": {"a": [1.0]}}, {"weight_norms": {"a": {}}},
    ],
)  # fmt: skip
def test_wrong_types_in_made_are_one_line(folder: Path, made: dict[str, Any]) -> None:
    reseal(folder, made=made)
    assert "numbers" in one_line(lambda: load_patch(folder))


@pytest.mark.parametrize("notes", [{"strength": "x"}, {"strength": None}, {"strength": []}])
def test_a_strength_that_is_no_number_is_one_line(folder: Path, notes: dict[str, Any]) -> None:
    reseal(folder, notes=notes)
    one_line(lambda: load_patch(folder))


def test_what_lmpatch_does_not_read_of_made_and_notes_may_be_anything(folder: Path) -> None:
    reseal(folder, made={"other": [None, {"a": []}]}, notes={"loss": "x", "units": None})
    patch = load_patch(folder)
    assert "random_low_rank" in patch.summary()
    assert merge(patch, patch).made["seconds"] == 0


def test_nothing_of_a_patch_steers_a_terminal(folder: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
    header = json.loads((folder / HEADER).read_bytes())
    reseal(
        folder,
        method=evil,
        edits=[{"prompt": evil, "target": evil}, {"text": evil}],
        base=header["base"] | {"name": evil},
    )
    patch = load_patch(folder)
    for text in (patch.summary(), repr(patch)):
        assert all(c.isprintable() or c == "\n" for c in text) and "owned" in text


@pytest.mark.parametrize("name", [HEADER, TENSORS])
def test_a_pipe_a_device_and_a_folder_are_refused_at_once(folder: Path, name: str) -> None:
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        (folder / name).unlink() if (folder / name).is_file() else None
        make(folder / name)
        in_time(lambda: one_line(lambda: load_patch(folder)))
        (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()


@pytest.mark.parametrize("name", [HEADER, TENSORS])
def test_a_file_larger_than_the_memory_is_one_line(folder: Path, name: str) -> None:
    os.truncate(folder / name, 2**43)
    assert "bytes" in one_line(lambda: load_patch(folder))


# --- declared sizes ---


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["sparse rows", "sparse low_rank", "rows sparse", "scale scale", "scale scale scale"])
def test_declared_shapes_of_terabytes_do_not_merge(kinds: str, tmp_path: Path) -> None:
    lm, name = tiny_lm("llama"), "w"
    index, size = torch.tensor([1, 2]), 2**21
    make: dict[str, Callable[[], Any]] = {
        "sparse": lambda: Sparse(index, torch.ones(2), (size, size)),
        "rows": lambda: Rows(index[:1], torch.ones(1, size), size),
        "low_rank": lambda: LowRank(torch.ones(size, 1), torch.ones(1, size)),
        "scale": lambda: Scale(index, torch.ones(2), (size, 2**44)),
    }
    patches = []
    for i, kind in enumerate(kinds.split()):
        patch = WeightPatch(
            method="m", config={}, base=Base(lm.fingerprint(), lm.name, {name: "x"}), deltas={name: make[kind]()}
        )
        patch.save(tmp_path / str(i))
        patches.append(load_patch(tmp_path / str(i)))
    assert "needs about" in one_line(lambda: merge(*patches), NotEnoughMemory)
    assert all(patch.summary() for patch in patches)


def memory_folder(path: Path, parts: dict[str, Any], edits: list[Any] | None = None, keys: Any = None) -> Path:
    lm = tiny_lm("llama")
    path.mkdir()
    tensors = {
        "keys": torch.zeros(len(edits or []), 16).half() if keys is None else keys,
        **{f"editor/{name}": tensor for name, tensor in EDITOR.tensors.items()},
    }
    data = safetensors.torch.save(tensors)
    (path / TENSORS).write_bytes(data)
    header = {
        "schema": 1, "kind": "memory", "method": "recipe", "config": {}, "edits": edits or [], "made": {}, "notes": {},
        "base": asdict(Base(lm.fingerprint(), "m")), "parts": parts, "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    (path / HEADER).write_bytes(sealed(header))
    return path


EDITOR = recipe.example_editor(tiny_lm("llama"))
SHAPE = EDITOR.parts["shape"]
PARTS: dict[str, Any] = EDITOR.parts | {"editor_hash": EDITOR.hash(), "scope": {}}


def test_the_memory_below_is_read_as_it_stands(tmp_path: Path) -> None:
    patch = load_patch(memory_folder(tmp_path / "m", PARTS, [{"prompt": "A", "target": "B"}]))
    assert (
        isinstance(patch, MemoryPatch)
        and patch.scope == Scope(lookup="whole", doubt=1.0)
        and patch.scope.at is not Insert
    )


@pytest.mark.parametrize(
    "shape",
    [
        {"content": 99}, {"content": 16}, {"content": "8"}, {"width": "16"}, {"encoder": 5}, {"encoder": None},
        {"prompt_tokens": 10**10}, {"sentinel_tokens": 10**11}, {"features": 10**9}, {"d_model": 10**7},
        {"target_tokens": 10**6}, {"adapt": 10**8}, {"prompt_tokens": "6"}, {"features": 1.5}, {"d_model": []},
        {"width": -16}, {"sentinel_tokens": -1}, {"prompt_tokens": 10**30}, {"adapt": "0"}, {"new": 1},
        {"sentinel_tokens": None}, {"encoder": float("nan")}, {"pooler": "../x"}, {"pooler": 1}, {"prompt_tokens": {}},
    ],
)  # fmt: skip
def test_a_memory_patch_with_another_shape_is_one_line(tmp_path: Path, shape: dict[str, Any]) -> None:
    folder = memory_folder(tmp_path / "m", PARTS | {"shape": SHAPE | shape})
    one_line(lambda: load_patch(folder))
    editor = Editor("recipe", {}, Base("a" * 64, "m"), PARTS | {"shape": SHAPE | shape}, EDITOR.tensors)
    editor.save(tmp_path / "e.safetensors")
    one_line(lambda: retriever_of(load_editor(tmp_path / "e.safetensors")))


@pytest.mark.parametrize(
    "parts",
    [
        {"shape": None}, {"shape": []}, {"shape": "x"}, {"scope": None}, {"scope": []}, {"scope": {"top_k": "1"}},
        {"scope": {"gate": "never"}}, {"scope": {"gate": []}}, {"scope": {"threshold": "x"}}, {"scope": {"more": 1}},
        {"scope": {"insert": 5}}, {"retriever": 5}, {"retriever": []}, {"retriever": "none"},
        {"retriever": "cosine", "encoder": 5, "width": 16}, {"retriever": "cosine", "encoder": "e", "width": "16"},
        {"retriever": "cosine", "encoder": "e", "width": 10**12},
    ],
)  # fmt: skip
def test_a_memory_patch_with_other_parts_is_one_line(tmp_path: Path, parts: dict[str, Any]) -> None:
    one_line(lambda: load_patch(memory_folder(tmp_path / "m", PARTS | parts)))


@pytest.mark.parametrize("edit", [{}, {"prompt": "a"}, {"prompt": 5, "target": "b"}, {"prompt": "a", "target": None}])
def test_a_memory_patch_with_other_facts_is_one_line(tmp_path: Path, edit: dict[str, Any]) -> None:
    one_line(lambda: load_patch(memory_folder(tmp_path / "m", PARTS, [edit])))


@pytest.mark.parametrize(
    "keys", [torch.zeros(0, 17).half(), torch.zeros(16), torch.zeros(0, 16).long(), torch.zeros(1, 16)]
)
def test_a_memory_patch_with_other_keys_is_one_line(tmp_path: Path, keys: torch.Tensor) -> None:
    one_line(lambda: load_patch(memory_folder(tmp_path / "m", PARTS, keys=keys)))


# --- editors ---


def write_editor(path: Path) -> bytes:
    base = Base("a" * 64, "gemma-3-270m")
    Editor("recipe", {"lr": 1.0}, base, {"shape": SHAPE}, {"x": torch.zeros(3)}, {"steps": 7}).save(path)
    return path.read_bytes()


@pytest.mark.slow
def test_no_byte_of_an_editor_can_be_changed(tmp_path: Path) -> None:
    """Every byte, one bit each: base, config and made as well as the tensors."""
    path = tmp_path / "e.safetensors"
    raw = write_editor(path)
    for i in range(len(raw)):
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1 << i % 8]) + raw[i + 1 :])
        with pytest.raises(BadPatch):
            load_editor(path)
    for cut in range(0, len(raw), 7):
        path.write_bytes(raw[:cut])
        one_line(lambda: load_editor(path))


@pytest.mark.parametrize(
    "head", ["[]", "{}", '"x"', "null", "[" * 990 + "]" * 990, '{"schema": 2, "method": "\\ud800"}']
)
def test_an_editor_with_another_header_is_one_line(tmp_path: Path, head: str) -> None:
    path = tmp_path / "e.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(3)}, path, {KEY: head})
    one_line(lambda: load_editor(path))


def test_an_editor_that_is_a_pipe_a_device_or_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    for path in (tmp_path / "fifo.safetensors", Path("/dev/zero"), tmp_path):
        in_time(lambda path=path: one_line(lambda: load_editor(path)))
    in_time(lambda: one_line(lambda: find_editor("recipe", tiny_lm("llama"), tmp_path)))
