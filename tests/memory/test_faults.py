"""Nothing acknowledged is lost: to a kill at any moment, to a full disk, to another writer."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput, LmpatchError
from lmpatch.memory.store import Store

pytest.importorskip("lancedb")

WRITER = Path(__file__).with_name("writer.py")
WIDTH, EXACT = 16, 25
STAMP = {"editor": "e", "base": "b"}
KILLS = 60
Facts = dict[str, str]


def told(store: Store, **which: Any) -> Facts:
    return {entry.edit.prompt: entry.edit.target for entry in store.facts(**which)}


def after(facts: Facts, act: list[Any]) -> Facts:
    """What holds once an act of the writer is done."""
    kind, what = act
    if kind == "add":
        return facts | dict(what)
    return {prompt: target for prompt, target in facts.items() if prompt not in what}


def one_life(
    writer: subprocess.Popen[str], seed: int, acts: int, seconds: float
) -> tuple[list[list[Any]], list[Any] | None]:
    """Start a writer and kill it this long after so many acts; what it said was done, and what it had begun."""
    assert writer.stdin and writer.stdout
    writer.stdin.write(f"{seed}\n")
    writer.stdin.flush()
    done: list[list[Any]] = []
    begun, child, killed = None, 0, False
    while True:
        word, _, text = writer.stdout.readline().partition(" ")
        what = json.loads(text)
        if word == "born":
            child = what
        elif word == "begin":
            begun = what
        elif word == "done":
            done.append(what)
            begun = None
        elif word == "dead":
            assert killed, "it died by itself"
            return done, begun
        if child and len(done) >= acts and not killed:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
            killed = True


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    Store.create(tmp_path / "m", width=WIDTH, stamp=STAMP)
    words = [sys.executable, "-W", "ignore", str(WRITER), str(tmp_path / "m")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin
        process.stdin.close()
        assert process.wait(10) == 0


@pytest.mark.slow
def test_a_writer_killed_at_random_moments_loses_nothing_it_acknowledged(
    writer: subprocess.Popen[str], tmp_path: Path
) -> None:
    sys.path.insert(0, str(WRITER.parent))
    try:
        from writer import key  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    draw, facts, past = random.Random(0), {}, [{}]
    acknowledged, lost, interrupted = 0, 0, Counter[str]()
    for life in range(KILLS):
        done, begun = one_life(writer, life, draw.randint(0, 3), draw.uniform(0, 0.06))
        acknowledged += len(done)
        for act in done:
            facts = after(facts, act)
            past += [facts] if act[0] != "compact" else []
        store = Store.open(tmp_path / "m", stamp=STAMP, exact=EXACT)
        if begun:
            interrupted[begun[0]] += 1
            if begun[0] != "compact" and store.version == len(past):  # all of it came through, unacknowledged
                facts = after(facts, begun)
                past.append(facts)
        found = told(store)
        lost += sum(found.get(prompt) != target for prompt, target in facts.items())
        assert found == facts and store.version == len(past) - 1
        asked = [*facts.items()][:3]
        _, hits = store.search(np.concatenate([np.zeros((0, WIDTH)), *(key(fact) for fact in asked)]), len(facts))
        assert all({hit.edit.prompt for hit in line} == set(facts) for line in hits)
    assert lost == 0
    assert [told(store, version=version) for version in range(len(past))] == past
    store.compact()
    assert told(store) == facts
    assert [len([*(tmp_path / "m" / "facts.lance" / part).iterdir()]) for part in ("data", "_transactions")] == [1, 1]
    assert acknowledged > KILLS and {"add", "compact"} <= set(interrupted), interrupted


def test_a_killed_creation_can_be_made_again(tmp_path: Path) -> None:
    half = tmp_path / "m" / "facts.lance"
    for folder in ("_versions", "_transactions", "data"):
        (half / folder).mkdir(parents=True)
    (half / "_transactions" / "0-x.txn").write_bytes(b"")
    with pytest.raises(BadInput, match="no memory"):
        Store.open(tmp_path / "m")
    Store.create(tmp_path / "m", width=WIDTH, stamp=STAMP).add([Edit("a", "b")], np.ones((1, WIDTH)))
    assert told(Store.open(tmp_path / "m")) == {"a": "b"}


# Full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True
        )
    except OSError as error:
        pytest.skip(f"no file system can be mounted: {error}")
    if mount.returncode:
        pytest.skip(f"no file system can be mounted: {mount.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def some(n: int, start: int = 0) -> tuple[list[Edit], np.ndarray]:
    vectors = np.random.default_rng(start).standard_normal((n, 512))
    return [Edit(f"Fact {i} is", f"target {i}") for i in range(start, start + n)], vectors


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_the_memory_as_it_was(small_disk: Path) -> None:
    store = Store.create(small_disk / "m", width=512, stamp=STAMP)
    store.add(*some(300))
    before = store.facts(history=True)
    with pytest.raises(LmpatchError, match="disk is full. Nothing was stored"):
        store.add(*some(3000, 300))
    for memory in (store, Store.open(small_disk / "m")):
        assert memory.facts(history=True) == before and memory.version == 1
        assert memory.search(some(300)[1][:5])[1][3][0].edit.prompt == "Fact 3 is"
    added = 0
    with pytest.raises(LmpatchError, match="disk is full"):
        for added in range(3000):
            store.add(*some(1, 300 + added))
    assert len(Store.open(small_disk / "m")) == len(store) == 300 + added > 320


def test_a_memory_that_does_not_fit_is_not_made(small_disk: Path) -> None:
    with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    with pytest.raises(LmpatchError, match="disk is full"):
        Store.create(small_disk / "m", width=512, stamp=STAMP)
    (small_disk / "filler").unlink()
    Store.create(small_disk / "m", width=512, stamp=STAMP).add(*some(3))
    assert len(Store.open(small_disk / "m")) == 3


@pytest.mark.slow
def test_a_file_that_may_not_grow_is_said_and_leaves_the_memory_as_it_was(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "m", width=512, stamp=STAMP)
    store.add(*some(20))
    before, limits = store.facts(history=True), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(LmpatchError, match="disk is full. Nothing was stored"):
            store.add(*some(1000, 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.facts(history=True) == before == Store.open(tmp_path / "m").facts(history=True)
    store.add(*some(1000, 20))
    store.compact()
    assert len(store) == 1020 and len([*(tmp_path / "m" / "facts.lance" / "data").iterdir()]) == 1


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "m", width=WIDTH, stamp=STAMP)
    (tmp_path / "m" / "lock").unlink()
    (tmp_path / "m" / "lock").mkdir()
    with pytest.raises(LmpatchError, match="cannot write to"):
        store.add([Edit("a", "b")], np.ones((1, WIDTH)))


# Several processes

ADDS = """
import sys, numpy
from lmpatch.data.edits import Edit
from lmpatch.memory.store import Store
store = Store.open(sys.argv[1])
for i in range(40):
    name = sys.argv[2]
    store.add([Edit(f"{name} {i} is", name), Edit("Both say", f"{name} {i}")], numpy.ones((2, 16)))
    if i % 10 == 5:
        store.compact()
