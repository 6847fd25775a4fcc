"""The folder of a bench survives interruptions and refuses what does not belong together."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lmpatch.benches.core.store import Store
from lmpatch.benches.facts import Row
from lmpatch.errors import BadInput, BadRecord
from lmpatch.provenance import hash_json


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


FILES = ("rows.jsonl", "chunks.jsonl", "runs.jsonl")
WHOLE = [row for i in range(3) for row in rows(i)]


def filled(folder: Path) -> Store[Row]:
    store = Store(folder, Row.read)
    store.open_run(identity(n=1))
    for i in range(3):
        if ("rome", i) not in store.chunks:
            store.add(chunk(i), rows(i))
    return store


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A run that was killed behind its third chunk."""
    filled(tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def finished(full: Path) -> Path:
    """A run with its numbers, and another that has only begun."""
    store = Store(full, Row.read)
    store.put_run(store.runs["rome"] | {"metrics": [{"name": "reliability", "value": 0.5}]})
    store.open_run(identity("memit", n=1))
    return full


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_was_kept_is_there_again(full: Path) -> None:
    again = Store(full, Row.read)
    assert again.rows_of("rome") == [row for i in range(3) for row in rows(i)]
    assert [{"run_id": c["run_id"], "chunk": c["chunk"]} for c in again.chunks_of("rome")] == [
        chunk(i) for i in range(3)
    ]
    assert all(c["rows"] == 2 for c in again.chunks_of("rome"))
    assert again.runs["rome"].items() >= identity(n=1).items()


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
    left = "".join(json.dumps(asdict(row)) + "\n" for row in rows(3)) + '{"run_id": "ro'
    (full / "rows.jsonl").write_bytes(before + left.encode())
    unclean = contents(full)
    assert Store(full, Row.read).rows_of("rome") == WHOLE
    assert contents(full) == unclean  # who reads writes nothing
    filled(full).add(chunk(3), rows(3))
    assert (full / "rows.jsonl").read_bytes().startswith(before)
    assert Store(full, Row.read).rows_of("rome") == [*WHOLE, *rows(3)]


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


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rows.jsonl", lambda lines: [], "holds 0 rows of chunk 0"),
        ("rows.jsonl", lambda lines: lines[:-2], "holds 0 rows of chunk 2"),
        ("chunks.jsonl", lambda lines: [], "no line in chunks.jsonl"),
        ("chunks.jsonl", lambda lines: lines[1:], "no line in chunks.jsonl|lacks some of the 3 chunks"),
        ("chunks.jsonl", lambda lines: lines[:-1], "lacks some of the 3 chunks of the run 'rome'"),
        ("chunks.jsonl", lambda lines: [*lines, lines[0]], "stands there twice"),
        ("chunks.jsonl", lambda lines: [lines[0].replace(b'"rows": 2', b'"rows": 3'), *lines[1:]], "its own hash"),
        ("runs.jsonl", lambda lines: lines[1:], "'rome' has no line in runs.jsonl"),
        ("runs.jsonl", lambda lines: [*lines, lines[0]], "stands there twice"),
        (
            "runs.jsonl",
            lambda lines: [lines[0].replace(b"0.5", b"0.9"), *lines[1:]],
            "line 1 does not match its own hash",
        ),
    ],
)
def test_what_is_missing_doubled_or_changed_is_noticed_and_nothing_is_written(
    finished: Path, name: str, change: Callable[[list[bytes]], list[bytes]], message: str
) -> None:
    lines = (finished / name).read_bytes().splitlines(keepends=True)
    (finished / name).write_bytes(b"".join(change(lines)))
    before = contents(finished)
    for use in (lambda: Store(finished, Row.read), lambda: filled(finished)):
        with pytest.raises(BadRecord, match=message):
            use()
    assert contents(finished) == before


