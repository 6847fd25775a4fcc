"""A memory is what a plain dictionary would be, and keeps its whole past."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from lmpatch.data.edits import Ask, Edit, read_edits
from lmpatch.errors import BadInput, LmpatchError, MissingExtra, WrongModel
from lmpatch.memory import _log, _search
from lmpatch.memory.entry import columns, edit_of
from lmpatch.memory.store import Store

pytest.importorskip("lancedb")

WIDTH = 16
STAMP = {"editor": "e" * 64, "base": "b" * 64, "editor_name": "recipe", "base_name": "gemma"}


def keys(n: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float16)


def facts(n: int, start: int = 0) -> list[Edit]:
    return [Edit(f"Fact {i} is", f"target {i}", subject=f"Fact {i}") for i in range(start, start + n)]


def told(store: Store, **which: Any) -> list[tuple[str, str]]:
    return [(entry.edit.prompt, entry.edit.target) for entry in store.facts(**which)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty memory. It does not wait for the disk; a test of its own checks that others do."""
    monkeypatch.setattr(_log, "flush", lambda *_: None)
    monkeypatch.setattr(_search, "flush", lambda *_: None)
    return Store.create(tmp_path / "memory", width=WIDTH, stamp=STAMP)


# What is stored


def test_what_was_added_is_there_for_another_process(store: Store) -> None:
    edit = Edit(
        "Der Eiffelturm steht in", "Röm", subject="Eiffelturm", old="Paris", aliases=["Rom"], rephrases=["Wo?"],
        locality={"near": [Ask("The Louvre is in", ("Paris",))]},
        portability={"hop": [Ask("Its country is", ("Italy",))]}, id="7", relation="P19",
    )  # fmt: skip
    assert store.add([edit, *facts(2)], keys(3), source={"file": "facts.jsonl"}) == 1
    again = Store.open(store.path, stamp=STAMP)
    entry = again.facts()[0]
    assert entry.edit == edit and entry.source == {"file": "facts.jsonl"} and entry.state == "live"
    with pytest.raises(LmpatchError, match="cannot add"):
        store.add(facts(1), keys(1), source={"file": "\ud83d"})
    assert again.width == WIDTH and again.stamp == STAMP and len(again) == 3 and again.version == 1
    assert np.array_equal(again.vectors(again.facts()[::-1]), keys(3)[::-1])


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip())
)
asks = st.builds(Ask, texts.map(str.rstrip), st.lists(texts, max_size=2, unique=True).map(tuple))
groups = st.lists(asks, min_size=1, max_size=2, unique_by=lambda ask: ask.prompt)
edits = st.builds(
    Edit, texts, texts, subject=texts, old=st.lists(texts, max_size=2, unique=True),
    locality=st.dictionaries(st.sampled_from(["near", "far"]), groups), id=texts, relation=texts,
)  # fmt: skip


@pytest.mark.slow
@given(edits)
def test_any_edit_survives_its_row(edit: Edit) -> None:
    assert edit_of(columns(edit)) == edit


@pytest.mark.slow
def test_the_newer_of_two_facts_holds_and_the_history_shows_both(store: Store) -> None:
    store.add([Edit("The Eiffel Tower is in", "Paris"), *facts(1)], keys(2))
    assert store.search(keys(1))[1][0][0].edit.target == "Paris"
    store.add([Edit("the  EIFFEL tower is in", "Rome")], keys(1, 1), source={"by": "me"})
    assert told(store) == [("Fact 0 is", "target 0"), ("the  EIFFEL tower is in", "Rome")]
    assert [(e.edit.target, e.state, e.version) for e in store.find("eiffel", history=True)] == [
        ("Paris", "superseded in 2", 1), ("Rome", "live", 2),
    ]  # fmt: skip
    assert store.search(keys(1, 1))[1][0][0].edit.target == "Rome"
    assert "Paris" not in {entry.edit.target for entry in store.search(keys(1), k=9)[1][0]}


def test_contradictions_in_one_commit_resolve_to_the_last(store: Store) -> None:
    store.add([Edit("X is", "a"), Edit("X is", "b"), Edit("X is", "b")], keys(3))
    assert told(store) == [("X is", "b")]
    assert [entry.state for entry in store.facts(history=True)] == ["superseded in 1", "superseded in 1", "live"]
    assert store.search(keys(1), k=3)[0].shape == (1, 1)


