"""Draws follow the distribution they are from."""

from __future__ import annotations

import pytest
import torch

from lmpatch.errors import BadInput
from lmpatch.inference.generate import Sampling

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


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 2.0}]
)
def test_a_number_out_of_range_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(BadInput, match=f"{next(iter(settings))} is"):
        Sampling(**settings)  # type: ignore[arg-type]
