"""Writers that are killed at any moment: a memory, a bench and a training run. What they acknowledged is there."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from .tally import PATIENCE, Hang, Tally, Wrong

WIDTH, STAMP = 16, {"editor": "e", "base": "b"}
STEPS = 400
Say = Callable[[Any], None]


def key(prompt: str, target: str) -> np.ndarray[Any, Any]:
    """The key of a fact, which its text decides: [1, WIDTH]."""
    draw = np.random.default_rng(int.from_bytes(f"{prompt}|{target}".encode(), "little") % 2**32)
    return draw.standard_normal((1, WIDTH)).astype(np.float16)


# In the child


def write_memory(folder: str, life: int, say: Say) -> None:
    """Facts, one commit each; now and then the memory is compacted."""
    from lmpatch.data.edits import Edit
    from lmpatch.memory.store import Store

    store, draw = Store.open(Path(folder), exact=25), random.Random(life)
    for step in range(10_000):
        if draw.random() < 0.2:
            store.compact()
            continue
        fact = [f"Prompt {draw.randrange(40)} is", f"{life}-{step}"]
        say(["begin", fact])
        store.add([Edit(*fact)], key(*fact))
        say(["done", fact])


def write_bench(folder: str, life: int, say: Say) -> None:
    """A bench, item by item."""
    ask_bench(folder, lambda done, total, what: say(["done", [what, done]]))
    say(["end", 0])


def ask_bench(folder: str | None, progress: Any = None) -> Any:
    """The same run each time."""
    from tiny import tiny_lm

    from lmpatch.benches import memotrap
    from lmpatch.benches.core import runner

    from .subjects import records

    runner.BLOCK = 1
    cfg = memotrap.Config(max_new_tokens=2, bootstrap=0, baselines=("attr", "opin"))
    return memotrap.run(tiny_lm("llama"), records(8), cfg, out=folder, progress=progress)


def write_training(folder: str, life: int, say: Say) -> None:
    """A training run with a checkpoint at each step."""
    train(Path(folder), lambda done, total, what: say(["done", done]))
    say(["end", 0])


def train(folder: Path, progress: Any = None) -> Any:
    """The same run each time."""
    from lmpatch.training.loop import Loop, Schedule

    from .subjects import Fit

    plan = Schedule(STEPS, validate_every=7, save_every=1)
    loop = Loop(Fit(), plan, file=folder / "run.safetensors", curves=folder / "run.jsonl", stamp="a")
    loop.run(progress)
    return loop


WRITERS: dict[str, Callable[[str, int, Say], None]] = {
    "memory": write_memory, "bench": write_bench, "training": write_training,
}  # fmt: skip


def live(name: str, folder: str, life: int, pipe: Connection) -> None:
    """A writer's life in a process of its own."""
    import torch

    torch.set_num_threads(1)
    WRITERS[name](folder, life, pipe.send)


# In the parent


def one_life(name: str, folder: Path, life: int, draw: random.Random) -> list[Any]:
    """Start a writer and kill it; all that it said."""
    context = multiprocessing.get_context("forkserver")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=live, args=(name, str(folder), life, theirs))
    process.start()
    theirs.close()
    said: list[Any] = []
    wait, seconds = draw.randint(0, 4), draw.uniform(0, 0.05)
    try:
        while len(said) < wait and (not said or said[-1][0] != "end"):
            if not mine.poll(PATIENCE):
                raise Hang(f"the writer says nothing for {PATIENCE} s")
            said.append(mine.recv())
        time.sleep(seconds)
        process.kill()
        while True:
            said.append(mine.recv())
    except (EOFError, OSError):
        return said
    finally:
        process.kill()
        process.join()


