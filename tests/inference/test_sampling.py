"""Draws follow the distribution they are from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_lm

from lmpatch.errors import BadInput
from lmpatch.inference.generate import Sampling, generate, stream

Z = torch.tensor([1.0, 3.0, 0.0, 2.0, -9.0])
EVEN = (torch.arange(10_000) + 0.5) / 10_000  # what uniform numbers are like


def shares(choice: Sampling) -> torch.Tensor:
    drawn = choice.take(Z.expand(len(EVEN), -1), EVEN)
    return torch.bincount(drawn, minlength=len(Z)) / len(EVEN)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature: float) -> None:
    torch.testing.assert_close(shares(Sampling(temperature)), (Z / temperature).softmax(-1), atol=2e-4, rtol=0)


def test_only_the_likeliest_tokens_that_together_reach_top_p_are_drawn() -> None:
    p = Z.softmax(-1)  # 0.09, 0.64, 0.03, 0.24, 0.00
    for top_p, kept in ((0.5, [1]), (0.8, [1, 3]), (0.95, [0, 1, 3])):
        want = torch.zeros_like(p).index_copy(0, torch.tensor(kept), p[kept]) / p[kept].sum()
        torch.testing.assert_close(shares(Sampling(1.0, top_p)), want, atol=2e-4, rtol=0)


def test_without_a_temperature_the_likeliest_token_is_taken() -> None:
    assert shares(Sampling()).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("count", [-1, 10**12, 1.5, "3", None])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_number_of_tokens_that_cannot_be_is_refused_before_memory_is_taken(count: Any, temperature: float) -> None:
    lm = tiny_lm("llama")
    lm.model.config.max_position_embeddings = 10**15
    for ask in (lambda **s: generate(lm, "x", **s), lambda **s: list(stream(lm, "x", **s))):
        with pytest.raises(BadInput, match="max_new_tokens is"):
            ask(max_new_tokens=count, temperature=temperature)


def test_no_token_may_be_asked_for_and_any_batch_size() -> None:
    lm = tiny_lm("llama")
    assert generate(lm, "x", max_new_tokens=0) == ""
    assert generate(lm, ["x"], max_new_tokens=2, batch_size=0) == generate(lm, ["x"], max_new_tokens=2)


def test_numbers_that_are_not_drawn_take_no_memory() -> None:
    assert Sampling().numbers(1000, 1_000_000).untyped_storage().nbytes() == 4
    with pytest.raises(BadInput, match="max_new_tokens is 1000000"):
        Sampling(1.0).numbers(1000, 1_000_000)


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 2.0}]
)
def test_a_number_out_of_range_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(BadInput, match=f"{next(iter(settings))} is"):
        Sampling(**settings)  # type: ignore[arg-type]
