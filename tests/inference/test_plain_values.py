"""Calls with values that make no sense are refused in one line, and odd ones that do are taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny import tiny_lm, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lmpatch import BadInput, generate, hidden, score, wrap
from lmpatch.inference.tokens import encode

WRONG: list[dict[str, Any]] = [
    {"seed": 2**70}, {"seed": None}, {"seed": 1.5}, {"temperature": None}, {"temperature": "1"}, {"top_p": None},
    {"top_p": 0}, {"stop": [""]}, {"stop": [5]}, {"stop": ""}, {"max_new_tokens": 1.5},
]  # fmt: skip


@pytest.mark.parametrize("options", WRONG)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        generate(tiny_lm("llama"), "The tower is in", **options)


def test_a_text_is_one_stop() -> None:
    lm = tiny_lm("llama")
    assert generate(lm, "The tower", stop="never", max_new_tokens=6) == generate(
        lm, "The tower", stop=["never"], max_new_tokens=6
    )


@pytest.mark.parametrize("options", [{"temperature": 1e-300}, {"temperature": 1.0, "top_p": 1e-300}])
def test_the_smallest_numbers_are_greedy(options: dict[str, float]) -> None:
    lm = tiny_lm("llama")
    assert generate(lm, "The tower", max_new_tokens=4, **options) == generate(lm, "The tower", max_new_tokens=4)


def test_a_whole_number_of_numpy_is_a_seed() -> None:
    lm, options = tiny_lm("llama"), {"temperature": 1.0, "max_new_tokens": 4}
    assert generate(lm, "The", seed=np.int64(3), **options) == generate(lm, "The", seed=3, **options)


def test_prompts_and_targets_that_are_no_lists_of_texts_are_refused() -> None:
    lm = tiny_lm("llama")
    for call in (
        lambda: score(lm, "abc", "xyz"),
        lambda: score(lm, ["a", "b"], ["c"]),
        lambda: score(lm, ["The tower"], [""]),
        lambda: score(lm, ["The tower"], [None]),
        lambda: hidden(lm, "abc"),
        lambda: hidden(lm, [3]),
        lambda: generate(lm, "\ud83d a"),
        lambda: score(lm, ["a"], ["\ud83d"]),
    ):
        with pytest.raises(BadInput):
            call()  # type: ignore[no-untyped-call]


def test_an_end_behind_every_text_is_left_out_whatever_letters_a_tokenizer_knows() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<pad>", "<bos>", "<eos>"])
    backend.train_from_iterator(["The Tower is in Rome", "Paris is not"] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    assert tokenizer("x")["input_ids"] == [1, 2]  # it has no such letter
    lm = wrap(tiny_model("llama"), tokenizer)
    row = encode(lm, "The Tower is in", "Rome")
    assert row.ids[0] == 1 and 2 not in row.ids and row.target < len(row.ids)