@pytest.mark.parametrize(
    "line", ["5", "{}", '{"run_id": []}', "null", '"x"', "[" * 100_000, "9" * 5000, '{"a": "\\ud800"}']
)
@pytest.mark.parametrize("name", FILES)
def test_a_line_that_is_none_of_ours_is_refused(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / name).write_text(line + "\n")
    with pytest.raises(BadRecord, match=f"{name} line 1") as error:
        Store(tmp_path, Row.read)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


@pytest.mark.parametrize("seal", [True, False])
@pytest.mark.parametrize("change", [{"run_id": 5}, {"chunk": "1"}, {"rows": None}, {"rows_hash": []}])
def test_a_field_of_another_type_is_refused(full: Path, change: dict[str, Any], seal: bool) -> None:
    lines = (full / "chunks.jsonl").read_text().splitlines()
    record = json.loads(lines[0]) | change
    record |= {"sha256": hash_json({key: value for key, value in record.items() if key != "sha256"})} if seal else {}
    (full / "chunks.jsonl").write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n")
    with pytest.raises(BadRecord, match="chunks.jsonl line 1 has no right" if seal else "its own hash"):
        Store(full, Row.read)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", FILES)
def test_a_pipe_a_device_or_a_folder_in_place_of_a_file_is_refused(full: Path, name: str, packed: str) -> None:
    path = full / f"{name}{packed}"
    for put in (os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink(p, p)):
        path.unlink(missing_ok=True)
        put(path)
        with pytest.raises(BadRecord, match=name):
            Store(full, Row.read)
        (shutil.rmtree if path.is_dir() else os.unlink)(path)


def test_a_damaged_packed_file_is_refused(full: Path) -> None:
    whole = gzip.compress((full / "rows.jsonl").read_bytes())
    (full / "rows.jsonl").unlink()
    for raw in (whole[:-9], b"", whole[:20] + b"\xff" * 9 + whole[29:], b"no gzip"):
        (full / "rows.jsonl.gz").write_bytes(raw)
        with pytest.raises(BadRecord):
            Store(full, Row.read)


@pytest.mark.parametrize("out", ["/proc/x", "{}/file/x", "a" * 300, "{}/a\0b"])
def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be"):
        Store(Path(out.format(tmp_path)), Row.read).open_run(identity())


@pytest.mark.slow
def test_a_kill_at_any_byte_that_is_written_goes_on_to_equal_rows(full: Path, tmp_path: Path) -> None:
    """A run writes its record, then of each chunk the rows and the line: every prefix of that is a killed folder."""
    files = {name: (full / name).read_bytes().splitlines(keepends=True) for name in FILES}
    order = [("rows.jsonl", b"".join(files["rows.jsonl"][2 * i : 2 * i + 2])) for i in range(3)]
    written = [part for i in range(3) for part in (order[i], ("chunks.jsonl", files["chunks.jsonl"][i]))]
    for cut in range(1, sum(len(data) for _, data in written), 11):
        folder = tmp_path / f"cut {cut}"
        folder.mkdir()
        (folder / "runs.jsonl").write_bytes((full / "runs.jsonl").read_bytes())
        for name, data in written:
            with (folder / name).open("ab") as file:
                file.write(data[: max(0, cut)])
            cut -= len(data)
        for _ in range(2):
            assert filled(folder).rows_of("rome") == WHOLE


