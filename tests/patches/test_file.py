"""Patch folders: what is saved comes back, and nothing else is ever accepted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_lm

from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput, BadPatch
from lmpatch.patches.file import load_patch
from lmpatch.patches.format import HEADER, TENSORS, sealed
from lmpatch.patches.ledger import apply
from lmpatch.patches.weight.delta import KINDS
from lmpatch.patches.weight.patch import WeightPatch


@dataclass(frozen=True)
class Config:
    layers: tuple[int, ...] = (1, 2)
    lr: float = 0.1
    clamp: float = float("inf")
    rank: int | None = None


@pytest.fixture
def patch(random_delta) -> WeightPatch:
    """One change of every kind, with everything a patch can hold."""
    lm = tiny_lm("llama")
    weights = [lm.layout.weight(lm.layout.downs[i]) for i in range(4)] + [lm.layout.weight(lm.layout.head)]
    shapes = [tuple(lm.parameter(name).shape) for name in weights]
    deltas = {n: random_delta(kind, s) for n, s, kind in zip(weights, shapes, KINDS, strict=True)}
    edits = [Edit("Der Eiffelturm steht in", "Röm", subject="Eiffelturm", aliases=["Rom"])]
    extras = {"keys.1": torch.randn(3, 128), "ids": torch.arange(4)}
    return WeightPatch.make(
        lm, deltas, method="all", config=Config(), edits=edits, seconds=2.0, notes={"loss": [0.5, float("nan")]},
        extras=extras,
    )  # fmt: skip


@pytest.fixture
def folder(patch: WeightPatch, tmp_path: Path) -> Path:
    patch.save(tmp_path / "patch")
    return tmp_path / "patch"


def reseal(folder: Path, *, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> None:
    """Forge a folder whose hashes are right."""
    header = json.loads((folder / HEADER).read_text()) | changes
    if tensors is not None:
        (folder / TENSORS).write_bytes(safetensors.torch.save(tensors))
        header["tensors_sha256"] = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    (folder / HEADER).write_bytes(sealed(header))


def test_everything_comes_back(patch: WeightPatch, folder: Path) -> None:
    again = load_patch(folder)
    assert isinstance(again, WeightPatch)
    for name in ("method", "config", "base", "edits", "made", "notes", "kind"):
        assert getattr(again, name) == getattr(patch, name), name
    assert again.config == {"layers": [1, 2], "lr": 0.1, "clamp": "inf", "rank": None}
    assert again.edits[0]["target"] == "Röm" and "rephrases" not in again.edits[0]
    assert set(again.deltas) == set(patch.deltas) and again.nbytes == patch.nbytes
    mine, theirs = patch.all_tensors(), again.all_tensors()
    assert set(mine) == set(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert all(mine[n].dtype == theirs[n].dtype for n in mine)
    assert again.hash() == patch.hash() and again.summary() == patch.summary()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_loaded_patch_does_what_the_saved_one_did(
    family: str, dtype, kind, mount, random_patch, logits, tmp_path
) -> None:
    lm = tiny_lm(family, dtype)
    patch = random_patch(lm, kind)
    with apply(lm, patch, mount):
        want = logits(lm)
    patch.save(tmp_path / "p")
    with apply(lm, load_patch(tmp_path / "p"), mount):
        assert torch.equal(logits(lm), want)


def test_the_hash_is_of_the_content_not_of_the_clock(patch: WeightPatch) -> None:
    assert replace(patch, made={"seconds": 99.0}).hash() == patch.hash()
    assert replace(patch, method="other").hash() != patch.hash()
    assert replace(patch, edits=()).hash() != patch.hash()
    assert replace(patch, config={}).hash() != patch.hash()
    assert patch.scaled(0.5).hash() != patch.hash()


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from([HEADER, TENSORS]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    cut=st.booleans(),
)
def test_any_flipped_bit_and_any_truncation_is_refused(
    folder: Path, file: str, place: float, bit: int, cut: bool
) -> None:
    whole = (folder / file).read_bytes()
    at = int(place * len(whole))
    broken = whole[:at] if cut else whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
    (folder / file).write_bytes(broken)
    try:
        with pytest.raises(BadPatch):
            load_patch(folder)
    finally:
        (folder / file).write_bytes(whole)
    load_patch(folder)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from([HEADER, TENSORS]), content=st.binary(max_size=200))
def test_any_other_bytes_are_refused(folder: Path, file: str, content: bytes) -> None:
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(content)
    try:
        with pytest.raises(BadPatch):
            load_patch(folder)
    finally:
        (folder / file).write_bytes(whole)


def test_a_missing_file_folder_or_a_plain_file_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadPatch, match="no patch in"):
        load_patch(tmp_path / "nowhere")
    with pytest.raises(BadPatch, match="A patch is a folder"):
        load_patch(folder / HEADER)
    for file in (HEADER, TENSORS):
        moved = (folder / file).rename(tmp_path / "aside")
        with pytest.raises(BadPatch, match=file):
            load_patch(folder)
        moved.rename(folder / file)


class Boom:
    """Unpickling this leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


