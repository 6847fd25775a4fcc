"""A retired fact never comes back, and a fact out of its time is not used and hides none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmpatch.data.edits import Edit, read_edits
from lmpatch.errors import BadInput, LmpatchError
from lmpatch.memory import _log, _search
from lmpatch.memory.store import Store

pytest.importorskip("lancedb")

WIDTH = 16
STAMP = {"editor": "e" * 64, "base": "b" * 64}
OLD, DROPPED, OTHER = "The tower is in", "The opera is in", "Where is the hall?"


def keys(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, WIDTH)).astype(np.float16)


def some(n: int, start: int = 0) -> list[Edit]:
    return [Edit(f"Fact {i} is", f"target {i}") for i in range(start, start + n)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Three facts retired, superseded by its prompt, dropped, superseded in other words; and an index."""
    monkeypatch.setattr(_log, "flush", lambda *_: None)
    monkeypatch.setattr(_search, "flush", lambda *_: None)
    made = Store.create(tmp_path / "m", width=WIDTH, stamp=STAMP, exact=100)
    first = [Edit(OLD, "stale"), Edit(DROPPED, "stale"), Edit("The hall is in", "stale")]
    made.add([*first, *some(150)], np.concatenate([np.repeat(keys(1, 9), 3, 0) * 2, keys(150)]))
    assert _search.newest(made.path) == 153
    made.add([Edit(OLD, "new")], keys(1, 7))
    made.drop([DROPPED])
    made.add([Edit(OTHER, "new")], keys(1, 8), supersedes={0: [first[2]]})
    return made


def stale(store: Store) -> list[str]:
    """Retired facts that any way of asking still gives."""
    wide = store.search(np.concatenate([keys(1, 9), keys(1, 1)]), 500)[1]
    asked = [entry for line in wide for entry in line] + store.facts() + store.find("stale")
    asked += [entry for prompt in (OLD, DROPPED, "The hall is in") if (entry := store.get(prompt))]
    return [entry.edit.prompt for entry in asked if entry.edit.target == "stale"]


def opened(store: Store) -> Store:
    return Store.open(store.path, stamp=STAMP, exact=100)


def test_it_stays_retired_when_the_memory_is_opened_again(store: Store) -> None:
    assert stale(store) == stale(opened(store)) == []
    states = {entry.state for entry in store.find("stale", history=True)}
    assert states == {"superseded in 2", "dropped in 3", "superseded in 4"}


@pytest.mark.slow
def test_it_stays_retired_after_compaction_and_a_new_index(store: Store) -> None:
    for each in (store, opened(store)):
        each.compact()
        assert stale(each) == stale(opened(store)) == []
    assert _search.newest(store.path) == 157
    for index in store.path.glob("near-*"):
        shutil.rmtree(index)
    assert stale(opened(store)) == []
    store.compact()
    assert stale(opened(store)) == []


@pytest.mark.slow
def test_it_stays_retired_after_rollbacks_to_versions_that_had_retired_it(store: Store) -> None:
    store.add(some(5, 200), keys(5, 3))
    for version in (4, 5, 4):
        store.rollback(version)
        assert stale(store) == stale(opened(store)) == []
    store.rollback(3)
    assert stale(store) and {*stale(store)} == {"The hall is in"}, "the version in which it held is asked for"
    store.rollback(4)
    store.compact()
    assert stale(store) == stale(opened(store)) == []


