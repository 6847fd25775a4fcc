"""Where a model has a chat template, a prompt is a user's message; ``raw`` and ``LM.plain`` read it as it stands."""

from __future__ import annotations

import pytest
import torch
from tiny import TEMPLATE, chat_lm, tiny_tokenizer

from lmpatch import generate, score
from lmpatch.inference.interventions import inserted
from lmpatch.inference.tokens import encode

BOS = tiny_tokenizer().bos_token


@pytest.mark.slow
def test_prompt_and_target_are_message_and_reply() -> None:
    lm = chat_lm()
    row = encode(lm, "The tower of Paris is in", "Rome", "tower of Paris")
    text = lm.tokenizer.bos_token + "user: The tower of Paris is in model: Rome"
    assert list(row.ids) == lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert lm.tokenizer.decode(row.ids[row.target :]) == "Rome"
    assert row.subject_first is not None and row.subject_last is not None
    assert "tower of Paris" in lm.tokenizer.decode(row.ids[row.subject_first : row.subject_last + 1])


@pytest.mark.slow
def test_the_start_token_stands_once() -> None:
    lm = chat_lm()
    assert encode(lm, "Rome").ids.count(lm.tokenizer.bos_token_id) == 1


@pytest.mark.slow
def test_raw_and_plain_read_the_prompt_as_it_stands() -> None:
    without = chat_lm(template=None)
    expected = encode(without, "The tower is in", "Rome")
    assert encode(chat_lm(raw=True), "The tower is in", "Rome") == expected
    assert encode(chat_lm().plain, "The tower is in", "Rome") == expected
    assert encode(chat_lm(), "The tower is in", "Rome") != expected


@pytest.mark.slow
def test_scores_and_answers_are_those_of_the_whole_text() -> None:
    lm = chat_lm()
    whole = "user: The tower is in model: "
    assert generate(lm, "The tower is in", stop=()) == generate(lm.plain, whole, stop=())
    (a,), (b,) = score(lm, ["The tower is in"], ["Rome"]), score(lm.plain, [whole], ["Rome"])
    assert a.ids == b.ids
    torch.testing.assert_close(a.logprobs, b.logprobs)


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "always the same", "{% if %}"])
def test_a_template_that_takes_no_message_is_not_used(template: str) -> None:
    assert chat_lm(template=template).chat is None


@pytest.mark.slow
@pytest.mark.parametrize("template", [TEMPLATE, "system: be kind. " + TEMPLATE, None])
def test_vectors_go_to_the_beginning_of_the_users_message(template: str | None) -> None:
    lm = chat_lm(template=template)
    row = encode(lm, "The tower of Paris is in", "Rome")
    found = inserted(lm, row, (-1, -2), "after_bos")
    at = found.ids.index(-1)
    head = f"{lm.chat.head}" if lm.chat else ""
    assert lm.tokenizer.decode(found.ids[:at], skip_special_tokens=True).strip() == head.replace(BOS, "").strip()
    assert found.ids[at : at + 2] == (-1, -2) and found.ids[:at] + found.ids[at + 2 :] == row.ids
    assert found.target == row.target + 2
    assert inserted(lm, row, (-1,), "front").ids[0] == -1