@pytest.mark.slow
@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_safetensors_header_as_long_as_a_pickles_first_bytes_is_no_pickle(
    patch: WeightPatch, tmp_path: Path, length: int
) -> None:
    name = next(iter(patch.deltas))
    base = replace(patch.base, touched={name: patch.base.touched[name]})
    small = replace(patch, deltas={name: patch.deltas[name]}, base=base)
    for pad in range(1, length, 4):
        named = replace(small, extras={"x" * pad: torch.ones(1)})
        named.save(tmp_path / str(pad))
        if (tmp_path / str(pad) / TENSORS).read_bytes()[:8] == length.to_bytes(8, "little"):
            assert load_patch(tmp_path / str(pad)).hash() == named.hash()
            return
    pytest.fail("no name gave a header of that length")


@pytest.mark.parametrize("name", ["patch.pt", "adapter_model.bin", "x.pkl", TENSORS, HEADER])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_unread(folder: Path, tmp_path: Path, name: str, zipped: bool) -> None:
    buffer, mark = io.BytesIO(), tmp_path / "ran"
    torch.save(Boom(mark), buffer) if zipped else pickle.dump(Boom(mark), buffer)
    (folder / name).write_bytes(buffer.getvalue())
    for path in (folder, folder / name):
        with pytest.raises(BadPatch, match="never unpickles"):
            load_patch(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": 2}, "schema 2.*Update"),
        ({"kind": "hook"}, "kind 'hook'.*Update"),
        ({"more": 1}, "more"),
        ({"parts": []}, "parts"),
        ({"edits": [3]}, "not as lmpatch writes it"),
        ({"base": {}}, "which model"),
        ({"base": {"fingerprint": 1, "name": "x", "touched": {}}}, "which model"),
        ({"base": {"fingerprint": "1", "name": "x", "touched": {}}}, "hashes"),
        ({"parts": {}}, "without a place"),
    ],
)
def test_a_well_sealed_forgery_is_refused_for_what_it_says(folder: Path, changes: dict[str, Any], says: str) -> None:
    reseal(folder, **changes)
    with pytest.raises(BadPatch, match=says):
        load_patch(folder)


@pytest.mark.parametrize("value", [[2, 3], [64], [64.0, 128.0], ["64", "128"], [-64, -128], None, 5, [True, True]])
def test_a_forged_shape_is_refused(folder: Path, patch: WeightPatch, value: Any) -> None:
    for name, part in patch.parts().items():
        reseal(folder, parts=patch.parts() | {name: part | {"shape": value}})
        with pytest.raises(BadPatch, match=name):
            load_patch(folder)


@pytest.mark.parametrize("kind", ["other", None, [], 3])
def test_a_forged_kind_of_change_is_refused(folder: Path, patch: WeightPatch, kind: Any) -> None:
    name = next(iter(patch.deltas))
    reseal(folder, parts=patch.parts() | {name: {"kind": kind, "shape": [64, 128]}})
    with pytest.raises(BadPatch, match=name):
        load_patch(folder)


