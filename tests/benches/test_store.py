"""The folder of a bench survives interruptions and refuses what does not belong together."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from lmpatch.benches.core.store import Store
from lmpatch.benches.facts import Row
from lmpatch.errors import BadInput, BadRecord


def identity(run_id: str = "rome", group: str = "g", **settings: Any) -> dict[str, Any]:
    return {"run_id": run_id, "comparable_group": group, "settings": settings}


def chunk(index: int, run_id: str = "rome") -> dict[str, Any]:
    return {"run_id": run_id, "chunk": index}


def rows(index: int, count: int = 2, run_id: str = "rome") -> list[Row]:
    return [
        Row(run_id=run_id, chunk=index, when="final", case_id=f"{index}-{i}", kind="edit", prompt="Où est la tour ?",
            aliases=("Rome",))
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def full(tmp_path: Path) -> Path:
    store = Store(tmp_path / "out", Row.read)
    store.open_run(identity(n=1))
    for i in range(3):
        store.add(chunk(i), rows(i))
    return tmp_path / "out"


def test_what_was_kept_is_there_again(full: Path) -> None:
    again = Store(full, Row.read)
    assert again.rows_of("rome") == [row for i in range(3) for row in rows(i)]
    assert [{"run_id": c["run_id"], "chunk": c["chunk"]} for c in again.chunks_of("rome")] == [
        chunk(i) for i in range(3)
    ]
    assert all(c["rows"] == 2 for c in again.chunks_of("rome"))
    assert again.runs == {"rome": identity(n=1)}


def test_without_a_folder_everything_stays_in_memory(tmp_path: Path) -> None:
    store = Store(None, Row.read)
    store.open_run(identity())
    store.add(chunk(0), rows(0))
    assert store.rows_of("rome") == rows(0) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [1, 7, 60])
@pytest.mark.parametrize("name", ["rows", "chunks"])
def test_half_a_last_line_is_cut_and_its_chunk_is_redone(full: Path, name: str, cut: int) -> None:
    path = full / f"{name}.jsonl"
    last = path.read_bytes().splitlines(keepends=True)[-1]
    path.write_bytes(path.read_bytes()[: -min(cut, len(last))])
    if name == "rows":  # rows come before their chunk, so the chunk's line cannot be there yet
        lines = (full / "chunks.jsonl").read_bytes().splitlines(keepends=True)
        (full / "chunks.jsonl").write_bytes(b"".join(lines[:-1]))
    again = Store(full, Row.read)
    assert [c["chunk"] for c in again.chunks_of("rome")] == [0, 1]
    again.add(chunk(2), rows(2))
    assert Store(full, Row.read).rows_of("rome") == [row for i in range(3) for row in rows(i)]


def test_rows_of_a_chunk_that_never_finished_do_not_count(full: Path) -> None:
    before = (full / "rows.jsonl").read_bytes()
    store = Store(full, Row.read)
    store._append("rows", [row.__dict__ for row in rows(3)])
    assert Store(full, Row.read).rows_of("rome") == store.rows_of("rome")
    assert (full / "rows.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["missing", "doubled", "changed"])
def test_rows_that_are_missing_doubled_or_changed_are_noticed_on_resume(full: Path, damage: str) -> None:
    path = full / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    other = {
        "missing": lines[1:],
        "doubled": [lines[0], *lines],
        "changed": [lines[0].replace(b"Rome", b"Oslo"), *lines[1:]],
    }
    path.write_bytes(b"".join(other[damage]))
    with pytest.raises(BadRecord, match="of chunk 0 of the run 'rome', and they are not the 2 that were written"):
        Store(full, Row.read)


def test_a_packed_folder_is_read_and_gone_on_with(full: Path) -> None:
    wanted = Store(full, Row.read).rows_of("rome")
    for name in ("rows", "chunks", "runs"):
        path = full / f"{name}.jsonl"
        path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    store = Store(full, Row.read)
    assert store.rows_of("rome") == wanted and store.runs == {"rome": identity(n=1)}
    store.add(chunk(3), rows(3))
    assert Store(full, Row.read).rows_of("rome") == [*wanted, *rows(3)]
    (full / "rows.jsonl").write_bytes(
        (full / "rows.jsonl").read_bytes() + b'{"run_id": "rome", "chunk": 4, "kind": "x", "prompt": "y"}\n'
    )
    assert Store(full, Row.read).rows_of("rome") == [*wanted, *rows(3)]
    assert Store(full, Row.read).rows_of("rome") == [*wanted, *rows(3)]  # also once the half chunk was cleared


def test_a_damaged_line_inside_a_file_is_named(full: Path) -> None:
    path = full / "chunks.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"chunk": 1', b'"chunk"; 1'))
    with pytest.raises(BadRecord, match=r"chunks.jsonl line 2"):
        Store(full, Row.read)


def test_rows_of_another_version_are_refused(full: Path) -> None:
    path = full / "rows.jsonl"
    path.write_text(path.read_text().replace('"em"', '"exact"'))
    with pytest.raises(BadRecord, match="another version"):
        Store(full, Row.read)


def test_another_run_of_the_same_group_may_join(full: Path) -> None:
    store = Store(full, Row.read)
    store.open_run(identity("memit", n=1))
    store.add(chunk(0, "memit"), rows(0, run_id="memit"))
    assert len(Store(full, Row.read).rows_of("memit")) == 2 and len(Store(full, Row.read).rows_of("rome")) == 6


def test_the_same_run_with_other_settings_is_refused_by_name(full: Path) -> None:
    store = Store(full, Row.read)
    store.put_run(store.runs["rome"] | {"metrics": ["what was found since"]})
    with pytest.raises(BadInput, match=r"'rome' with other settings: n 1, asked now 2.*another run_id") as error:
        Store(full, Row.read).open_run(identity(n=2))
    assert "metrics" not in str(error.value)
    Store(full, Row.read).open_run(identity(n=1))


def test_a_run_of_another_group_is_refused(full: Path) -> None:
    with pytest.raises(BadInput, match="cannot share a table"):
        Store(full, Row.read).open_run(identity("memit", group="other", n=1))
    assert set(Store(full, Row.read).runs) == {"rome"}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        Store(tmp_path / "out", Row.read)
