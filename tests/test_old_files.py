"""What the first release wrote still opens and does the same, and the same seed still makes it.

``golden/files`` was written by release 0.1.0 with ``golden/make.py tiny --small``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from golden import make as golden
from safetensors.torch import load_file
from torch import Tensor

import lmpatch as lp

FILES = Path(__file__).parent / "golden" / "files"
EDITOR = FILES / "memory" / "editor.safetensors"
WEIGHTS = {
    "llama": "cc5b42cfebf7326559ae1c2f0648db5010c00c239ca2eeaa3cf997586544e0aa",
    "gemma3": "2c286bd60b772ab06562ec9c581ae489e3172b708b46e098f2c33e68bfc877e0",
}
"""SHA-256 over the fp32 bytes of all parameters, in the order of their names."""

every_file = pytest.mark.parametrize("name", golden.SMALL)


@pytest.fixture(autouse=True)
def nothing_computed_before() -> Iterator[None]:
    with golden.fresh_cache():
        yield


@cache
def model(family: str) -> lp.LM:
    """Shared: every test leaves it as it was."""
    return golden.tiny_model(family)


def bits(lm: lp.LM) -> str:
    digest = hashlib.sha256()
    for _, parameter in sorted(lm.model.named_parameters()):
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def recorded(name: str) -> tuple[list[str], Tensor]:
    """Texts, and logits [questions, tokens]."""
    texts = json.loads((FILES / "answers.json").read_text(encoding="utf-8"))
    return texts[name], load_file(FILES / "logits.safetensors")[name]


def assert_answers(lm: lp.LM, name: str) -> None:
    texts, logits = golden.answers(lm)
    wanted, numbers = recorded(name)
    assert texts == wanted
    torch.testing.assert_close(logits, numbers, rtol=1e-5, atol=1e-5 * float(numbers.abs().max()))


def assert_near(new: dict[str, Tensor], old: dict[str, Tensor]) -> None:
    """Equal to 1e-4 of a tensor's largest entry; in fp16 and bf16 a number may round to the next one."""
    assert set(new) == set(old)
    for name, tensor in old.items():
        assert (new[name].dtype, new[name].shape) == (tensor.dtype, tensor.shape), name
        if not tensor.is_floating_point():
            assert torch.equal(new[name], tensor), name
        elif tensor.numel():
            step = max(1e-4, torch.finfo(tensor.dtype).eps if tensor.element_size() == 2 else 0)
            gap, largest = (new[name].double() - tensor.double()).abs().max(), tensor.double().abs().max()
            assert gap <= step * largest, f"{name}: differs by {gap:.3g}, largest entry {largest:.3g}"


# Old files


@pytest.mark.slow
@pytest.mark.parametrize("family", golden.FAMILIES)
def test_the_models_are_those_that_the_files_were_made_for(family: str) -> None:
    assert bits(model(family)) == WEIGHTS[family]
    assert_answers(model(family), f"clean-{family}")


@pytest.mark.slow
@every_file
def test_an_old_patch_opens_and_does_what_it_did_and_comes_off_to_the_bit(name: str) -> None:
    method, _, family = name.rpartition("-")
    lm, patch = model(family), lp.load_patch(FILES / name)
    assert patch.method == method and patch.edits
    with lp.apply(lm, patch):
        assert_answers(lm, name)
    assert bits(lm) == WEIGHTS[family]
    assert_answers(lm, f"clean-{family}")


@every_file
def test_an_old_patch_that_is_saved_again_has_the_same_content(name: str, tmp_path: Path) -> None:
    old = lp.load_patch(FILES / name)
    old.save(tmp_path / name)
    new = lp.load_patch(tmp_path / name)
    assert new.hash() == old.hash() and new.base == old.base and new.notes == old.notes
    assert not golden.differing_tensors(FILES / name / "patch.safetensors", tmp_path / name / "patch.safetensors")


def test_the_old_files_are_of_every_kind_there_was() -> None:
    kinds = {json.loads(path.read_text(encoding="utf-8"))["kind"] for path in FILES.glob("*/patch.json")}
    assert kinds == {"weight", "memory", "decode", "steer"}


@pytest.fixture
def memory(tmp_path: Path) -> lp.Memory:
    """The old memory, copied: other tests find it untouched."""
    shutil.copytree(FILES / "memory", tmp_path / "memory")
    return lp.Memory.open(tmp_path / "memory")


def told(memory: lp.Memory, version: int | None = None) -> dict[str, str]:
    return {entry.edit.prompt: entry.edit.target for entry in memory.store.facts(version=version)}


def test_an_old_memory_opens_with_its_past(memory: lp.Memory) -> None:
    facts = {edit.prompt: edit.target for edit in golden.FACTS[:12]}
    first, second = golden.FACTS[0].prompt, golden.FACTS[1].prompt
    assert told(memory, 1) == dict(list(facts.items())[:10])
    assert told(memory, 2) == facts
    assert told(memory, 3) == facts | {first: "Quito"}
    assert told(memory) == {p: t for p, t in (facts | {first: "Quito"}).items() if p != second}
    assert [version.number for version in memory.store.versions()] == [1, 2, 3, 4]


@pytest.mark.slow
def test_an_old_memory_answers_as_it_did_and_takes_new_facts(memory: lp.Memory) -> None:
    lm = model("llama")
    with lp.apply(lm, memory.patch()):
        assert_answers(lm, "memory")
    with lp.apply(lm, memory.snapshot()):
        assert_answers(lm, "memory")
    assert_answers(lm, "clean-llama")
    assert memory.add([lp.Edit(golden.FACTS[1].prompt, "Oslo")]) == 5
    assert told(memory)[golden.FACTS[1].prompt] == "Oslo"
    memory.store.rollback(1)
    assert told(memory) == told(memory, 1)


def test_an_old_editor_opens_for_the_model_it_was_trained_for() -> None:
    editor = lp.load_editor(EDITOR)
    assert editor.method == "recipe" and editor.base.fingerprint == model("llama").fingerprint()
    assert editor.made["steps"] == 8


# Made again


@pytest.mark.slow
@every_file
def test_the_same_seed_makes_the_same_patch_as_the_first_release_did(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, _, family = name.rpartition("-")
    monkeypatch.setitem(golden.SETTINGS, "rome", golden.SETTINGS["rome"] | {"key": "bare"})  # was its only form
    old = lp.load_patch(FILES / name)
    new = golden.make_patch(model(family), method, lp.load_editor(EDITOR) if method == "recipe" else None)
    assert (new.kind, new.edits, new.parts(), new.base) == (old.kind, old.edits, old.parts(), old.base)
    assert_near(new.tensors() | new.extras, old.tensors() | old.extras)
    assert bits(model(family)) == WEIGHTS[family]
