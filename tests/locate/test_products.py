"""Products in bf16: where they act, that they end, and that they are chosen by a measurement."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from tiny import tiny_lm
from torch.nn import functional as F

from lmpatch.locate import products as _products
from lmpatch.locate.products import products
from lmpatch.locate.value_search import search
from lmpatch.methods import rome
from lmpatch.models.lm import LM

EDITS, CFG = rome.example(tiny_lm("llama"))


def answer(lm: LM) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor([[1, 5, 9, 13]])).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_multiply_in_bf16_inside_and_exactly_outside(family: str) -> None:
    lm = tiny_lm(family)
    before = answer(lm)
    with products(lm, "bf16"):
        inside = answer(lm)
        x, w = torch.randn(3, 8), torch.randn(5, 8)
        assert torch.equal(F.linear(x, w), x @ w.T)  # no weight of a block
    assert not torch.equal(inside, before)
    assert (inside - before).norm() < 0.05 * before.norm()
    assert torch.equal(answer(lm), before)


def test_auto_takes_what_the_measurement_says_and_bf16_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lm, before = tiny_lm("llama"), answer(tiny_lm("llama"))
    for gain, exact in ((0.2, True), (5.0, False)):
        monkeypatch.setattr(_products, "bf16_gain", lambda device, gain=gain: gain)
        with products(lm, "auto"):
            assert torch.equal(answer(lm), before) == exact
    monkeypatch.setattr(_products, "bf16_gain", lambda device: 0.1)
    with caplog.at_level(logging.WARNING), products(lm, "bf16"):
        pass
    assert "10.0 times slower" in caplog.text


def test_the_measurement_is_a_ratio_of_seconds() -> None:
    assert _products.bf16_gain("cpu", 16, 16) > 0


@pytest.mark.slow
def test_a_search_in_bf16_ends_near_the_exact_one(lm: LM) -> None:
    exact, rounded = (search(lm, EDITS, [1], replace(CFG, steps=6, products=kind)) for kind in ("model", "bf16"))
    assert (F.cosine_similarity(exact.delta, rounded.delta, dim=-1) > 0.9).all()
    assert rounded.loss == pytest.approx(exact.loss, abs=0.1)