def test_a_dropped_fact_is_gone_from_lists_and_searches_but_not_from_the_past(store: Store) -> None:
    store.add(facts(3), keys(3))
    assert store.search(keys(3))[1][1][0].edit.target == "target 1"
    store.drop(["fact 1  IS", "Fact 1 is"])
    assert told(store) == [("Fact 0 is", "target 0"), ("Fact 2 is", "target 2")]
    assert [entry.state for entry in store.facts(history=True)] == ["live", "dropped in 2", "live"]
    assert len(store.search(keys(3), k=3)[1][1]) == 2
    with pytest.raises(BadInput, match="'Fact 1 is'.*find"):
        store.drop(["Fact 0 is", "Fact 1 is"])
    assert len(store) == 2 and store.version == 2
    store.add(facts(1, 1), keys(1))
    assert len(store) == 3


@pytest.mark.slow
def test_get_knows_the_fact_that_holds_by_its_prompt(store: Store) -> None:
    store.add([*facts(3), Edit("Fact 1 is", "newer")], keys(4))
    store.drop(["Fact 2 is"])
    entry = Store.open(store.path).get(" fact  1 IS")
    assert entry in store.facts() and entry is not None and entry.edit.target == "newer"
    assert store.get("Fact 2 is") is None and store.get("Fact") is None
    Store.open(store.path).add([Edit("Fact 2 is", "back")], keys(1))
    back = store.get("Fact 2 is")
    assert back is not None and back.edit.target == "back"  # another handle wrote it


def test_find_looks_at_prompt_subject_and_target_in_any_case(store: Store) -> None:
    store.add([Edit("A is", "Berlin"), Edit("B of x is", "y", subject="B of x"), Edit("C", "d")], keys(3))
    for text, found in [("BERLIN", ["A is"]), ("b OF", ["B of x is"]), ("is", ["A is", "B of x is"]), ("z", [])]:
        assert [entry.edit.prompt for entry in store.find(text)] == found


def test_export_is_what_the_reader_reads(store: Store, tmp_path: Path) -> None:
    store.add(facts(3), keys(3))
    store.drop(["Fact 1 is"])
    assert store.export(tmp_path / "out.jsonl") == 2
    assert [edit.prompt for edit in read_edits(tmp_path / "out.jsonl")] == ["Fact 0 is", "Fact 2 is"]
    with pytest.raises(BadInput, match="exists"):
        store.export(tmp_path / "out.jsonl")
    with pytest.raises(BadInput, match="cannot write"):
        store.export(tmp_path / "nowhere" / "out.jsonl")


# Versions


@pytest.mark.slow
def test_every_version_can_be_read_and_gone_back_to(store: Store) -> None:
    store.add(facts(4), keys(4))
    store.add([Edit("Fact 2 is", "new"), *facts(1, 4)], keys(2, 1))
    store.drop(["Fact 0 is"])
    assert [(v.number, v.put, v.dropped, v.live) for v in store.versions()] == [
        (1, 4, 0, 4),
        (2, 2, 0, 5),
        (3, 0, 1, 4),
    ]
    before = told(store, version=1)
    assert store.rollback(1) == 4
    assert sorted(told(store)) == before == told(store, version=1)
    assert np.array_equal(store.search(keys(4))[0][:, 0], (keys(4).astype(np.float64) ** 2).sum(1).astype(np.float32))
    assert [entry.state for entry in store.find("fact 2", history=True)] == [
        "superseded in 2",
        "superseded in 4",
        "live",
    ]
    assert store.rollback(1) == 4, "nothing is different, so nothing is committed"
    assert store.rollback(3) == 5 and sorted(told(store)) == sorted(told(store, version=3))
    assert store.rollback(0) == 6 and told(store) == [] and len(store.versions()) == 6
    for version in (7, -1):
        with pytest.raises(BadInput, match=f"no version {version}.* to 6"):
            store.rollback(version)


