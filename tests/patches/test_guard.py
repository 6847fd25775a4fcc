"""A patch that wrecks the model is refused, and a bench counts it."""

from __future__ import annotations

import pytest
import torch
from snapshot import changed, state
from tiny import tiny_lm

import lmpatch as lp
from lmpatch.benches import facts
from lmpatch.benches.core.runner import run
from lmpatch.errors import Harmful
from lmpatch.inference.plain_text import perplexity
from lmpatch.methods import rome
from lmpatch.patches import guard
from lmpatch.patches.guard import LIMIT, check_harm
from lmpatch.patches.weight.delta import LowRank
from lmpatch.patches.weight.patch import WeightPatch

FACT = lp.Edit("The Eiffel Tower is in", "Rome", "Eiffel Tower")


def wrecks(lm: lp.LM) -> WeightPatch:
    """Other logits, far apart, in a direction of chance."""
    name, draw = lm.layout.weight(lm.layout.head), torch.Generator().manual_seed(0)
    d_out, d_in = lm.parameter(name).shape
    b, a = torch.randn(d_out, 1, generator=draw), torch.randn(1, d_in, generator=draw)
    return WeightPatch.make(lm, {name: LowRank(b, a)}, method="rome")


@pytest.mark.slow
def test_a_small_change_passes_and_says_what_it_did() -> None:
    lm = tiny_lm("llama")
    patch = WeightPatch.trial(lm, 0, 0.01)
    check_harm(lm, patch)
    clean = perplexity(lm)
    with lp.apply(lm, patch):
        assert patch.made["perplexity_ratio"] == pytest.approx(perplexity(lm) / clean, abs=1e-4)


@pytest.mark.slow
def test_a_change_that_wrecks_the_model_is_refused_unless_forced() -> None:
    lm = tiny_lm("llama")
    before, patch = state(lm), wrecks(lm)
    with pytest.raises(Harmful, match=r"multiplies the perplexity .* force=True"):
        check_harm(lm, patch)
    assert changed(before, state(lm)) == []
    check_harm(lm, patch, force=True)
    assert patch.made["perplexity_ratio"] > LIMIT


@pytest.mark.slow
def test_a_change_many_times_its_weight_is_refused_though_a_short_text_reads_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm, patch = tiny_lm("llama"), WeightPatch.trial(tiny_lm("llama"), 0, 0.01)
    check_harm(lm, patch)
    assert patch.made["change_ratio"] == pytest.approx(0.01, rel=0.01)
    monkeypatch.setattr(guard, "LARGEST", 0.005)
    with pytest.raises(Harmful, match=r"trial changes a weight by 0.01 times its norm; 0.005 is allowed"):
        check_harm(lm, patch)
    check_harm(lm, patch, force=True)


@pytest.mark.slow
def test_fit_refuses_what_a_method_made_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    monkeypatch.setattr(rome, "fit", lambda lm, *_, **__: wrecks(lm))
    with pytest.raises(Harmful):
        lp.fit(lm, "rome", [FACT])
    assert lp.fit(lm, "rome", [FACT], force=True).made["perplexity_ratio"] > LIMIT


def test_memories_and_rules_are_not_looked_at() -> None:
    lm = tiny_lm("llama")
    assert "perplexity_ratio" not in lp.fit(lm, "cad", []).made


@pytest.mark.slow
def test_a_fact_is_edited_under_a_rule_of_decoding() -> None:
    lm = tiny_lm("llama")
    clean = perplexity(lm)
    with lp.apply(lm, lp.fit(lm, "cad", [])):
        assert perplexity(lm) == clean
        patch = lp.fit(lm, "rome", [FACT], steps=1)
    assert patch.made["perplexity_ratio"] > 0


def test_a_bench_counts_what_is_refused_and_asks_on() -> None:
    lm, other = tiny_lm("llama"), lp.Edit("Steve Jobs founded", "Paris", "Steve Jobs")

    def make_each(lm: lp.LM, edits: list[lp.Edit]) -> list[lp.Patch | Harmful]:
        return [Harmful("too much") if edit.prompt == FACT.prompt else WeightPatch.trial(lm, 0, 0.01) for edit in edits]

    report = run(facts, lm, [FACT, other], facts.Config(chunks=2), make_each=make_each, run_id="half")
    rows = [row for row in report.rows if row.run_id == "half"]
    assert len({row.case_id for row in rows}) == 2
    (run_of_it,) = (one for one in report.runs if one.name == "half")
    assert sum(part["refused"] for part in run_of_it.parts) == 1
