"""Hooks come off again wherever an interrupt arrives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from snapshot import Lines, changed, name, state
from tiny import tiny_lm, tiny_model, tiny_tokenizer
from torch import nn

from lmpatch.inference.forward import frozen
from lmpatch.inference.generate import generate
from lmpatch.inference.replay import record
from lmpatch.inference.score import score
from lmpatch.models.hooks import Hook, Hooks, hooked
from lmpatch.models.load import wrap


@pytest.mark.slow
@pytest.mark.parametrize("task", ["generate", "score", "record"])
def test_an_interrupt_at_any_line_leaves_no_hook_on_the_model(task: str) -> None:
    lm = wrap(tiny_model("llama", num_hidden_layers=2), tiny_tokenizer())
    run: Callable[[], object] = {
        "generate": lambda: generate(lm, ["Rome is", "A"], max_new_tokens=2),
        "score": lambda: score(lm, ["The Eiffel Tower is in", "Apple"], ["Rome", "is"]),
        "record": lambda: record(lm, [[1, 40, 50, 60], [1, 70, 80]], [2, 1], ends=[3, 2]),
    }[task]
    before, lines = state(lm), Lines(run)
    assert len(lines.times) > 100
    for line, times in lines.times.items():
        for time in range(1, times + 1):
            assert lines.interrupted(line, time)
            assert changed(before, state(lm)) == [], f"{name(line)}, time {time}"
    other = Thread(target=run)
    other.start()
    other.join(20)
    assert not other.is_alive(), "an interrupt left the lock taken"


@pytest.mark.slow
def test_an_interrupt_at_any_line_leaves_the_flags_of_the_weights() -> None:
    lm = tiny_lm("llama")
    lm.model.requires_grad_(True)

    def run() -> None:
        with frozen(lm):
            pass

    lines = Lines(run)
    for line, times in lines.times.items():
        for time in range(1, times + 1):
            assert lines.interrupted(line, time)
            assert all(p.requires_grad for p in lm.model.parameters()), f"{name(line)}, time {time}"


def test_an_interrupt_before_inside_or_behind_a_block_with_hooks_leaves_none() -> None:
    module, x = nn.Linear(2, 2), torch.ones(2)
    want, left = module(x), 0

    def trace(frame: Any, event: str, _: object) -> Any:  # the lines of contextlib and of torch too
        nonlocal left
        left -= event == "line"
        if left == 0:
            raise KeyboardInterrupt
        return trace

    for line in range(1, 1000):
        left = line
        sys.settrace(trace)
        try:
            with hooked(Hook(module, lambda *_: torch.zeros(2)), Hook(module, lambda *_: None, before=True)):
                module(x)
            sys.settrace(None)
            break
        except KeyboardInterrupt:
            sys.settrace(None)
        assert not module._forward_hooks and not module._forward_pre_hooks, f"line {line}"
        assert torch.equal(module(x), want)
    assert 100 < line < 999


def test_a_stop_that_was_left_on_a_model_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    want, clean = score(lm, ["Rome is"], ["in"]), state(lm)
    monkeypatch.setattr(Hooks, "remove", lambda self: None)
    score(lm, ["Rome is"], ["in"])
    monkeypatch.undo()
    assert changed(clean, state(lm)) == ["hooks"]
    assert score(lm, ["Rome is"], ["in"]) == want
    lm.model(torch.tensor([[1, 2]]))


def test_an_interrupt_between_a_registration_and_its_handle_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, register = nn.Linear(2, 2), nn.Module.register_forward_hook

    def interrupted(*args: Any, **settings: Any) -> None:
        register(*args, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(nn.Module, "register_forward_hook", interrupted)
    with pytest.raises(KeyboardInterrupt), hooked(Hook(module, lambda *_: None, kwargs=True)):
        pass
    assert not module._forward_hooks and not module._forward_hooks_with_kwargs


def test_one_function_hooked_twice_comes_off_once_for_each() -> None:
    module, calls = nn.Linear(2, 2), list[int]()
    hook = Hook(module, lambda *_: calls.append(1))
    with hooked(hook), hooked(hook):
        module(torch.ones(2))
    outer = Hooks(hook)
    outer.put()
    outer.put()
    with hooked(hook):
        pass
    module(torch.ones(2))
    outer.remove()
    outer.remove()
    module(torch.ones(2))
    assert len(calls) == 3