def campaign(tally: Tally, count: int, seed: int, room: Path) -> int:
    """So many kills, a third of each writer. Returns how much the writers had acknowledged."""
    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}  # of the server that forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["campaign.kills", "campaign.subjects", "lancedb"])
    heard: list[Any] = []
    checks = {"memory": _memory, "bench": _bench, "training": _training}
    for name, make in checks.items():
        draw = random.Random(f"{seed}/{name}")
        check = make(room / name)
        for life in range(-(-count // len(checks))):
            tally.run(f"kills, {name}", life, "killed", partial(_kill, check, name, room / name, life, draw, heard))
    return len(heard)


def _kill(
    check: Callable[[list[Any]], None], name: str, folder: Path, life: int, draw: random.Random, heard: list[Any]
) -> None:
    said = one_life(name, folder, life, draw)
    heard += [word for word in said if word[0] == "done"]
    check(said)


def _memory(folder: Path) -> Callable[[list[Any]], None]:
    from lmpatch.memory.store import Store

    Store.create(folder, width=WIDTH, stamp=STAMP)
    held: dict[str, str] = {}

    def check(said: list[Any]) -> None:
        begun = None
        for word, fact in said:
            begun = fact if word == "begin" else None
            if word == "done":
                held[fact[0]] = fact[1]
        found = {e.edit.prompt: e.edit.target for e in Store.open(folder, stamp=STAMP, exact=25).facts()}
        if begun and found.get(begun[0]) == begun[1]:
            held[begun[0]] = begun[1]  # all of it came through, unacknowledged
        if found != held:
            lost = [prompt for prompt, target in held.items() if found.get(prompt) != target]
            raise Wrong(f"{len(lost)} acknowledged facts are lost, {len(set(found) - set(held))} came from nowhere")

    return check


def _bench(folder: Path) -> Callable[[list[Any]], None]:
    from lmpatch.benches import memotrap
    from lmpatch.patches.patch import plain

    def rows(report: Any) -> dict[str, list[Any]]:
        return {each.name: [plain(row) for row in each.rows] for each in report.runs}

    whole = rows(ask_bench(None))
    acknowledged: dict[str, int] = {}

    def check(said: list[Any]) -> None:
        for word, what in said:
            if word == "done":
                name = what[0].removeprefix("scoring ")
                acknowledged[name] = max(acknowledged.get(name, 0), what[1])
        if not acknowledged:
            return
        found = {each.name: each for each in memotrap.read_report(folder).runs}
        for name, items in acknowledged.items():
            own = [plain(row) for row in found[name].rows] if name in found else []
            if name in whole and (len({row["place"] for row in own}) < items or any(r not in whole[name] for r in own)):
                raise Wrong(f"the run {name} has {len(own)} rows, {items} items were acknowledged")
        if all(items == 8 for items in acknowledged.values()) and len(acknowledged) == len(whole):
            for path in folder.iterdir():  # begin again
                path.unlink() if path.is_file() else None
            acknowledged.clear()

    return check


def _training(folder: Path) -> Callable[[list[Any]], None]:
    from lmpatch.training.loop import Loop, Schedule

    from .subjects import Fit

    folder.mkdir(parents=True)
    values: list[list[float]] = []
    alone = Loop(Fit(), Schedule(STEPS))
    alone.run(lambda *_: values.append(alone.task.values["x"].tolist()))
    last = [0]

    def check(said: list[Any]) -> None:
        last[0] = max([last[0], *(what for word, what in said if word == "done")])
        if not (folder / "run.safetensors").exists() and not last[0]:
            return
        loop = Loop(Fit(), Schedule(STEPS, validate_every=7, save_every=1), file=folder / "run.safetensors", stamp="a")
        if loop.step < last[0]:
            raise Wrong(f"step {last[0]} was acknowledged, the checkpoint is of step {loop.step}")
        if loop.step and loop.task.values["x"].tolist() != values[loop.step - 1]:
            raise Wrong(f"the checkpoint of step {loop.step} holds other values")
        if loop.step == STEPS:
            (folder / "run.safetensors").unlink()
            last[0] = 0

    return check
