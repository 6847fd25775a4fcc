"""Ctrl-C at lines of lmpatch, while a patch is made, goes on, comes off or is asked: all is as it was, and works."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tiny import tiny_lm
from torch import Tensor

import lmpatch as lp
from lmpatch import registry
from lmpatch.data.context import InContext
from lmpatch.models.lm import LM, _locks
from lmpatch.patches.ledger import Applied, applied
from lmpatch.patches.patch import Patch
from lmpatch.provenance import hash_tensors

from .tally import SRC, Tally, Wrong

PROMPTS = [InContext("The Eiffel Tower is in Rome. It is in", "It is in"), InContext("The capital of France is", "The")]
SHARES = {"apply": 4, "remove": 4, "ask": 2, "fit": 3}
"""How often each sort of act is interrupted, against the others."""


@contextmanager
def line(stop: int) -> Iterator[list[int]]:
    """Ctrl-C at the n-th line of lmpatch's own code that runs in the block; 0: never. Gives [lines that ran]."""
    count = [0]

    def trace(frame: Any, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(SRC):
            return None
        if event == "line":
            count[0] += 1
            if count[0] == stop:
                sys.settrace(None)  # one Ctrl-C: what it makes happen is left alone
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def snapshot(lm: LM) -> dict[str, Any]:
    """All that a patch or a fit may change."""
    modules = list(lm.model.modules())
    return {
        "weights": hash_tensors(lm.model.state_dict().items(), exact=True),
        "storage": [p.data_ptr() for p in lm.model.parameters()],
        "gradients asked for": [p.requires_grad for p in lm.model.parameters()],
        "gradients": [p.grad is None for p in lm.model.parameters()],
        "training": [m.training for m in modules],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules],
        "attributes": [sorted(key for key in vars(m) if not key.startswith("_lmpatch")) for m in modules],
        "patches": len(applied(lm)),
        "padding": (lm.tokenizer.padding_side, lm.tokenizer.truncation_side),
        "grad mode": torch.is_grad_enabled(),
        "lock": _free(lm),
    }


def _free(lm: LM) -> bool:
    """Another thread could use the model now."""
    found: list[bool] = []

    def look() -> None:
        lock = _locks[lm.model]  # what lm.lock takes
        found.append(lock.acquire(blocking=False))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0]


def answers(lm: LM) -> tuple[list[str], Tensor]:
    """What the model says, through two of lmpatch's calls, and what a plain call of it gives."""
    with torch.no_grad():
        plain = lm.model(torch.tensor([[1, 5, 9, 30]])).logits
    return lp.generate(lm, PROMPTS, max_new_tokens=3), plain


@dataclass(frozen=True)
class Act:
    """Something that can be stopped."""

    sort: str
    name: str
    lm: LM
    prepare: Callable[[], Any]
    run: Callable[[Any], object]
    """Takes what ``prepare`` gave."""


def example(method: str, lm: LM) -> Callable[[], Patch]:
    """A method's example fit."""
    module = registry.get("methods", method)
    records, config = module.example(lm)
    editor = {"editor": module.example_editor(lm)} if hasattr(module, "example_editor") else {}
    return lambda: module.fit(lm, records, config, **editor)


def acts(families: tuple[str, ...] = ("llama", "gpt2")) -> list[Act]:
    """Every method's fit; every patch going on and coming off by every mount; asking with it on."""
    made = []
    for family in families:
        lm = tiny_lm(family)
        for method in registry.names("methods"):
            fit = example(method, lm)
            if family == families[0]:
                made.append(Act("fit", f"fit {method}", lm, lambda: None, partial(_fit, fit)))
            patch = fit()
            for mount in patch.mounts:
                made += _patch_acts(lm, patch, mount, f"{method} {mount} {family}")
    return made


def _fit(fit: Callable[[], Patch], _: Any) -> Patch:
    return fit()


def _patch_acts(lm: LM, patch: Patch, mount: Any, name: str) -> list[Act]:
    def on() -> Applied:
        return lp.apply(lm, patch, mount=mount)

    def ask(_: Any) -> None:
        lp.generate(lm, PROMPTS, max_new_tokens=2)
        lp.score(lm, PROMPTS, ["Rome", "Paris"])

    return [
        Act("apply", f"apply {name}", lm, lambda: None, lambda _: on()),
        Act("remove", f"remove {name}", lm, on, lambda handle: handle.remove()),
        Act("ask", f"ask {name}", lm, on, ask),
    ]


def settle(lm: LM) -> None:
    """Take off what is on. Everything that is on must be known."""
    for handle in reversed(applied(lm)):
        handle.remove()


def campaign(
    tally: Tally,
    count: int,
    seed: int,
    families: tuple[str, ...] = ("llama", "gpt2"),
    sorts: Collection[str] = tuple(SHARES),
) -> None:
    """So many interrupts, spread over all acts of some sorts and over the lines of each."""
    draw = random.Random(f"{seed}/interrupts")
    listed = [act for act in acts(families) if act.sort in sorts]
    weights = [SHARES[act.sort] / sum(other.sort == act.sort for other in listed) for act in listed]
    whole = [max(1, round(count * weight / sum(weights))) for weight in weights]
    for act, share in zip(listed, whole, strict=True):
        before, said = snapshot(act.lm), answers(act.lm)
        for _ in range(2):  # what is cached is there: each run has the same lines
            ready = act.prepare()
            with line(0) as lines:
                act.run(ready)
            settle(act.lm)
        for number in range(share):
            stop = draw.randint(1, lines[0])
            what = f"{act.name}, line {stop} of {lines[0]}"
            tally.run(f"interrupts, {act.sort}", number, what, partial(_one, act, stop, before, said))


def _one(act: Act, stop: int, before: dict[str, Any], said: tuple[list[str], Tensor]) -> None:
    ready = act.prepare()
    try:
        with line(stop):
            act.run(ready)
    except KeyboardInterrupt:
        pass
    try:
        settle(act.lm)
        after = snapshot(act.lm)
        if wrong := [what for what in before if before[what] != after[what]]:
            raise Wrong(f"not as it was: {', '.join(wrong)}")
        now = answers(act.lm)
        if now[0] != said[0] or not torch.equal(now[1], said[1]):
            raise Wrong("the model says something else")
    except BaseException:
        _renew(act.lm)
        raise


def _renew(lm: LM) -> None:
    """A model that was spoiled must not fail what comes after it: its weights, hooks and ledger are a fresh model's."""
    fresh = tiny_lm(lm.name.removeprefix("tiny-"))
    for module, other in zip(lm.model.modules(), fresh.model.modules(), strict=True):
        module.__dict__.clear()
        module.__dict__.update(other.__dict__)
    for name in [name for name in vars(lm.model) if name.startswith("_lmpatch")]:
        delattr(lm.model, name)
