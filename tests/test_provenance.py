"""What is recorded of a patch, and how files take each other's place."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmpatch.files import replacing
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
