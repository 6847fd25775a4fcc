"""Blocks whose MLPs differ in width, as structured pruning leaves them, are models like any other."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from lmpatch.doctor import examine, footprint
from lmpatch.errors import UnknownLayout
from lmpatch.inference.forward import blocks, positions
from lmpatch.inference.generate import generate
from lmpatch.inference.replay import record
from lmpatch.inference.score import score
from lmpatch.inference.tokens import encode
from lmpatch.locate.activations import activations
from lmpatch.locate.covariance import estimate_covariance
from lmpatch.locate.neurons import drawn
from lmpatch.models.discover import discover
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap
from lmpatch.patches.ledger import apply
from lmpatch.registry import get

WIDTHS = (96, 64, 160, 32)  # the second is as wide as the model
PROMPTS = ["The Eiffel Tower is in", "Apple", "The mother tongue of Danielle Darrieux is"]


def pruned(heads: int = 4) -> Any:
    """A tiny Llama with MLPs of these widths, and so many heads in its last block instead of four."""
    model = tiny_model("llama")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for layer, width in zip(model.model.layers, WIDTHS, strict=True):
            config = copy.deepcopy(model.config)
            config.intermediate_size = width
            layer.mlp = LlamaMLP(config)
        attention, width = model.model.layers[-1].self_attn, heads * 16
        attention.num_key_value_groups = heads // 2
        attention.q_proj, attention.o_proj = nn.Linear(64, width, bias=False), nn.Linear(width, 64, bias=False)
        for layer in model.model.layers:
            for parameter in layer.mlp.parameters():
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


@cache
def _lm() -> LM:
    return wrap(pruned(), tiny_tokenizer(), name="pruned")


@pytest.mark.parametrize("heads", [4, 2])
def test_blocks_of_different_widths_and_heads_are_found(heads: int) -> None:
    layout = discover(pruned(heads), tiny_tokenizer())
    assert layout.widths == WIDTHS
    assert (
        layout.downs[1] == "model.layers.1.mlp.down_proj" and layout.attn_outs[3] == "model.layers.3.self_attn.o_proj"
    )
    with pytest.raises(UnknownLayout, match="theirs are 96, 64, 160, 32"):
        _ = layout.d_ff


def test_a_layout_by_hand_names_a_width_for_each_block() -> None:
    from dataclasses import replace

    lm = _lm()
    with pytest.raises(UnknownLayout, match="4 blocks and 3 widths"):
        wrap(lm.model, lm.tokenizer, layout=replace(lm.layout, widths=WIDTHS[:3]))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("heads", [4, 2])
def test_it_is_scored_generated_and_replayed(heads: int) -> None:
    lm = wrap(pruned(heads), tiny_tokenizer())
    rows = [encode(lm, prompt, "Rome") for prompt in PROMPTS]
    for row, got in zip(rows, score(lm, PROMPTS, ["Rome"] * 3), strict=True):
        logp = lm.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        want = [float(logp[t - 1, row.ids[t]]) for t in range(row.target, len(row.ids))]
        assert got.logprobs == pytest.approx(want, abs=1e-4)
    assert generate(lm, PROMPTS, max_new_tokens=5) == [generate(lm, p, max_new_tokens=5) for p in PROMPTS]
    recording = record(lm, [row.ids for row in rows], [2, 1, 3])
    assert [recording.keys[i].shape[1] for i in range(4)] == list(WIDTHS)
    replayed = recording.forward(recording.hidden[1], 1)
    for i, (row, t) in enumerate(zip(rows, [2, 1, 3], strict=True)):
        ids = torch.tensor([row.ids])
        want = blocks(lm, ids, torch.ones_like(ids), position_ids=positions(torch.ones_like(ids)))[0, t:]
        assert (replayed[i, : len(want)] - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["rome", "r_rome", "memit", "finetune", "ircan", "scone", "param_mute", "iti", "parenting"]
)
def test_methods_edit_it_and_removal_gives_every_bit_back(name: str) -> None:
    lm = wrap(pruned(), tiny_tokenizer(), name="pruned")
    method, ids = get("methods", name), torch.tensor([[1, 40, 50, 60]])
    clean, print_before = lm.model(ids).logits, lm.fingerprint()
    records, cfg = method.example(lm)
    patch = method.fit(lm, records, cfg)
    assert method.estimate(lm, len(records), cfg) > 0
    assert lm.fingerprint() == print_before
    with apply(lm, patch):
        assert not torch.equal(lm.model(ids).logits, clean)
    assert torch.equal(lm.model(ids).logits, clean)


def test_iti_says_what_it_needs_where_blocks_differ_in_heads() -> None:
    lm, method = wrap(pruned(2), tiny_tokenizer()), get("methods", "iti")
    with pytest.raises(UnknownLayout, match="64, 64, 64, 32 numbers, which are no 4 heads"):
        method.fit(lm, *method.example(lm))


@pytest.mark.slow
def test_the_doctor_examines_it() -> None:
    lm = _lm()
    assert all(finding.holds for finding in examine(lm)) and footprint(lm)


@pytest.mark.slow
def test_second_moments_and_activations_have_their_blocks_width() -> None:
    lm = _lm()
    c = estimate_covariance(lm, [0, 3], text=["Rome is old. " * 40] * 60, tokens=4096, cache=False).c
    assert {layer: tuple(x.shape) for layer, x in c.items()} == {0: (96, 96), 3: (32, 32)}
    assert activations(lm) == [f"model.layers.{i}.mlp.act_fn" for i in range(4)]


def test_neurons_drawn_at_random_are_all_there_and_each_once() -> None:
    neurons = [(n.layer, n.index) for n in drawn(_lm(), sum(WIDTHS), seed=0)]
    assert sorted(neurons) == [(i, k) for i in range(4) for k in range(WIDTHS[i])]


@pytest.mark.slow
def test_a_narrow_blocks_missing_neurons_are_never_named() -> None:
    from lmpatch.probes.integrated_gradients import probe

    lm = _lm()
    every = sum(WIDTHS)
    scores = probe.run(lm, probe.examples(), probe.Config(steps=2, threshold=0.0, top=4 * max(WIDTHS)))
    for credit in scores.records:
        assert len(credit.neurons) <= every and all(index < WIDTHS[layer] for layer, index, _ in credit.neurons)
