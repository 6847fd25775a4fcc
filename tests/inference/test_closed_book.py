"""Own answers are asked once, and what is kept is never another model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_lm

from lmpatch.data.rag.reader import closed_book
from lmpatch.inference import closed_book as module
from lmpatch.inference.closed_book import closed_book_answers
from lmpatch.inference.generate import generate
from lmpatch.patches.ledger import apply
from lmpatch.patches.weight.delta import LowRank
from lmpatch.patches.weight.patch import WeightPatch

ASKED = ["Who?", "Where?", "When?", "Who?"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path))


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("the model was asked")


@pytest.mark.slow
def test_answers_are_those_of_the_plain_call_and_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    first = closed_book_answers(lm, ASKED)
    texts = generate(lm, list(map(closed_book, ASKED)), max_new_tokens=16)
    assert [own.text for own in first] == [text.strip() for text in texts]
    monkeypatch.setattr(module, "generate", refuse)
    assert closed_book_answers(tiny_lm("llama"), ASKED) == first
    with pytest.raises(AssertionError):
        closed_book_answers(tiny_lm("llama", seed=1), ASKED)


@pytest.mark.slow
def test_an_answer_that_ended_by_itself_is_told_from_one_that_was_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, asked = tiny_lm("llama"), [*ASKED, "Where there?", "Which now?", "Is it this one?"]
    shorter, whole = (generate(lm, list(map(closed_book, asked)), max_new_tokens=limit) for limit in (15, 16))
    wanted = [a == b for a, b in zip(shorter, whole, strict=True)]  # the 16th token added nothing
    assert [own.ended for own in closed_book_answers(lm, asked)] == wanted and {*wanted} == {True, False}
    monkeypatch.setattr(module, "generate", refuse)
    assert [own.ended for own in closed_book_answers(lm, asked)] == wanted  # as it was kept


@pytest.mark.slow
def test_an_answer_through_the_chat_template_is_not_taken_for_one_without() -> None:
    lm = tiny_lm("llama")
    lm.tokenizer.chat_template = "<user>{{ messages[0]['content'] }}<model>"
    chat, bare = closed_book_answers(lm, ASKED), closed_book_answers(lm.plain, ASKED)
    for model, found in ((lm, chat), (lm.plain, bare)):
        texts = generate(model, list(map(closed_book, ASKED)), max_new_tokens=16)
        assert [own.text for own in found] == [text.strip() for text in texts]
    assert chat != bare and lm.chat


@pytest.mark.slow
def test_half_a_line_that_a_kill_left_is_asked_again(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    first = closed_book_answers(lm, ASKED)
    (path,) = tmp_path.rglob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-5])
    assert closed_book_answers(lm, ASKED) == first
    assert closed_book_answers(lm, ["Why?", *ASKED])[1:] == first


@pytest.mark.slow
def test_a_patched_model_is_asked_and_nothing_of_it_is_kept(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    down = lm.layout.weight(lm.layout.downs[1])
    delta = LowRank(torch.ones(lm.layout.d_model, 1), torch.ones(1, lm.layout.d_ff))
    with apply(lm, WeightPatch.make(lm, {down: delta}, method="test")):
        closed_book_answers(lm, ASKED)
    assert not list(tmp_path.rglob("*.jsonl"))