STEPS = ["joined", "cleaned", "index written", "index removed", "index renamed"]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_it_stays_retired_when_compaction_ends_between_two_steps(
    store: Store, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def after(function: Any) -> Any:
        def run(*words: Any, **more: Any) -> None:
            function(*words, **more)
            raise KeyboardInterrupt

        return run

    with monkeypatch.context() as patch:
        if step == "joined":
            patch.setattr(_log, "flush", stop)
        elif step == "cleaned":
            patch.setattr(_search, "build", stop)
        elif step == "index written":
            patch.setattr(_search, "_write", after(_search._write))
        elif step == "index removed":
            patch.setattr(_search, "_remove", after(_search._remove))
        else:
            patch.setattr(Path, "rename", after(Path.rename))
        with pytest.raises(KeyboardInterrupt):
            store.compact()
    assert stale(store) == stale(opened(store)) == []
    assert len(store) == len(opened(store)) == 152
    opened(store).compact()
    assert stale(store) == stale(opened(store)) == []


@pytest.mark.slow
def test_files_of_an_older_copy_laid_over_it_bring_nothing_back(store: Store, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store.path, copy)
    store.drop(["Fact 3 is"])
    store.add([Edit("Fact 4 is", "newer")], keys(1, 5))
    store.compact()
    shutil.copytree(copy, store.path, dirs_exist_ok=True)
    for each in (store, opened(store)):
        assert stale(each) == [] and each.get("Fact 3 is") is None
        assert {e.edit.target for e in each.find("fact 4 ")} == {"newer"}
        each.compact()


@pytest.mark.slow
def test_an_index_of_another_log_is_not_asked(store: Store, tmp_path: Path) -> None:
    """A restored table under a newer index: its rows are numbered alike and hold other facts."""
    shutil.copytree(store.path, tmp_path / "copy")
    store.add([Edit("The bridge is in", "stale"), *some(40, 300)], np.concatenate([keys(1, 9) * 3, keys(40, 4)]))
    store.compact()
    shutil.rmtree(store.path / "facts.lance")
    shutil.copytree(tmp_path / "copy" / "facts.lance", store.path / "facts.lance")
    for call in (store.facts, lambda: store.add(some(1, 900), keys(1))):  # a handle that knew the newer one
        with pytest.raises(LmpatchError, match="cannot read the memory"):
            call()
    again = opened(store)
    assert _search.newest(store.path) == 198 and stale(again) == []
    unit = keys(60, 6) / np.linalg.norm(keys(60, 6).astype(np.float32), axis=1, keepdims=True)
    again.add(some(60, 400), 20 * unit)  # rows that the index says it knows
    for each in (again, opened(store)):
        hits = each.search(unit[:45], 1)[1]
        assert [line[0].edit.prompt for line in hits] == [f"Fact {i} is" for i in range(400, 445)]
        assert stale(each) == []
    again.compact()
    assert _search.newest(store.path) == 217 and stale(opened(store)) == []


# Time


@pytest.mark.parametrize("exact", [1000, 100])
def test_a_fact_out_of_its_time_is_not_used_and_hides_none(store: Store, exact: int) -> None:
    each = Store.open(store.path, stamp=STAMP, exact=exact)
    query = keys(1, 2)
    crowd = [Edit(f"Old {i} is", "past", valid_to="2020-01-01", source="x") for i in range(120)]
    each.add(
        [*crowd, Edit("Then is", "now", valid_from="2020-01-01")],
        np.concatenate([(2 * query).repeat(120, 0), 1.5 * query]),
    )
    if exact == 100:
        each.compact()
    assert [e.edit.target for e in each.search(query, 1)[1][0]] == ["now"]
    assert [e.edit.target for e in each.search(query, 1, as_of="2019-12-31T23:59:59Z")[1][0]] == ["past"]
    assert [e.edit.target for e in each.search(query, 1, as_of="2020-01-01")[1][0]] == ["now"], "the end is exclusive"
    assert each.search(query, 1, ever=True)[1][0][0].edit.target == "past"
    assert len(each.facts(as_of="2021-01-01")) == 153 and len(each.facts()) == len(each) == 273
    assert each.search(query, 500, as_of="2021-01-01")[0].shape == (1, 153) or exact == 100


def spans(store: Store, prompt: str = "It is") -> list[tuple[str, str, str]]:
    return [(entry.edit.target, *entry.edit.span) for entry in store.beside([prompt])[0]]


def test_a_newer_fact_of_a_prompt_takes_its_own_time_and_leaves_the_rest(store: Store, tmp_path: Path) -> None:
    def add(target: str, start: str = "", end: str = "") -> None:
        store.add([Edit("It is", target, valid_from=start, valid_to=end)], keys(1))

    add("a")
    add("b", "2010-01-01", "2020-01-01")
    assert spans(store) == [("a", "", "2010-01-01"), ("a", "2020-01-01", ""), ("b", "2010-01-01", "2020-01-01")]
    add("c", "2015-01-01")
    whole = [("a", "", "2010-01-01"), ("b", "2010-01-01", "2015-01-01"), ("c", "2015-01-01", "")]
    for each in (store, opened(store)):
        assert spans(each) == whole
        found = [each.get("it is", as_of) for as_of in ("2000-01-01", "2012-01-01", "2015-01-01", None)]
        assert [entry.edit.target for entry in found if entry] == ["a", "b", "c", "c"]
    version = store.version
    store.export(tmp_path / "out.jsonl")
    store.drop(["it is"])
    assert spans(store) == []
    store.rollback(version)
    assert spans(store) == spans(opened(store)) == whole
    store.rollback(version - 1)
    assert spans(store)[0] == ("a", "", "2010-01-01") and len(spans(store)) == 3
    other = Store.create(tmp_path / "other", width=WIDTH, stamp=STAMP)
    edits = read_edits(tmp_path / "out.jsonl")
    other.add(edits, keys(len(edits)))
    assert spans(other) == whole
    add("d")
    assert spans(store) == [("d", "", "")] and len(store) == 153


def test_time_and_origin_survive_store_reopening_and_export(store: Store, tmp_path: Path) -> None:
    edit = Edit("It is", "so", valid_from="2024-05-31T12:00+02:00", valid_to="2026-01-01", source="ticket 4711")
    store.add([edit], keys(1))
    (entry,) = opened(store).find("so")
    assert entry.edit == edit and entry.edit.valid_from == "2024-05-31T10:00:00+00:00" and entry.origin == "ticket 4711"
    store.export(tmp_path / "out.jsonl", as_of="2025-01-01")
    line = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[-1])
    assert line["source"] == "ticket 4711" and read_edits(tmp_path / "out.jsonl")[-1].span == edit.span
    store.add([Edit("It was", "so")], keys(1), source={"file": "facts.jsonl", "told": "me"})
    assert store.find("it was")[0].origin == "me"
    with pytest.raises(BadInput, match="as_of is 'soon', which is no date"):
        store.search(keys(1), as_of="soon")