@pytest.mark.slow
def test_compaction_moves_files_and_nothing_else(store: Store) -> None:
    for i in range(30):
        store.add(facts(1, i % 10), keys(1, i))
    store.drop(["Fact 3 is"])
    (store.path / "facts.lance" / "data" / "left-by-a-kill.lance").write_bytes(b"half a file")
    seen = [store.facts(history=True), store.versions(), *store.search(keys(5), 4)]
    reader = Store.open(store.path)
    reader.search(keys(1))
    files = {*(store.path / "facts.lance" / "data").iterdir()}
    store.compact()
    for memory in (store, reader, Store.open(store.path)):
        after = [memory.facts(history=True), memory.versions(), *memory.search(keys(5), 4)]
        assert np.array_equal(after.pop(2), seen[2])
        assert after == [part for i, part in enumerate(seen) if i != 2]
    assert len(files) == 32 and len({*(store.path / "facts.lance" / "data").iterdir()}) == 1
    store.rollback(12)
    assert sorted(told(store)) == sorted(told(store, version=12))


@pytest.mark.slow
def test_many_small_commits_are_compacted_on_the_way(store: Store) -> None:
    for i in range(_log.FEW + 2 * _log.EVERY):
        store.add(facts(1, i), keys(1))
    assert len([*(store.path / "facts.lance" / "data").iterdir()]) <= _log.FEW + _log.EVERY
    assert len([*(store.path / "facts.lance" / "_versions").iterdir()]) <= _log.FEW + 2 * _log.EVERY
    assert len(Store.open(store.path)) == _log.FEW + 2 * _log.EVERY


# Several processes


