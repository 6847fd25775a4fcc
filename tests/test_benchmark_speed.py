"""benchmarks/speed.py: the work of a search is counted as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_lm

import lmpatch as lp
from lmpatch.inference.forward import head_loss
from lmpatch.methods import rome

EDITS = [
    lp.Edit("The Eiffel Tower is in", "Rome", "Eiffel Tower"),
    lp.Edit("Steve Jobs founded", "Paris", "Steve Jobs"),
]


def test_products_of_a_backward_pass_inside_another_are_counted(script: Any) -> None:
    lm = tiny_lm("llama")
    n, d, vocab = 7, lm.layout.d_model, lm.layout.vocab
    leaf = torch.randn(n, d, requires_grad=True)
    with script("speed").Flops() as counter:
        loss = head_loss(lm, leaf, lambda z, _: z.logsumexp(-1)).sum()
        torch.autograd.grad(loss, leaf)
    assert counter.total == 2 * (2 * n * d * vocab)  # logits, and their gradient at the states


def test_a_search_is_told_as_a_share_of_products_alone_and_in_a_batch(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = script("speed")
    monkeypatch.setattr(speed, "LAYER", 1)
    monkeypatch.setattr(speed, "product_rate", lambda *_: 1e9)
    found = speed.timed_share(tiny_lm("gemma3"), EDITS, rome.Config(steps=2))
    for part, facts in (("single", 1), ("batched", 2)):
        row = found[part]
        assert row["facts"] == facts and row["gflop_per_fact"] > 0
        assert row["share_of_gemm"] == pytest.approx(row["gflop_per_fact"] / row["s_per_fact"])  # of 1 GFLOP/s
