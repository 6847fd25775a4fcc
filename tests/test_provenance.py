"""What is recorded of a patch, and how files take each other's place."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from snapshot import Lines, name
from tiny import tiny_lm

from lmpatch.cli.demo import example
from lmpatch.errors import CannotWrite
from lmpatch.files import new_folder, replacing
from lmpatch.patches.base import Base
from lmpatch.patches.editor import Editor
from lmpatch.patches.export import export
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.provenance import made_now


def test_a_file_takes_the_place_of_another_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "file"
    for text in ("old", "new"):
        with replacing(path) as work:
            work.write_text(text)
            assert work.parent == path.parent  # a rename stays on one file system
            assert text == "old" or path.read_text() == "old"
        assert path.read_text() == text and [*path.parent.iterdir()] == [path]


def test_a_file_that_fails_halfway_leaves_the_old_one_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as work:
        work.write_text("ha")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_interrupt_at_any_line_leaves_the_old_one_or_the_new_one_and_no_litter(kind: str, tmp_path: Path) -> None:
    path, text = tmp_path / "x", "old"

    def run() -> None:
        if kind == "file":
            with replacing(path) as work:
                work.write_text(text)
        else:
            with new_folder(path, replace=("one", "two")) as folder:
                (folder / "one").write_text(text)
                (folder / "two").write_text(text)

    lines = Lines(run)
    for line, times in lines.times.items():
        for time in range(1, times + 1):
            text = "old"
            run()
            text = "new"
            assert lines.interrupted(line, time)
            found = {file.read_text() for file in ([path] if kind == "file" else path.iterdir())}
            assert len(found) == 1 and [*tmp_path.iterdir()] == [path], f"{name(line)}, time {time}"
            assert kind == "file" or len([*path.iterdir()]) == 2


def test_a_rename_that_is_interrupted_behind_its_end_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(source: Path, target: Path) -> None:
        rename(source, target)
        monkeypatch.undo()
        raise KeyboardInterrupt

    rename = os.replace
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "one").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "x", replace=("one",)) as folder:
        (folder / "one").write_text("new")
        monkeypatch.setattr(os, "replace", stopped)
    assert [*tmp_path.iterdir()] == [tmp_path / "x"] and (tmp_path / "x" / "one").read_text() == "old"


@pytest.mark.parametrize("what", ["patch", "editor", "adapter", "checkpoint", "facts"])
def test_a_full_disk_gets_one_line_and_leaves_what_was_there(what: str, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    patch = WeightPatch.trial(lm, 0, 0.1)
    editor = Editor("m", {}, Base("f", "n"), {}, {"x": torch.zeros(2000)})
    path = tmp_path / "out"
    write: dict[str, Callable[[], object]] = {
        "patch": lambda: patch.save(path),
        "editor": lambda: editor.save(path),
        "adapter": lambda: export(lm, patch, "peft", path),
        "checkpoint": lambda: export(lm, patch, "checkpoint", path),
        "facts": lambda: example(path),
    }
    if what in ("patch", "editor"):
        write[what]()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as if there were no room for more
    try:
        with pytest.raises(CannotWrite, match=f"{path} cannot be written") as error:
            write[what]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert [*tmp_path.iterdir()] == ([path] if before else [])


def test_two_that_write_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as late:
        late.write_text("late")
        with replacing(path) as early:
            early.write_text("early")
        assert path.read_text() == "early"
    assert path.read_text() == "late" and [*tmp_path.iterdir()] == [path]


def test_what_is_made_now_says_when_with_what_and_the_seconds_if_they_were_measured() -> None:
    assert {*made_now()} == {"finished", "versions", "hardware"}
    assert made_now(0.0)["seconds"] == 0.0 and made_now(1.23456)["seconds"] == 1.235
