"""Special tokens that a tokenizer adds behind a text are no part of a prompt or a target, and a start token is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BOS, EOS, PAD, tiny_lm, tiny_model, tiny_tokenizer
from tokenizers import processors

from lmpatch.errors import BadInput
from lmpatch.inference.generate import Sampling, generate, stream
from lmpatch.inference.multiple_choice import next_logits, option_tokens
from lmpatch.inference.score import score
from lmpatch.inference.states import hidden
from lmpatch.inference.tokens import encode, end_token
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap

PROMPTS, TARGETS = ["The Eiffel Tower is in", "Apple"], ["Rome", "was founded"]
NAMES = {"<eos>": EOS, "<pad>": PAD, "<bos>": BOS}


def ending(template: str) -> Any:
    """The tiny tokenizer with another post-processor."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} {template.replace('$A', '$B')}", special_tokens=list(NAMES.items())
    )
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["<eos>", "<pad>", "<eos> <eos>", "<pad> <eos>", "<bos>"])
@pytest.mark.parametrize("start", ["<bos> ", ""])
def test_tokens_added_behind_a_text_are_left_out_everywhere(start: str, ends: str) -> None:
    model = tiny_model("llama")
    plain, lm = (wrap(model, ending(start + text)) for text in ("$A", f"$A {ends}"))
    for prompt, target in zip(PROMPTS, TARGETS, strict=True):
        assert encode(lm, prompt, target) == encode(plain, prompt, target)
        assert encode(lm, prompt, target, prompt.split()[0]) == encode(plain, prompt, target, prompt.split()[0])
    assert encode(lm, "").ids == encode(plain, "").ids
    assert score(lm, PROMPTS, TARGETS) == score(plain, PROMPTS, TARGETS)
    assert generate(lm, PROMPTS, max_new_tokens=5) == generate(plain, PROMPTS, max_new_tokens=5)
    assert list(stream(lm, PROMPTS[0], max_new_tokens=5)) == list(stream(plain, PROMPTS[0], max_new_tokens=5))
    assert hidden(lm, PROMPTS).equal(hidden(plain, PROMPTS))
    assert next_logits(lm, PROMPTS, [40, 50]).equal(next_logits(plain, PROMPTS, [40, 50]))
    assert option_tokens(lm, *(PROMPTS[0], TARGETS)) == option_tokens(plain, *(PROMPTS[0], TARGETS))


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm("llama")


@pytest.mark.parametrize("typed", ["<bos>", "<bos><bos>"])
def test_a_typed_start_token_does_not_double(lm: LM, typed: str) -> None:
    for prompt in PROMPTS:
        row, plain = (
            encode(lm, typed + prompt, "Rome", prompt.split()[0]),
            encode(lm, prompt, "Rome", prompt.split()[0]),
        )
        assert row == plain
    assert generate(lm, typed + PROMPTS[0], max_new_tokens=4) == generate(lm, PROMPTS[0], max_new_tokens=4)


def test_a_start_token_within_a_text_and_an_end_token_that_was_typed_stay(lm: LM) -> None:
    assert encode(lm, "Apple <bos> is<eos>").ids.count(BOS) == 2
    assert encode(lm, "Apple<eos>").ids[-1] == EOS


def test_a_token_that_stands_for_an_image_ends_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    image = lm.tokenizer("Apple", add_special_tokens=False)["input_ids"][0]
    decode = lm.tokenizer.decode
    monkeypatch.setattr(
        lm.tokenizer, "decode", lambda ids, **k: "<start_of_image>" if ids == [image] else decode(ids, **k)
    )
    said = iter([*lm.tokenizer(" so", add_special_tokens=False)["input_ids"], image, image])
    monkeypatch.setattr(Sampling, "take", lambda *_: torch.tensor([next(said)]))
    assert "<start" not in generate(lm, "It is", max_new_tokens=8)
    assert list(said) == [image]  # none was asked for behind it


def test_an_answer_ends_with_a_new_line_or_of_a_chat_model_with_its_turn() -> None:
    lm, chat = tiny_lm("llama"), tiny_lm("llama")
    chat.tokenizer.chat_template = "user: {{ messages[0]['content'] }} model: "
    assert "\n" in lm.tokenizer.decode([end_token(lm)])
    assert end_token(lm, "eos") == end_token(chat) == end_token(chat, "eos") == EOS
    assert end_token(chat.plain) == end_token(lm)


def test_an_end_is_refused_where_the_tokenizer_has_none() -> None:
    lm = tiny_lm("llama")
    lm.tokenizer.eos_token = None
    with pytest.raises(BadInput, match="no token that ends an answer"):
        end_token(lm, "eos")
