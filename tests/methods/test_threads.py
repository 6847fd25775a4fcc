"""While one thread fits, another gets the answers of the model as it is, and the fit what it finds alone."""

from __future__ import annotations

import sys
import threading

import pytest
from snapshot import changed, state
from tiny import tiny_lm

from lmpatch import registry
from lmpatch.inference.generate import generate

PROMPTS = ["The Eiffel Tower is in", "Steve Jobs founded", "Apple"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "ircan", "iti", "memit", "param_mute", "rome", "scone"])
def test_a_fit_and_the_answers_of_another_thread_do_not_mix(
    name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    method, lm = registry.get("methods", name), tiny_lm("llama")
    records, cfg = method.example(lm)
    alone, answers = method.fit(lm, records, cfg).hash(), generate(lm, PROMPTS, max_new_tokens=4)
    before, ended, wrong = state(lm), threading.Event(), []

    def ask() -> None:
        while not ended.is_set():
            said = generate(lm, PROMPTS, max_new_tokens=4)
            if said != answers:
                wrong.append(said)

    threads, interval = [threading.Thread(target=ask) for _ in range(2)], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # they take turns often
    try:
        for thread in threads:
            thread.start()
        found = [method.fit(lm, records, cfg).hash() for _ in range(4)]
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        for thread in threads:
            thread.join()
    assert wrong == [] and set(found) == {alone}
    assert changed(before, state(lm)) == []