"""


@pytest.mark.slow
def test_two_processes_that_write_at_once_lose_nothing_and_a_reader_never_stumbles(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "m", width=WIDTH, stamp=STAMP)
    both = [subprocess.Popen([sys.executable, "-c", ADDS, tmp_path / "m", name]) for name in "ab"]
    seen = 0
    while any(process.poll() is None for process in both):
        scores, hits = store.search(np.ones((1, WIDTH)), 500)
        assert len(hits[0]) >= seen and (scores == WIDTH).all()
        seen = len(hits[0])
    assert [process.returncode for process in both] == [0, 0]
    assert told(store) == {f"{name} {i} is": name for name in "ab" for i in range(40)} | {
        "Both say": max(store.find("both say", history=True), key=lambda entry: entry.seq).edit.target
    }
    assert [version.put for version in store.versions()] == [2] * 80
    assert len(store.find("both say", history=True)) == 80


@pytest.mark.slow
def test_a_reader_waits_for_a_commit_that_is_half_written(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "m", width=WIDTH, stamp=STAMP)
    store.add([Edit("a", "b")], np.ones((1, WIDTH)))
    versions = tmp_path / "m" / "facts.lance" / "_versions"
    reader, known = Store.open(tmp_path / "m"), {*versions.iterdir()}
    store.add([Edit("c", "d")], np.ones((1, WIDTH)))
    (manifest,) = {*versions.iterdir()} - known
    whole = manifest.read_bytes()
    begun = threading.Event()

    def write() -> None:
        with FileLock(tmp_path / "m" / "lock"):
            manifest.write_bytes(whole[: len(whole) // 2])
            begun.set()
            time.sleep(0.3)
            manifest.write_bytes(whole)

    for look in (
        lambda: len(reader),
        lambda: len(Store.open(tmp_path / "m")),
        lambda: reader.search(np.ones((1, WIDTH)), 3)[0].shape[1],
        lambda: reader.add([Edit("e", "f")], np.ones((1, WIDTH))) - 1,
    ):
        begun.clear()
        writer = threading.Thread(target=write)
        writer.start()
        begun.wait()
        assert look() == 2
        writer.join()


def test_a_commit_that_stays_half_written_is_one_line(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "m", width=WIDTH, stamp=STAMP)
    store.add([Edit("a", "b")], np.ones((1, WIDTH)))
    for manifest in (tmp_path / "m" / "facts.lance" / "_versions").glob("*.manifest"):
        manifest.write_bytes(manifest.read_bytes()[:40])
    for call in (store.facts, lambda: store.add([Edit("e", "f")], np.ones((1, WIDTH))), lambda: Store.open(store.path)):
        with pytest.raises(LmpatchError, match="cannot (read|open) the memory at") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["facts", "add", "open", "search", "vectors", "compact"])
def test_a_forked_child_is_told_instead_of_hanging(tmp_path: Path, call: str) -> None:
    code = (
        "import multiprocessing as mp, sys, warnings, numpy as np\n"
        "from lmpatch.data.edits import Edit\n"
        "from lmpatch.errors import LmpatchError\n"
        "from lmpatch.memory.store import Store\n"
        "warnings.filterwarnings('ignore')\n"
        "key = np.ones((1, 16), np.float32)\n"
        "store = Store.create(sys.argv[1], width=16, stamp={'editor': 'e', 'base': 'b'})\n"
        "store.add([Edit('a', 'b')], key)\n"
        "facts = store.facts()\n"
        "calls = {'facts': store.facts, 'add': lambda: store.add([Edit('c', 'd')], key), 'compact': store.compact,\n"
        "         'open': lambda: Store.open(sys.argv[1]), 'search': lambda: store.search(key),\n"
        "         'vectors': lambda: store.vectors(facts)}\n"
        "def run(queue):\n"
        "    try: queue.put(repr(calls[sys.argv[2]]()))\n"
        "    except LmpatchError as error: queue.put(str(error))\n"
        "context = mp.get_context('fork')\n"
        "queue = context.SimpleQueue()\n"
        "child = context.Process(target=run, args=(queue,))\n"
        "child.start()\n"
        "child.join(20)\n"
        "print('hung' if child.is_alive() else queue.get())\n"
        "child.kill()\n"
        "assert len(store.facts()) == 1\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "m"), call]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "was forked from one that had used a memory" in done.stdout, done


@pytest.mark.slow
def test_children_that_open_a_memory_of_their_own_are_served(tmp_path: Path) -> None:
    code = (
        "import os, sys, numpy as np\n"
        "from lmpatch.data.edits import Edit\n"
        "from lmpatch.memory.store import Store\n"
        "children = []\n"
        "for name in 'ab':\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        Store.open(sys.argv[1]).add([Edit(name, 'x')], np.ones((1, 16)))\n"
        "        os._exit(0)\n"
        "    children.append(child)\n"
        "assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]\n"
        "assert len(Store.open(sys.argv[1])) == 2\n"
    )
    Store.create(tmp_path / "m", width=WIDTH, stamp=STAMP)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