@pytest.mark.slow
def test_forged_tensors_are_refused(folder: Path, patch: WeightPatch) -> None:
    for name, t in patch.tensors().items():
        others = {k: v for k, v in patch.all_tensors().items() if k != name}
        forgeries = [others, {**others, name: t[:-1]}, {**others, name: t[None]}, {**others, name: t.to(torch.int16)}]
        if t.is_floating_point():
            forgeries.append({**others, name: t.clone().index_fill_(0, torch.tensor(0), torch.nan)})
            forgeries.append({**others, name: t.clone().index_fill_(0, torch.tensor(0), torch.inf)})
        else:
            forgeries += [{**others, name: t - 10**9}, {**others, name: torch.zeros_like(t)}]
        for tensors in forgeries:
            reseal(folder, tensors={k: v.contiguous() for k, v in tensors.items()})
            with pytest.raises(BadPatch):
                load_patch(folder)
    reseal(folder, tensors={**patch.all_tensors(), "stray/value": torch.zeros(1)})
    with pytest.raises(BadPatch, match="stray"):
        load_patch(folder)
    reseal(folder, tensors=patch.all_tensors())
    assert load_patch(folder).hash() == patch.hash()


# --- writing ---


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_saving_the_same_patch_again_passes_and_another_one_is_not_lost(patch: WeightPatch, folder: Path) -> None:
    again = replace(patch, made={"seconds": 99.0})
    again.save(folder)
    assert load_patch(folder).made == again.made
    for other in (patch.scaled(0.5), replace(patch, method="other"), replace(patch, config={"seed": 7})):
        with pytest.raises(BadInput, match=r"holds another patch.*overwrite=True"):
            other.save(str(folder))
    assert load_patch(folder).hash() == patch.hash()


@pytest.mark.parametrize("on", [[1], "rome", 3])
def test_what_a_patch_was_fitted_on_top_of_is_named_or_refused(patch: WeightPatch, folder: Path, on: Any) -> None:
    reseal(folder, made={"on": {"0" * 64: "rome\x1b[2J"}})
    assert "rome" in load_patch(folder).summary() and "\x1b" not in load_patch(folder).summary()
    reseal(folder, made={"on": on})
    with pytest.raises(BadPatch, match="or on no names"):
        load_patch(folder)


@pytest.mark.parametrize("name", [HEADER, TENSORS])
def test_a_broken_patch_is_replaced_only_when_that_is_asked_for(patch: WeightPatch, folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"{}")
    with pytest.raises(BadInput, match="another path"):
        patch.save(folder)
    patch.save(folder, overwrite=True)
    assert load_patch(folder).hash() == patch.hash()


def test_saving_again_replaces_a_patch_and_nothing_else(patch: WeightPatch, folder: Path, tmp_path: Path) -> None:
    half = patch.scaled(0.5)
    half.save(folder, overwrite=True)
    assert load_patch(folder).hash() == half.hash()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match="another path"):
        patch.save(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput):
        patch.save(tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / HEADER).write_text("{}")
    with pytest.raises(BadInput):
        patch.save(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    patch.save(tmp_path / "empty")
    patch.save(tmp_path / "new" / "deep")
    assert names(tmp_path) == {"patch", "file", "full", "empty", "new"} and load_patch(folder).hash() == half.hash()


@pytest.mark.parametrize("step", ["write_bytes", "fsync", "replace"])
@pytest.mark.parametrize("nth", [0, 1])
def test_a_save_that_fails_keeps_the_old_patch_and_leaves_no_litter(
    patch: WeightPatch, folder: Path, tmp_path: Path, monkeypatch, step: str, nth: int
) -> None:
    where: Any = Path if step == "write_bytes" else os
    call, count = getattr(where, step), [0]

    def failing(*args: Any) -> Any:
        count[0] += 1
        if count[0] == nth + 1:
            raise OSError("disk full")
        return call(*args)

    monkeypatch.setattr(where, step, failing)
    with pytest.raises(OSError, match="disk full"):
        patch.scaled(0.5).save(folder, overwrite=True)
    monkeypatch.undo()
    assert load_patch(folder).hash() == patch.hash() and names(tmp_path) == {"patch"}


def test_the_summary_says_what_a_person_asks(patch: WeightPatch) -> None:
    text = patch.summary()
    says = ["all", "1 edit ", "tiny-llama", "Der Eiffelturm steht in -> Röm", "low_rank 2 on 64 x 128", "dense on"]
    for part in [*says, "rows 5", "scale 4", "of its norm", "KiB", "made in 2.0 s"]:
        assert part in text
    many = replace(patch, edits=({"prompt": "a", "target": "b"},) * 3 + ({"text": "x" * 500},) * 5)
    assert "8 edits" in many.summary() and "and 5 more" in many.summary()
    assert len(replace(patch, edits=({"text": "x" * 500},)).summary().splitlines()[1]) < 120
