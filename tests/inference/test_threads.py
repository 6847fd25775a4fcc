"""Threads that score, generate and replay on one model get their own answers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from tiny import tiny_lm

from lmpatch.inference.generate import generate, stream
from lmpatch.inference.multiple_choice import next_logits
from lmpatch.inference.replay import record
from lmpatch.inference.score import score
from lmpatch.inference.states import hidden
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM

PROMPTS = [f"The Eiffel Tower {place}" for place in ("is in", "was", "and Rome", "or Paris", "has", "7", "8", "9")]


def replayed(lm: LM, prompt: str) -> list[float]:
    row = [1, *(40 + ord(c) % 200 for c in prompt)]
    recording = record(lm, [row], [3])
    with torch.no_grad():
        out: list[float] = recording.forward(recording.hidden[1], 1)[0, -1].tolist()
    return out


TASKS: dict[str, Callable[[LM, str], Any]] = {
    "score": lambda lm, prompt: score(lm, [prompt], ["Rome"])[0],
    "generate": lambda lm, prompt: generate(lm, prompt, max_new_tokens=3, stop=()),
    "stream": lambda lm, prompt: "".join(stream(lm, prompt, max_new_tokens=3, stop=())),
    "hidden": lambda lm, prompt: hidden(lm, [prompt]).tolist(),
    "next_logits": lambda lm, prompt: next_logits(lm, [prompt], [40, 50]).tolist(),
    "replay": replayed,
}


def together(lm: LM, threads: int, jobs: list[tuple[str, str]]) -> None:
    jobs_of_each = [jobs[i::threads] for i in range(threads)]
    want = {job: TASKS[job[0]](lm, job[1]) for job in set(jobs)}
    assert len({str(answer) for (task, _), answer in want.items() if task == "score"}) == len(PROMPTS)
    begin = Barrier(threads)

    def work(own: list[tuple[str, str]]) -> list[Any]:
        begin.wait()
        return [TASKS[task](lm, prompt) for task, prompt in own]

    with ThreadPoolExecutor(threads) as pool:
        for own, answers in zip(jobs_of_each, pool.map(work, jobs_of_each), strict=True):
            assert answers == [want[job] for job in own]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 8])
def test_every_answer_is_its_own(threads: int) -> None:
    together(tiny_lm("llama"), threads, [(task, prompt) for prompt in PROMPTS for task in TASKS] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 8])
def test_a_thousand_scores_are_right(threads: int) -> None:
    together(tiny_lm("llama"), threads, [("score", prompt) for prompt in PROMPTS] * 125)


def test_a_hook_of_one_thread_does_not_see_the_calls_of_another(lm: LM) -> None:
    calls: list[int] = []
    with hooked(Hook(lm.module(lm.layout.blocks[0]), lambda *_: calls.append(1))):
        thread = Thread(target=hidden, args=(lm, PROMPTS[:1]))
        thread.start()
        thread.join()
        assert calls == []
        hidden(lm, PROMPTS[:1])
    assert calls == [1]


def test_a_stream_that_is_not_read_on_holds_nobody_up(lm: LM) -> None:
    pieces = stream(lm, PROMPTS[0], max_new_tokens=8, stop=())
    next(pieces)
    thread = Thread(target=hidden, args=(lm, PROMPTS[:1]))
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