def mutated(data: bytes, source: random.Random) -> bytes:
    """A file with one thing wrong with it."""
    lines, at = data.splitlines(keepends=True), source.randrange(len(data))
    line = source.randrange(len(lines))
    other = [
        b"5\n",
        b"{}\n",
        b"[]\n",
        b"\n",
        b'{"run_id": {}}\n',
        b"[" * 2000 + b"\n",
        b"1" * 5000 + b"\n",
        lines[line][:9],
    ]
    ways: list[Callable[[], bytes]] = [
        lambda: data[:at] + bytes([data[at] ^ 1 << source.randrange(8)]) + data[at + 1 :],
        lambda: data[:at] + source.randbytes(source.randrange(1, 9)) + data[at:],
        lambda: data[:at] + data[at + source.randrange(1, 200) :],
        lambda: data[:at],
        lambda: data + data[at:],
        lambda: data[:at] + b"9" * 5000 + data[at:],
        lambda: data[:at] + b"null" + data[at + 1 :],
        lambda: b"".join(lines[:line] + lines[line + 1 :]),
        lambda: b"".join([*lines[:line], lines[line], *lines[line:]]),
        lambda: b"".join([*lines[:line], source.choice(other), *lines[line + 1 :]]),
        lambda: b"".join(source.sample(lines, len(lines))),
        lambda: b"",
    ]
    return source.choice(ways)()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["killed", "finished"])
def test_a_mutated_folder_is_refused_or_gives_the_rows_that_were_kept(
    kind: str, full: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A finished folder is only read: nothing may be missing. A killed one goes on to equal rows."""
    if kind == "finished":
        request.getfixturevalue("finished")
    files, refused = contents(full), 0
    for seed in range(400):
        source, folder = random.Random(seed), tmp_path / f"{seed}"
        shutil.copytree(full, folder)
        for name in source.sample(FILES, source.choice([1, 1, 1, 2])):
            (folder / name).write_bytes(mutated(files[name], source))
        before = contents(folder)
        try:
            store = Store(folder, Row.read) if kind == "finished" else filled(folder)
        except BadInput as error:
            refused += 1
            assert contents(folder) == before and "\n" not in str(error), seed
        else:
            assert store.rows_of("rome") == WHOLE, seed
            if kind == "killed":
                assert Store(folder, Row.read).rows_of("rome") == WHOLE, seed
    assert 200 < refused < 400


def test_a_packed_folder_is_read_and_gone_on_with(full: Path) -> None:
    wanted = Store(full, Row.read).rows_of("rome")
    for name in ("rows", "chunks", "runs"):
        path = full / f"{name}.jsonl"
        path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    store = Store(full, Row.read)
    assert store.rows_of("rome") == wanted == WHOLE and set(store.runs) == {"rome"}
    store.add(chunk(3), rows(3))
    assert Store(full, Row.read).rows_of("rome") == [*wanted, *rows(3)]
    (full / "rows.jsonl").write_bytes(
        (full / "rows.jsonl").read_bytes() + b'{"run_id": "rome", "chunk": 4, "kind": "x", "prompt": "y"}\n'
    )
    assert Store(full, Row.read).rows_of("rome") == [*wanted, *rows(3)]
    Store(full, Row.read).add(chunk(4), rows(4))  # the half chunk is cleared
    for name in ("rows", "chunks"):  # a kill between writing a whole file and removing the packed one
        path = full / f"{name}.jsonl"
        path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert Store(full, Row.read).rows_of("rome") == [*wanted, *rows(3), *rows(4)]


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


def test_what_differs_is_named_as_a_user_sets_it(full: Path) -> None:
    store = Store(full, Row.read)
    known = store.runs["rome"]
    digests = {"data_hash": "a" * 64, "base_weights_hash": "b" * 64, "patches": [{"hash": "c" * 64}]}
    store.put_run(known | {"settings": {"n": 1, "method": {"lr": 1}, **digests}})
    for change, told in (
        ({"data_hash": "d" * 64, "n": 5}, "n 1, asked now 5; other records"),
        ({"base_weights_hash": "e" * 64}, "another model"),
        ({"patches": []}, "other patches"),
        ({"method": {"lr": 2}}, "lr 1, asked now 2"),
    ):
        asked = identity(group="other") | {"settings": store.runs["rome"]["settings"] | change, "commit_size": 7}
        with pytest.raises(BadInput, match=rf"made with {told}\. Numbers") as error:
            store.open_run(asked)
        assert len(str(error.value)) < 200 + len(str(full))
