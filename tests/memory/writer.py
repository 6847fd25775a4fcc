"""A process that writes to a memory until it is killed, for test_faults.py.

    python writer.py STORE

For each line on stdin, ``SEED``, a child is forked, so that LanceDB is imported once. The child says on stdout what it
is about to do, and that it was done, each in one write: nothing is left in a buffer when it dies.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Sequence
from typing import Any

import lancedb  # noqa: F401  before the fork
import numpy as np

from lmpatch.data.edits import Edit
from lmpatch.memory.store import Store

WIDTH = 16
PROMPTS = 40
EXACT = 25  # so that an index is built as well


def key(fact: Sequence[str]) -> np.ndarray:
    """The key of a fact, which its text decides: [1, WIDTH]."""
    seed = int.from_bytes("|".join(fact).encode(), "little") % 2**32
    return np.random.default_rng(seed).standard_normal((1, WIDTH)).astype(np.float16)


def plan(draw: random.Random, step: int, held: list[str]) -> list[Any]:
    """The next act: ``["add", [[prompt, target], ...]]``, ``["drop", [prompt]]`` or ``["compact", []]``."""
    kind = draw.choices(["add", "drop", "compact"], [5, 1, 2])[0]
    if kind == "add" or (kind == "drop" and not held):
        places = draw.sample(range(PROMPTS), draw.choice([1, 1, 2, 12]))
        return ["add", [[f"Prompt {place} is", f"{os.getpid()}-{step}"] for place in places]]
    return [kind, draw.sample(held, 1) if kind == "drop" else []]


def say(word: str, what: Any) -> None:
    os.write(1, f"{word} {json.dumps(what)}\n".encode())


def live(path: str, seed: int) -> None:
    draw = random.Random(seed)
    store = Store.open(path, exact=EXACT)
    held = [entry.edit.prompt for entry in store.facts()]
    for step in range(10_000):
        act = plan(draw, step, held)
        say("begin", act)
        kind, what = act
        if kind == "add":
            store.add([Edit(*fact) for fact in what], np.concatenate([key(fact) for fact in what]))
            held += [prompt for prompt, _ in what if prompt not in held]
        elif kind == "drop":
            store.drop(what)
            held.remove(what[0])
        else:
            store.compact()
        say("done", act)


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            live(sys.argv[1], int(line))
        say("born", child)
        os.waitpid(child, 0)
        say("dead", child)
