"""Where targets begin and subjects end, found by character offsets."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_lm

from lmpatch.errors import BadInput, SubjectNotFound
from lmpatch.inference.tokens import batches_of_rows, batches_of_tokens, encode, join, pad
from lmpatch.models.lm import LM


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm("llama")


@pytest.mark.parametrize(
    ("prompt", "target", "text"),
    [
        ("The capital is", "Rome", "The capital is Rome"),
        ("The capital is ", "Rome", "The capital is Rome"),
        ("The capital is", " Rome", "The capital is Rome"),
        ("日本の首都は", "東京", "日本の首都は東京"),
        ("", "Rome", "Rome"),
    ],
)
def test_one_blank_between_prompt_and_target_never_two(prompt: str, target: str, text: str) -> None:
    assert join(prompt, target) == text


@pytest.mark.parametrize(
    "prompt", ["The Eiffel Tower is in", "The Eiffel Tower is in ", "日本は", "Ends with a quote: “"]
)
@pytest.mark.parametrize("target", ["Rome", "the city of Rome", "Zürich"])
def test_target_ids_decode_to_the_target_and_the_rest_to_the_prompt(lm: LM, prompt: str, target: str) -> None:
    row = encode(lm, prompt, target)
    assert lm.tokenizer.decode(row.ids[row.target :]).strip() == target
    assert lm.tokenizer.decode(row.ids[: row.target], skip_special_tokens=True).strip() == prompt.strip()
    assert row.ids.count(lm.tokenizer.bos_token_id) == 1


def test_the_subject_ends_at_its_last_token_in_the_middle_and_at_the_end(lm: LM) -> None:
    for prompt in ("The Eiffel Tower is in", "I saw the Eiffel Tower"):
        row = encode(lm, prompt, "Rome", "Eiffel Tower")
        assert lm.tokenizer.decode(row.ids[: row.subject_last + 1], skip_special_tokens=True).endswith("Eiffel Tower")
        assert row.subject_last < row.target


def test_a_subject_that_is_not_in_its_prompt_is_refused_with_both_named(lm: LM) -> None:
    with pytest.raises(SubjectNotFound, match="Louvre.*Eiffel"):
        encode(lm, "The Eiffel Tower is in", "Rome", "Louvre")


def test_a_target_that_tokenises_to_nothing_is_refused(lm: LM) -> None:
    lm.tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace("\u200b", "")
    with pytest.raises(BadInput, match="tokenises to nothing"):
        encode(lm, "日", "\u200b")


def test_padding_masks_exactly_the_filled_places() -> None:
    ids, mask = pad([[5, 6], [7]], fill=0, side="left")
    assert ids.tolist() == [[5, 6], [0, 7]] and mask.tolist() == [[1, 1], [0, 1]]
    ids, mask = pad([[5, 6], [7]], fill=0, side="right")
    assert ids.tolist() == [[5, 6], [7, 0]] and mask.tolist() == [[1, 1], [1, 0]]


@pytest.mark.slow
@given(st.lists(st.integers(1, 40)), st.integers(1, 60))
def test_batches_hold_every_row_once_the_short_ones_first(lengths: list[int], limit: int) -> None:
    for batches in (batches_of_rows(lengths, limit), batches_of_tokens(lengths, limit)):
        order = [i for batch in batches for i in batch]
        assert order == sorted(range(len(lengths)), key=lambda i: (lengths[i], i))


@pytest.mark.slow
@given(st.lists(st.integers(1, 40)), st.integers(1, 60))
def test_batches_are_as_full_as_their_limit_lets_them(lengths: list[int], limit: int) -> None:
    by_rows = [len(batch) for batch in batches_of_rows(lengths, limit)]
    assert all(n == limit for n in by_rows[:-1]) and all(0 < n <= limit for n in by_rows[-1:])
    by_tokens = batches_of_tokens(lengths, limit)
    assert all(len(batch) == 1 or len(batch) * lengths[batch[-1]] <= limit for batch in by_tokens)
    for batch, (following, *_) in pairwise(by_tokens):
        assert (len(batch) + 1) * lengths[following] > limit
