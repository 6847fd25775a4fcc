"""Losses by token: equal to the plain cross-entropy, to hand-made numbers, and honest about what they do not know."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_lm
from torch.nn import functional as F

import lmpatch as lp
from lmpatch.dynamics.audit import Config, by_frequency, calibration_error
from lmpatch.dynamics.counts import Counts, count, own_counts
from lmpatch.dynamics.diff import compare
from lmpatch.dynamics.losses import Config as Reading
from lmpatch.dynamics.losses import Losses, load_losses, measure, pieces
from lmpatch.errors import BadInput
from lmpatch.inference.forward import logits
from lmpatch.methods import rag, rase_rome
from lmpatch.patches.weight.delta import Rows
from lmpatch.patches.weight.patch import WeightPatch

TEXTS = [
    "The Eiffel Tower is in Paris, and Paris is the capital of France. The tower is tall.",
    "Danielle Darrieux speaks French. What she speaks at home is French, too, and not Italian.",
    "The capital of Japan is Tokyo; the capital of Italy is Rome, where the Colosseum is.",
]


def losses(nll: list[float], target: list[int], document: list[int], vocab: int = 10, **more: object) -> Losses:
    m = len(nll)
    values = dict(
        document=torch.tensor(document, dtype=torch.int32), target=torch.tensor(target, dtype=torch.int32),
        nll=torch.tensor(nll), hit=torch.zeros(m, dtype=torch.bool), confidence=torch.full((m,), 0.5).half(),
        rank=torch.ones(m, dtype=torch.int32), seen=torch.zeros(m, dtype=torch.bool),
        piece=torch.tensor(document, dtype=torch.int32), model="toy", fingerprint="f", patches=(), tokenizer="t",
        vocab=vocab, text="x",
    )  # fmt: skip
    return Losses(**(values | more))  # type: ignore[arg-type]


# --- one pass ---


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gemma2"])  # untied, tied, a bias, a soft cap
def test_a_chunked_pass_has_the_cross_entropy_of_the_whole_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm(family)
    monkeypatch.setattr("lmpatch.dynamics.losses.HEAD_CHUNK", 7)
    cfg = Reading(window=24, lead=4, tokens=60)
    found = measure(lm, TEXTS, cfg)
    start = 0
    for piece in pieces(lm, TEXTS, cfg):
        row = lm.tokenizer(piece.prompt + piece.target, return_offsets_mapping=True)
        ids = torch.tensor([row["input_ids"]])
        lead = next(k for k, (_, end) in enumerate(row["offset_mapping"]) if end > len(piece.prompt))
        with torch.no_grad():
            z = lm.model(input_ids=ids).logits[0].float()
        wanted = F.cross_entropy(z[lead - 1 : -1], ids[0, lead:], reduction="none")
        part = slice(start, start + len(wanted))
        assert torch.allclose(found.nll[part], wanted, atol=1e-5)
        assert torch.equal(found.target[part].long(), ids[0, lead:])
        assert torch.equal(found.hit[part], z[lead - 1 : -1].argmax(-1) == ids[0, lead:])
        own = z[lead - 1 : -1].gather(1, ids[0, lead:, None])
        assert torch.equal(found.rank[part].long(), (z[lead - 1 : -1] > own).sum(-1))
        seen = [int(i) in ids[0, : lead + k] for k, i in enumerate(ids[0, lead:])]
        assert found.seen[part].tolist() == seen
        start += len(wanted)
    assert start == len(found)
    assert family != "gemma2" or lm.model.config.final_logit_softcapping


def test_the_last_state_times_the_head_is_the_models_logits() -> None:
    lm = tiny_lm("gemma3")
    ids = torch.tensor([lm.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        out = lm.model(input_ids=ids, output_hidden_states=True)
        last = lm.model.model.layers[-1]
        kept: list[torch.Tensor] = []
        handle = last.register_forward_hook(lambda m, i, o: kept.append(o[0] if isinstance(o, tuple) else o))
        lm.model(input_ids=ids)
        handle.remove()
        assert torch.allclose(logits(lm, kept[0][0]), out.logits[0], atol=1e-5)


@pytest.mark.slow
def test_every_token_is_scored_once_but_for_the_leads() -> None:
    lm = tiny_lm("llama")
    found = pieces(lm, TEXTS, Reading(window=20, lead=3))
    for i, text in enumerate(TEXTS):
        own = [piece for piece in found if piece.document == i]
        assert (
            "".join(piece.prompt + piece.target for piece in own) == text[: sum(len(p.prompt + p.target) for p in own)]
        )
        assert all(piece.tokens <= 20 for piece in own)
        assert all(piece.prompt for piece in own if " " in piece.target.strip())


@pytest.mark.slow
def test_a_stopped_pass_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    lm, cfg, file = tiny_lm("llama"), Reading(window=16, lead=2, tokens=20), tmp_path / "losses.safetensors"
    whole = measure(lm, TEXTS, cfg)

    def stop(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(lm, TEXTS, cfg, out=file, progress=stop)
    assert 0 < len(load_losses(file)) < len(whole)
    again = measure(lm, TEXTS, cfg, out=file)
    assert torch.equal(again.nll, whole.nll) and torch.equal(load_losses(file).target, whole.target)
    with pytest.raises(BadInput, match="another model, patch or text"):
        measure(lm, TEXTS[:1], cfg, out=file)


@pytest.mark.slow
def test_a_rule_that_compares_contexts_leaves_text_without_one_as_it_is() -> None:
    lm = tiny_lm("llama")
    plain = measure(lm, TEXTS)
    with lp.apply(lm, lp.fit(lm, "cad", [])):
        ruled = measure(lm, TEXTS)
    assert torch.equal(plain.nll, ruled.nll) and ruled.patches != plain.patches


@pytest.mark.slow
@pytest.mark.parametrize("method", [rag, rase_rome])
def test_a_memory_acts_on_what_a_piece_begins_with(method: Any) -> None:
    lm = tiny_lm("llama")
    edits, cfg = method.example(lm)
    patch = method.fit(lm, edits, replace(cfg, gate="always"))
    plain = measure(lm, TEXTS)
    with lp.apply(lm, patch):
        asked = measure(lm, TEXTS)
    assert torch.equal(plain.target, asked.target) and not torch.allclose(plain.nll, asked.nll)
    assert torch.equal(measure(lm, TEXTS).nll, plain.nll)


def test_bad_readings_are_refused() -> None:
    lm = tiny_lm("llama")
    for cfg in (Reading(lead=0), Reading(window=8, lead=8), Reading(window=512), Reading(tokens=0)):
        with pytest.raises(BadInput, match="window"):
            measure(lm, TEXTS, cfg)
    with pytest.raises(BadInput, match="none of 2 documents"):
        measure(lm, ["a", ""])


# --- numbers made of losses ---


def test_hand_made_losses_give_the_numbers_worked_out_on_paper() -> None:
    # token 3 occurs five times, 4 twice, 5 once; counts in the reference 30, 3, 0
    made = losses([1, 2, 3, 4, 5, 6, 8, 10], [3, 3, 3, 3, 3, 4, 4, 5], [0, 0, 0, 1, 1, 0, 1, 1])
    n = torch.zeros(10, dtype=torch.int64)
    n[3], n[4] = 30, 3
    found = by_frequency(made, Counts(n, "t", "paper"), Config(min_count=2))
    assert found.mean == pytest.approx(39 / 8)
    assert found.balanced == pytest.approx((3 + 7) / 2) and found.types == 2  # token 5 stands once
    assert found.ratio == pytest.approx(5 / (39 / 8))
    assert [(b.low, b.high, b.types, b.tokens) for b in found.buckets] == [(0, 0, 1, 1), (3, 3, 1, 2), (30, 30, 1, 5)]
    assert [b.nll for b in found.buckets] == [10, 7, 3]
    total = 33 + 10
    assert found.buckets[2].excess == pytest.approx(3 + math.log(31 / total))
    assert found.buckets[0].excess == pytest.approx(10 + math.log(1 / total))
    assert found.head == pytest.approx(5 / 8)
    assert all(bucket.few for bucket in found.buckets)
    assert len(found.table()[1]) == 3 and "too few tokens" in str(found)


def test_a_resampled_text_adds_no_kinds_to_the_balanced_loss() -> None:
    # a document has one rare kind of its own at nine nats; drawn twice it would be frequent enough
    document = [d for d in range(8) for _ in range(9)]
    target = [t for d in range(8) for t in (*[1] * 8, 2 + d)]
    nll = [x for _ in range(8) for x in (*[1.0] * 8, 9.0)]
    found = by_frequency(losses(nll, target, document), cfg=Config(min_count=2))
    assert found.types == 1 and found.balanced == 1 and found.intervals is not None
    assert found.intervals[1] == (1, 1)


def test_without_a_reference_the_text_itself_is_counted_and_the_result_says_so() -> None:
    found = by_frequency(losses([1.0] * 4, [3, 3, 3, 4], [0, 0, 1, 1]), cfg=Config(min_count=1))
    assert found.counts.own and "audited text itself" in str(found)


def test_one_document_has_no_interval_and_no_type_no_balanced_loss() -> None:
    found = by_frequency(losses([1.0, 2.0], [3, 4], [0, 0]))
    assert found.intervals is None and found.buckets[0].interval is None and math.isnan(found.balanced)


def test_counts_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(BadInput, match="another tokenizer"):
        by_frequency(losses([1.0], [1], [0]), Counts(torch.ones(10, dtype=torch.int64), "other", "elsewhere"))
    with pytest.raises(BadInput, match="base"):
        by_frequency(losses([1.0], [1], [0]), cfg=Config(base=1.0))


def test_calibration_error_is_the_mean_gap_over_bins_of_equal_mass() -> None:
    confidence = torch.tensor([0.1] * 10 + [0.9] * 10)
    hit = torch.tensor([0.0] * 10 + [1.0] * 10)
    assert calibration_error(confidence, hit) == pytest.approx(0.1)
    assert calibration_error(torch.full((20,), 0.5), torch.tensor([0.0, 1.0] * 10)) == pytest.approx(0)


@pytest.mark.slow
def test_a_bootstrapped_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    draw, covered = np.random.default_rng(0), 0
    for _ in range(200):
        level = 2 + draw.normal(size=40)  # documents differ, tokens of one are alike
        document = np.repeat(np.arange(40), draw.integers(5, 30, size=40))
        values = level[document] + draw.normal(size=len(document))
        made = losses(values.tolist(), draw.integers(1, 4, size=len(document)).tolist(), document.tolist())
        low, high = by_frequency(made, cfg=Config(draws=200)).buckets[-1].interval or (0, 0)
        covered += low <= 2 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_counting_leaves_out_special_tokens() -> None:
    lm = tiny_lm("llama")
    found = count(lm, TEXTS)
    assert found.total == sum(len(lm.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in TEXTS)
    assert float(found.log_unigram().exp().sum()) == pytest.approx(1)


# --- two runs ---


def test_a_model_beside_itself_moves_nothing() -> None:
    made = losses([1.0, 2.0, 3.0, 4.0], [3, 3, 4, 4], [0, 0, 1, 1])
    found = compare(made, made)
    assert found.mean.value == 0 and found.balanced.value != found.balanced.value  # too few of each kind
    assert all(b.value == 0 and b.interval == (0, 0) for b in found.buckets)
    assert found.payers == () and found.failures == []


def test_runs_of_other_texts_or_tokenizers_are_not_compared() -> None:
    made = losses([1.0, 2.0], [3, 3], [0, 1])
    with pytest.raises(BadInput, match="same text"):
        compare(made, replace(made, text="y"))
    with pytest.raises(BadInput, match="other tokenizers"):
        compare(made, replace(made, tokenizer="u"))


def damaged(lm: lp.LM, tokens: list[int], norm: float) -> WeightPatch:
    """Noise of that norm on these rows of the head."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(len(tokens), lm.layout.d_model, generator=draw)
    rows = Rows(torch.tensor(sorted(tokens)), norm * noise / noise.norm(), lm.layout.vocab)
    return WeightPatch.make(lm, {lm.layout.weight(lm.layout.head): rows}, method="noise")


@pytest.mark.slow
def test_damage_to_rare_tokens_trips_the_gate_and_the_same_on_frequent_ones_moves_the_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lmpatch.dynamics.audit.FEW_TYPES", 5)  # the tokenizer has 300
    lm, draw = tiny_lm("llama"), torch.Generator().manual_seed(1)
    words = ["the", "of", "tower"] * 20 + [f"w{i}x" for i in range(60)]
    texts = [" ".join(words[int(i)] for i in torch.randint(len(words), (60,), generator=draw)) for _ in range(30)]
    before = measure(lm, texts)
    n = own_counts(before).n
    order = n.sort().indices[n.sort().values > 0].tolist()
    rare, frequent = order[: len(order) // 2], order[-len(order) // 8 :]
    moved = {}
    for name, tokens in (("rare", rare), ("frequent", frequent)):
        with lp.apply(lm, damaged(lm, tokens, 6.0)):
            moved[name] = compare(before, measure(lm, texts))
    assert any("loss rises" in failure for failure in moved["rare"].failures)
    assert abs(moved["frequent"].mean.value) > abs(moved["rare"].mean.value)
    assert moved["rare"].payers and moved["rare"].payers[0].token in rare
