"""r-ROME uses one key throughout, and is ROME where there is only one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_lm

from lmpatch.methods import rome
from lmpatch.methods.rome import pairs, r_rome
from lmpatch.models.lm import LM

EDITS, CFG = r_rome.example(tiny_lm("llama"))
ROME = rome.Config(**{k: v for k, v in vars(CFG).items() if k != "anchor"} | {"key": "bare"})


def change(patch: object) -> torch.Tensor:
    (delta,) = patch.deltas.values()
    return (delta.b @ delta.a).double()  # [d, f]


@pytest.mark.slow
def test_with_a_single_prefix_r_rome_is_rome(lm: LM) -> None:
    bare = {"short_prefixes": 0, "long_prefixes": 0}
    ours, theirs = r_rome.fit(lm, EDITS, replace(CFG, **bare)), rome.fit(lm, EDITS, replace(ROME, **bare))
    torch.testing.assert_close(change(ours), change(theirs), atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_r_rome_and_rome_differ_with_prefixes(lm: LM) -> None:
    assert (change(r_rome.fit(lm, EDITS, CFG)) - change(rome.fit(lm, EDITS, ROME))).norm() > 1e-3


def test_romes_default_is_the_consistent_key_and_the_released_form_is_a_setting(lm: LM) -> None:
    ours = change(r_rome.fit(lm, EDITS[:1], CFG))
    assert torch.equal(change(rome.fit(lm, EDITS[:1], replace(ROME, key="mean"))), ours)
    bare = change(rome.fit(lm, EDITS[:1], ROME))
    assert (bare - ours).norm() > 1e-3
    assert torch.equal(
        pairs(lm, EDITS[:1], replace(ROME, key="mean", faithful=True)).key, pairs(lm, EDITS[:1], ROME).key
    )


@pytest.mark.slow
def test_the_mean_key_divides_and_directs(lm: LM) -> None:
    p = pairs(lm, EDITS[:1], CFG)
    gain = p.residual[0] / (p.key[0] @ p.direction[0])
    torch.testing.assert_close(
        change(r_rome.fit(lm, EDITS[:1], CFG)), torch.outer(gain, p.direction[0]), atol=1e-5, rtol=1e-4
    )


@pytest.mark.slow
def test_the_mean_anchor_counts_delta_from_the_mean_keys_output(lm: LM) -> None:
    clean, mean = (pairs(lm, EDITS, replace(CFG, anchor=anchor)) for anchor in ("clean", "mean"))
    module = lm.module(lm.layout.downs[CFG.layer])
    with torch.no_grad():
        at_mean = module(mean.key.float()).double()
        bare = pairs(lm, EDITS, ROME)
        at_bare = module(bare.key.float()).double()
    torch.testing.assert_close(mean.residual - clean.residual, at_mean - at_bare, atol=1e-4, rtol=1e-3)