@pytest.mark.slow
def test_another_process_sees_each_commit_and_reads_only_what_is_new(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Store.open(store.path)
    read, since = _log.Log.read, []
    monkeypatch.setattr(_log.Log, "read", lambda log, first: (since.append(first), read(log, first))[1])
    store.add(facts(3), keys(3))
    assert len(other) == 3 and other.search(keys(3)[1:2])[1][0][0].edit == facts(3)[1]
    other.add([Edit("Fact 1 is", "other")], keys(1, 5))
    assert store.search(keys(1, 5))[1][0][0].edit.target == "other" and store.version == 2
    store.rollback(1)
    store.compact()
    assert told(other)[-1] == ("Fact 1 is", "target 1")
    assert since == [0, 3, 4], "the other's first look, this one's after 2, the other's after the rollback"


@pytest.mark.slow
def test_writers_on_two_handles_never_number_a_row_twice(store: Store) -> None:
    handles = [store, Store.open(store.path), Store.open(store.path)]
    for i in range(12):
        handles[i % 3].add(facts(2, i), keys(2))
    for handle in handles:
        assert [entry.version for entry in handle.facts(history=True)] == [1 + i // 2 for i in range(24)]
        assert handle.facts() == store.facts()


# Search


def best(store: Store, vectors: dict[str, np.ndarray], query: np.ndarray, k: int) -> list[str]:
    """By a sort; vectors by prompt, oldest first."""
    scores = {prompt: float(query.astype(np.float64) @ key.astype(np.float64)) for prompt, key in vectors.items()}
    return sorted(scores, key=lambda prompt: -scores[prompt])[:k]


@pytest.mark.slow
@pytest.mark.parametrize("exact", [10_000, 200])
def test_search_finds_the_best_below_and_above_the_index(store: Store, tmp_path: Path, exact: int) -> None:
    memory = Store.create(tmp_path / "wide", width=192, matched=128, stamp=STAMP, exact=exact)
    vectors = keys(600, width=128)
    whole = np.concatenate([vectors, 5 * keys(600, seed=1, width=64)], 1)  # the rest of a key is louder, and no matter
    memory.add(facts(400), whole[:400])
    assert _search.newest(memory.path) == (400 if exact < 400 else 0)
    memory.add(facts(100, 400), whole[400:500])  # not indexed
    memory.add(facts(50), whole[500:550])  # supersedes what may be indexed
    memory.drop([f"Fact {i} is" for i in range(50, 60)])
    held = {f"Fact {i} is": vectors[i] for i in range(60, 500)} | {f"Fact {i} is": vectors[500 + i] for i in range(50)}
    queries = np.stack([*held.values()])[::7].astype(np.float32) * 3  # each near its own key
    for reader in (memory, Store.open(memory.path, exact=exact)):
        scores, hits = reader.search(queries, 3)
        assert scores.dtype == np.float32 and scores.shape == (len(queries), 3)
        for query, line, found in zip(queries, scores, hits, strict=True):
            prompts = [entry.edit.prompt for entry in found]
            assert prompts[0] == best(reader, held, query, 1)[0]
            assert set(prompts) <= set(held)
            want = [float(query.astype(np.float64) @ held[prompt].astype(np.float64)) for prompt in prompts]
            assert line.tolist() == np.float32(want).tolist() == sorted(line.tolist(), reverse=True)


@pytest.mark.slow
def test_a_crowd_of_superseded_keys_does_not_hide_the_live_ones(store: Store) -> None:
    memory, query = Store.open(store.path, exact=250), keys(1, 9)
    memory.add(facts(260), np.concatenate([np.repeat(query, 200, 0), 0 * keys(60)]))  # indexed; the first are best
    memory.add(facts(199), -np.repeat(query, 199, 0))
    scores, hits = memory.search(query, 2)
    assert _search.newest(store.path) == 260
    assert [entry.edit.prompt for entry in hits[0]] == ["Fact 199 is", "Fact 200 is"] and scores[0, 1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("old_one", ["gone", "still there"])
def test_a_reader_goes_over_to_a_new_index_and_survives_the_moment_it_is_replaced(
    store: Store, monkeypatch: pytest.MonkeyPatch, old_one: str
) -> None:
    memory, reader = Store.open(store.path, exact=100), Store.open(store.path, exact=100)
    newest, opened = _search.newest, list[int]()
    monkeypatch.setattr(_search.Near, "__init__", spied(_search.Near.__init__, opened))
    if old_one == "still there":
        monkeypatch.setattr(_search, "_remove", lambda _: None)
    memory.add(facts(150), keys(150))
    query = keys(150)[7:8]
    assert reader.search(query)[1][0][0].edit.prompt == "Fact 7 is"
    memory.add(facts(120, 150), keys(120, 3))
    if old_one == "gone":
        assert [path.name for path in store.path.glob("near-*")] == ["near-270.lance"]
        stale = iter([150, 150])  # what the reader may have looked up just before
        monkeypatch.setattr(_search, "newest", lambda path: next(stale, None) or newest(path))
    assert reader.search(query)[1][0][0].edit.prompt == "Fact 7 is"
    assert reader.search(keys(120, 3)[5:6])[1][0][0].edit.prompt == "Fact 155 is"
    assert opened == ([150, 150, 270] if old_one == "gone" else [150, 270])
    reader.drop([f"Fact {i} is" for i in range(200)])  # below what needs an index
    assert reader.search(keys(120, 3)[119:])[1][0][0].edit.prompt == "Fact 269 is"


@pytest.mark.slow
def test_a_kill_while_an_index_is_deleted_leaves_none_that_is_half_there(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Store.open(store.path, exact=100)
    memory.add(facts(150), keys(150))

    def killed(folder: Path, **_: Any) -> None:
        for file in folder.rglob("*.idx"):
            file.unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_search.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            memory.compact()  # which indexes the same rows again
    reader = Store.open(store.path, exact=100)
    assert reader.search(keys(150)[7:8])[1][0][0].edit.prompt == "Fact 7 is"
    reader.compact()
    assert sorted(path.name for path in store.path.glob("*.lance")) == ["facts.lance", "near-150.lance"]
    assert reader.search(keys(150)[7:8])[1][0][0].edit.prompt == "Fact 7 is"


def spied(make: Any, calls: list[int]) -> Any:
    """The same constructor; notes its last argument."""

    def init(self: Any, path: Path, covered: int) -> None:
        calls.append(covered)
        make(self, path, covered)

    return init


@pytest.mark.slow
def test_an_index_that_cannot_be_built_costs_speed_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise LmpatchError("the disk is full")

    memory = Store.open(store.path, exact=100)
    with monkeypatch.context() as patch:
        patch.setattr(_search, "build", full)
        memory.add(facts(150), keys(150))
        with pytest.raises(LmpatchError, match="full"):
            memory.compact()
    assert memory.search(keys(150)[7:8])[1][0][0].edit.prompt == "Fact 7 is"
    memory.compact()
    assert _search.newest(store.path) == 150


def test_an_empty_memory_finds_nothing(store: Store) -> None:
    scores, hits = store.search(keys(2), 3)
    assert scores.shape == (2, 0) and hits == [[], []] and store.facts() == [] and store.versions() == []
    assert store.add([], keys(0)) == 0 and store.version == 0


# What is refused


@pytest.mark.parametrize("name", ["editor", "base"])
def test_a_memory_of_another_editor_or_model_is_refused_by_name_and_fingerprint(store: Store, name: str) -> None:
    with pytest.raises(WrongModel) as error:
        Store.open(store.path, stamp=STAMP | {name: "f" * 64, f"{name}_name": "another"})
    for part in ("recipe (eeeeeeeeeeee)", "gemma (bbbbbbbbbbbb)", "another (ffffffffffff)", "export"):
        assert part in str(error.value)
    Store.open(store.path, stamp=STAMP | {f"{name}_name": "renamed"})


def test_keys_that_do_not_fit_are_refused_and_change_nothing(store: Store) -> None:
    for vectors, says in [
        (keys(1), r"2 facts need keys \[2, 16\], found \[1, 16\]"),
        (keys(2, width=8), r"found \[2, 8\]"),
        (np.full((2, WIDTH), np.nan), "finite"),
        (np.full((2, WIDTH), 1e6), "finite float16"),
    ]:
        with pytest.raises(BadInput, match=says):
            store.add(facts(2), vectors)
    for queries in (keys(1, width=8), np.full((1, WIDTH), np.inf)):
        with pytest.raises(BadInput, match="queries"):
            store.search(queries)
    assert store.version == 0


def test_only_a_memory_is_opened_and_nothing_is_written_over(store: Store, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(BadInput, match="no memory at"):
            Store.open(path)
    store.add(facts(1), keys(1))
    with pytest.raises(BadInput, match="a memory at .* already"):
        Store.create(store.path, width=WIDTH, stamp=STAMP)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path):
        with pytest.raises(BadInput, match="exists and is no memory"):
            Store.create(path, width=WIDTH, stamp=STAMP)
    for width, stamp in [(0, STAMP), (12, STAMP), (8, {"editor": "x"}), (8, {"editor": "x", "base": ""})]:
        with pytest.raises(BadInput, match="multiple of 8|needs 'editor' and 'base'"):
            Store.create(tmp_path / "new", width=width, stamp=stamp)
    assert len(Store.open(store.path)) == 1 and {path.name for path in tmp_path.iterdir()} == {"memory", "file"}


def test_a_damaged_memory_is_not_opened_as_if_it_were_whole(store: Store) -> None:
    store.add(facts(3), keys(3))
    for file in (store.path / "facts.lance" / "data").iterdir():
        file.unlink()
    with pytest.raises(LmpatchError, match="cannot read the memory"):
        Store.open(store.path)
    for file in (store.path / "facts.lance" / "_versions").glob("*.manifest"):
        file.write_bytes(b"")
    with pytest.raises(LmpatchError, match="memory at"):
        Store.open(store.path)
    with pytest.raises(BadInput, match="already"):
        Store.create(store.path, width=WIDTH, stamp=STAMP)


def test_a_memory_of_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log, "FORMAT", 2)
    Store.create(tmp_path / "m", width=WIDTH, stamp=STAMP)
    monkeypatch.undo()
    with pytest.raises(BadInput, match="format 2.*reads 1.*Update"):
        Store.open(tmp_path / "m")


BAD_METADATA: dict[str, bytes] = {
    "nothing": b"",
    "no width": b'{"format": 1}',
    "no JSON": b"{",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "another width": b'{"format": 1, "width": 8, "matched": 8, "stamp": {}}',
    "a text": b'{"format": 1, "width": "16", "matched": 16, "stamp": {}}',
    "too many": b'{"format": 1, "width": 16, "matched": 160, "stamp": {}}',
    "no numbers": b'{"format": 1, "width": 16, "matched": null, "stamp": {}}',
    "no texts": b'{"format": 1, "width": 16, "matched": 16, "stamp": {"editor": 5}}',
    "no stamp": b'{"format": 1, "width": 16, "matched": 16, "stamp": []}',
}


@pytest.mark.parametrize("name", BAD_METADATA)
def test_damaged_metadata_is_refused_in_one_line(store: Store, name: str) -> None:
    import lancedb

    store.add(facts(2), keys(2))
    table = lancedb.connect(str(store.path)).open_table("facts").to_arrow()
    table = table.replace_schema_metadata({b"lmpatch": BAD_METADATA[name]})
    lancedb.connect(str(store.path)).create_table("facts", data=table, mode="overwrite")
    with pytest.raises(BadInput, match="metadata of the memory at .* is damaged. Take a fresh copy") as caught:
        Store.open(store.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "text"),
    [("more", "{"), ("more", "[]"), ("more", '{"old": 5.5, "rephrases": {}}'), ("source", "x"), ("prompt", "")],
)
def test_a_damaged_row_is_refused_in_one_line(store: Store, column: str, text: str) -> None:
    import lancedb
    import pyarrow as pa

    store.add(facts(2), keys(2))
    rows = lancedb.connect(str(store.path)).open_table("facts").to_arrow()
    at = rows.schema.get_field_index(column)
    rows = rows.set_column(at, rows.schema.field(at), pa.array([text, rows[column][1].as_py()]))
    lancedb.connect(str(store.path)).create_table("facts", data=rows, mode="overwrite")
    for call in (lambda: Store.open(store.path).facts(), lambda: Store.open(store.path).search(keys(2), 2)):
        with pytest.raises(LmpatchError) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["/proc/x", "/etc/passwd/x", "a\0b", "a" * 300])
def test_a_memory_where_none_can_be_is_refused_in_one_line(tmp_path: Path, where: str) -> None:
    for call in (lambda path: Store.create(path, width=WIDTH, stamp=STAMP), Store.open):
        with pytest.raises(LmpatchError, match="memory") as caught:
            call(tmp_path / where)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_composed_and_decomposed_prompts_are_one_even_in_an_older_log(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add([Edit("Caf\u00e9 is", "a")], keys(1))
    store.add([Edit("Cafe\u0301 is", "b")], keys(1))
    assert told(store) == [("Cafe\u0301 is", "b")] and len(store) == 1
    with monkeypatch.context() as old:  # as lmpatch 0.1 wrote them
        old.setattr("lmpatch.memory.entry.prompt_key", lambda prompt: " ".join(prompt.split()).casefold())
        store.add([Edit("Zo\u00eb is", "a"), Edit("Zoe\u0308 is", "b")], keys(2))
    for memory in (Store.open(store.path), store):
        assert [target for prompt, target in told(memory) if prompt.startswith("Zo")][-1] == "b"
    again = Store.open(store.path)
    assert len(again) == 2 and again.get("ZO\u00cb  is") == again.facts()[1]
    again.drop(["zoe\u0308 is"])
    assert told(Store.open(store.path)) == [("Cafe\u0301 is", "b")]


def test_without_lancedb_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    for make in (lambda: Store.open(tmp_path), lambda: Store.create(tmp_path / "m", width=8, stamp=STAMP)):
        with pytest.raises(MissingExtra, match=r"lmpatch\[memory\]"):
            make()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_reading_and_adding_need_no_torch(store: Store) -> None:
    code = (
        "import sys, numpy\n"
        "from lmpatch.data.edits import Edit\n"
        "from lmpatch.memory.store import Store\n"
        "store = Store.open(sys.argv[1])\n"
        "store.add([Edit('a', 'b')], numpy.ones((1, 16)))\n"
        "assert store.facts() and store.versions()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, store.path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_when_add_returns_every_file_it_wrote_has_been_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: set[Path] = set()
    fsync = os.fsync

    def spy(handle: int) -> None:
        flushed.add(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file a handle is")
    monkeypatch.setattr(os, "fsync", spy)
    store = Store.create(tmp_path / "m", width=WIDTH, stamp=STAMP)
    for act in (lambda: store.add(facts(3), keys(3)), lambda: store.drop(["Fact 1 is"]), store.compact):
        act()
        table = store.path / "facts.lance"
        assert {table, *table.rglob("*")} <= flushed


# Against a dictionary

PROMPTS = [f"Prompt {i} is" for i in range(6)]


class Machine(RuleBasedStateMachine):
    """Any order of adding, dropping, going back, compacting and opening again, against plain dictionaries."""

    folder: Path
    count = 0

    @initialize(exact=st.sampled_from([3, 1000]))
    def start(self, exact: int) -> None:
        Machine.count += 1
        path, self.exact = self.folder / str(Machine.count), exact
        self.store = Store.create(path, width=WIDTH, stamp=STAMP, exact=exact)
        self.past: list[dict[str, tuple[str, int]]] = [{}]  # after each version: prompt -> (target, seed of its key)

    @rule(
        batch=st.lists(
            st.tuples(st.sampled_from(PROMPTS), st.sampled_from("abc"), st.integers(0, 9)), min_size=1, max_size=5
        )
    )
    def add(self, batch: Sequence[tuple[str, str, int]]) -> None:
        vectors = np.concatenate([keys(1, seed) for _, _, seed in batch])
        self.store.add([Edit(prompt, target) for prompt, target, _ in batch], vectors)
        self.past.append(self.past[-1] | {prompt: (target, seed) for prompt, target, seed in batch})

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        if self.past[-1]:
            gone = data.draw(st.lists(st.sampled_from(sorted(self.past[-1])), min_size=1, max_size=3))
            self.store.drop(gone)
            self.past.append({prompt: fact for prompt, fact in self.past[-1].items() if prompt not in gone})

    @rule(data=st.data())
    def back(self, data: st.DataObject) -> None:
        version = data.draw(st.integers(0, len(self.past) - 1))
        if self.store.rollback(version) == len(self.past):
            self.past.append(self.past[version])

    @rule()
    def compact(self) -> None:
        self.store.compact()

    @rule()
    def reopen(self) -> None:
        self.store = Store.open(self.store.path, stamp=STAMP, exact=self.exact)

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "store"):
            return
        now = self.past[-1]
        assert dict(told(self.store)) == {prompt: target for prompt, (target, _) in now.items()}
        assert len(self.store) == len(now) and self.store.version == len(self.past) - 1
        assert [version.live for version in self.store.versions()] == [len(then) for then in self.past[1:]]
        scores, hits = self.store.search(keys(1, 3), len(PROMPTS))
        query = keys(1, 3)[0].astype(np.float64)
        want = {prompt: float(query @ keys(1, seed)[0].astype(np.float64)) for prompt, (_, seed) in now.items()}
        assert {entry.edit.prompt for entry in hits[0]} == set(now)
        assert [np.float32(want[entry.edit.prompt]) for entry in hits[0]] == scores[0].tolist()
        assert scores[0].tolist() == sorted(scores[0].tolist(), reverse=True)

    def teardown(self) -> None:
        for version, then in enumerate(self.past):
            assert dict(told(self.store, version=version)) == {prompt: target for prompt, (target, _) in then.items()}


@pytest.fixture
def machine(tmp_path: Path, store: Store) -> Iterator[type[Machine]]:
    Machine.folder = tmp_path
    yield Machine


@pytest.mark.slow
def test_any_sequence_of_calls_leaves_what_a_dictionary_would_hold(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=15, deadline=None))


# Threads


@pytest.mark.slow
@pytest.mark.parametrize("exact", [1000, 20], ids=["exact", "with an index"])
def test_threads_may_ask_a_store_while_another_adds_to_it(store: Store, exact: int) -> None:
    store = Store.open(store.path, stamp=STAMP, exact=exact)
    vectors, done = keys(64), Event()

    def add() -> None:
        try:
            for i in range(0, 64, 4):
                store.add(facts(4, i), vectors[i : i + 4])
        finally:
            done.set()

    def ask(i: int) -> None:
        while not done.is_set():
            _, hits = store.search(vectors[i : i + 3].astype(np.float32), 2)
            assert all(store.get(entry.edit.prompt) for line in hits for entry in line)
            assert len(store.facts()) <= len(store) and store.version <= 16

    with ThreadPoolExecutor(8) as pool:
        for call in [pool.submit(add), *(pool.submit(ask, i) for i in range(7))]:
            call.result()
    assert told(store) == [(edit.prompt, edit.target) for edit in facts(64)]
    fresh, wanted = Store.open(store.path, stamp=STAMP), vectors.astype(np.float32)
    assert [line[0].seq for line in store.search(wanted)[1]] == [line[0].seq for line in fresh.search(wanted)[1]]
