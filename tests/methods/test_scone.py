"""SCoNE keeps neurons whose credit is high and depends on the context."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_lm
from torch import Tensor

from lmpatch.data.context import ContextRecord
from lmpatch.errors import BadInput
from lmpatch.locate.neurons import ranked
from lmpatch.methods import scone
from lmpatch.methods.ircan import method as ircan
from lmpatch.models.lm import LM
from lmpatch.models.units import Neuron
from lmpatch.probes.integrated_gradients.probe import attributions, cases

TWO, CFG = scone.example(tiny_lm("llama"))
RECORDS = [
    *TWO,
    ContextRecord("The capital of Japan is Seattle.", "What is the capital of Japan?", "Seattle", "Tokyo"),
    ContextRecord("The mother tongue of Steve Jobs is French.", "Steve Jobs speaks", "French"),
    ContextRecord("The Colosseum is in Tokyo.", "The Colosseum is in", "Tokyo", "Rome"),
]
CFG = replace(CFG, window=2, pool=10)


def brute_force(credits: list[Tensor], cfg: scone.Config) -> list[set[tuple[int, int]]]:
    """Candidates of each record, one number at a time."""
    found = []
    for t, credit in enumerate(credits):
        before = credits[max(0, t - cfg.window) : t]
        scored = []
        for layer in range(credit.shape[0]):
            for i in range(credit.shape[1]):
                score = float(credit[layer, i])
                if score > 0 and before:
                    mean = sum(float(b[layer, i]) for b in before) / len(before)
                    scored.append((score, abs(score - mean), (layer, i)))
        by_credit = {place for _, _, place in sorted(scored, reverse=True)[: cfg.pool]}
        by_variation = {place for _, _, place in sorted(scored, key=lambda x: -x[1])[: cfg.pool]}
        found.append(by_credit & by_variation)
    return found


def all_credits(lm: LM, cfg: scone.Config) -> list[Tensor]:
    return [credit for part in attributions(lm, cases(lm, RECORDS), cfg) for credit in part.scores]


def test_candidates_are_those_of_a_loop_over_every_number(lm: LM) -> None:
    got = list(scone.named(all_credits(lm, CFG), CFG))
    want = brute_force(all_credits(lm, CFG), CFG)
    assert [{(layer, i) for layer, i, _ in named} for named in got] == want
    assert got[0] == []
    assert any(want)


@pytest.mark.slow
def test_the_order_of_the_records_matters_and_a_run_repeats(lm: LM) -> None:
    cfg = replace(CFG, neurons=8)
    first = scone.fit(lm, RECORDS, cfg)
    assert first.hash() == scone.fit(lm, RECORDS, cfg).hash()
    assert first.notes != scone.fit(lm, RECORDS[::-1], cfg).notes


@pytest.mark.slow
def test_credit_alone_is_ircans_counting(lm: LM) -> None:
    cfg = replace(CFG, candidates="credit")
    same = ircan.Config(steps=cfg.steps, weighting="path", threshold=0.0, top=cfg.pool, neurons=cfg.neurons)
    assert scone.fit(lm, RECORDS, cfg).notes["neurons"] == ircan.fit(lm, RECORDS, same).notes["neurons"]


def test_a_neuron_that_is_always_on_is_rejected_and_a_selective_one_kept() -> None:
    noise = torch.Generator().manual_seed(0)
    cfg = scone.Config(pool=3)
    named = []
    before: list[Tensor] = []
    for t in range(8):
        credit = 0.01 * torch.rand(2, 20, generator=noise)
        credit[0, 4] = 1.0  # on for every record
        credit[1, 7] = 0.9 * (t % 4 == 3)  # on for some
        varied = (credit - torch.stack(before[-3:]).mean(0)).abs() if before else None
        named.append(scone.candidates(credit, varied, cfg))
        before.append(credit)
    order = [neuron for neuron, _ in ranked(named)]
    assert Neuron(1, 7) in order
    assert Neuron(0, 4) not in order
    always = scone.Config(pool=3, candidates="credit")
    assert (0, 4, 1.0) in scone.candidates(before[0], None, always)


def test_variation_alone_names_what_changed_most_among_positive_credits() -> None:
    credit = torch.tensor([[0.5, 0.4, -0.9, 0.3]])
    varied = torch.tensor([[0.0, 0.2, 0.9, 0.1]])
    found = scone.candidates(credit, varied, scone.Config(pool=1, candidates="variation"))
    assert [(layer, i) for layer, i, _ in found] == [(0, 1)]


def test_settings_and_records_that_make_no_sense_are_refused(lm: LM) -> None:
    with pytest.raises(BadInput, match="window is 0"):
        scone.fit(lm, RECORDS, replace(CFG, window=0))
    with pytest.raises(BadInput, match="neurons is 0"):
        scone.fit(lm, RECORDS, replace(CFG, neurons=0))
    with pytest.raises(BadInput, match="none of 1 records names a neuron"):
        scone.fit(lm, RECORDS[:1], CFG)  # nothing to compare the first one with
    with pytest.raises(BadInput, match="name .* neurons, and 500 are to be scaled"):
        scone.fit(lm, RECORDS, replace(CFG, neurons=500))


def test_its_memory_holds_the_window() -> None:
    lm = tiny_lm("llama")
    assert scone.estimate(lm, 2, replace(CFG, window=100)) > scone.estimate(lm, 2, CFG)


def test_a_pool_larger_than_the_positive_credits_takes_no_other() -> None:
    credit = torch.tensor([[0.5, -0.4, 0.0, 0.3]])
    found = scone.candidates(credit, credit.abs(), scone.Config(pool=4))
    assert [(layer, i) for layer, i, _ in found] == [(0, 0), (0, 3)]
