"""Threads that share one model: every answer is the question's own, and what goes on comes off."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import torch
from tiny import tiny_lm

import lmpatch as lp
from lmpatch.errors import LmpatchError
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import applied
from lmpatch.patches.weight.delta import LowRank
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.provenance import hash_tensors

from .tally import Hang, Tally, Wrong

PROMPTS = [f"The {thing} number {i} is in" for i in range(4) for thing in ("Eiffel Tower", "Colosseum", "Needle")]
CLOSE = 1e-4  # of log probabilities; another prompt's answer is off by more than 1e-2
WAIT = 600.0


def low(lm: LM, block: int, seed: int) -> WeightPatch:
    """A patch of one block, large enough to move answers."""
    draw = torch.Generator().manual_seed(seed)
    name = lm.layout.weight(lm.layout.downs[block])
    width, inner = lm.parameter(name).shape
    delta = LowRank(torch.randn(width, 1, generator=draw), torch.randn(1, inner, generator=draw))
    return WeightPatch.make(lm, {name: delta}, method="low")


def together(workers: list[Callable[[], None]]) -> None:
    """Run them in threads of their own and wait for all."""
    threads = [threading.Thread(target=worker, daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    if any(thread.is_alive() for thread in threads):
        raise Hang(f"threads still run after {WAIT:.0f} s")


def campaign(tally: Tally, calls: int, seed: int, counts: tuple[int, ...] = (2, 8)) -> None:
    """So many calls by 2 and by 8 threads, of a bare and of a patched model; a tenth of them put patches on and off."""
    for count in counts:
        for mount in (None, "side"):
            lm = tiny_lm("llama")
            if mount:
                lp.apply(lm, low(lm, 1, 0), mount="side")
            _asking(tally, lm, count, calls // 2, f"threads, {count} ask", seed)
        _changing(tally, count, max(count, calls // 10), f"threads, {count} apply and remove")


def _asking(tally: Tally, lm: LM, count: int, calls: int, kind: str, seed: int) -> None:
    wanted = {p: (lp.generate(lm, p, max_new_tokens=3), lp.score(lm, [p], ["Rome"])[0].total) for p in PROMPTS}
    results: list[tuple[str, Exception | None]] = []

    def worker(number: int) -> None:
        draw = random.Random(f"{seed}/{number}")
        for _ in range(-(-calls // count)):
            prompt = draw.choice(PROMPTS)
            try:
                if draw.random() < 0.5:
                    right = lp.generate(lm, prompt, max_new_tokens=3) == wanted[prompt][0]
                else:
                    right = abs(lp.score(lm, [prompt], ["Rome"])[0].total - wanted[prompt][1]) < CLOSE
                results.append((prompt, None if right else Wrong("another answer than alone")))
            except Exception as error:
                results.append((prompt, error))

    together([lambda number=n: worker(number) for n in range(count)])  # type: ignore[misc]
    _count(tally, kind, results)


def _changing(tally: Tally, count: int, calls: int, kind: str) -> None:
    lm = tiny_lm("llama")
    before = hash_tensors(lm.model.state_dict().items(), exact=True)
    patches = [low(lm, n % lm.layout.n_layers, n) for n in range(count)]
    results: list[tuple[str, Exception | None]] = []

    def worker(number: int) -> None:
        for i in range(-(-calls // count)):
            try:
                with lp.apply(lm, patches[number], mount="bake" if i % 2 else "side"):
                    lp.generate(lm, PROMPTS[0], max_new_tokens=1)
                results.append((f"patch {number}", None))
            except Exception as error:
                results.append((f"patch {number}", error))

    together([lambda number=n: worker(number) for n in range(count)])  # type: ignore[misc]
    after = hash_tensors(lm.model.state_dict().items(), exact=True)
    spoiled = after != before or applied(lm)
    results.append(("the weights at the end", Wrong("they did not come back") if spoiled else None))
    _count(tally, kind, results)


def _count(tally: Tally, kind: str, results: list[tuple[str, Exception | None]]) -> None:
    for number, (what, error) in enumerate(results):

        def act(error: Exception | None = error) -> None:
            if isinstance(error, LmpatchError):
                raise RuntimeError(f"a sound call was refused: {error}") from error
            if error is not None:
                raise error

        tally.run(kind, number, what, act)
