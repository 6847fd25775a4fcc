"""WilKE writes each fact where it fits best, and its quick ranking is the slow one's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from snapshot import changed, state
from tiny import real_gemma, tiny_lm

from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput, Contradiction, LayerOutOfRange, SubjectNotFound
from lmpatch.inference.generate import generate
from lmpatch.methods import rome, wilke
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import apply

EDITS, CFG = wilke.example(tiny_lm("llama"))
FULL = replace(CFG, rank="full", layers=(0, 1, 2))


def change(patch: object) -> torch.Tensor:
    (delta,) = patch.deltas.values()
    return (delta.b @ delta.a).double()  # [d, f]


def at(layer: int) -> rome.Config:
    """ROME's settings of these tests, at that block."""
    return rome.Config(layer=layer, steps=3, moment_tokens=2048, short_prefixes=1, long_prefixes=0)


def slow(lm: LM, edit: Edit, layers: tuple[int, ...]) -> list[float]:
    """ROME fitted and written out at each block: the norm of its change over the weight's."""
    scores = []
    for layer in layers:
        weight = lm.parameter(lm.layout.weight(lm.layout.downs[layer])).detach().double()
        scores.append(float(change(rome.fit(lm, [edit], at(layer))).norm() / weight.norm()))
    return scores


@pytest.mark.slow
def test_the_block_is_the_one_where_romes_written_change_is_smallest(lm: LM) -> None:
    ranks = wilke.ranking(lm, EDITS, FULL)
    for i, edit in enumerate(EDITS):
        scores = slow(lm, edit, FULL.layers)
        torch.testing.assert_close(ranks.scores[i], torch.tensor(scores).double(), atol=1e-5, rtol=1e-4)
        assert ranks.best[i] == FULL.layers[scores.index(min(scores))]
        patch = wilke.fit(lm, [edit], FULL)
        assert patch.notes["layers"] == [ranks.best[i]]
        torch.testing.assert_close(change(patch), change(rome.fit(lm, [edit], at(ranks.best[i]))), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_papers_score_divides_by_the_keys_squared_length(lm: LM) -> None:
    cfg = replace(FULL, score="activation")
    ranks = wilke.ranking(lm, EDITS[:1], cfg)
    for place, layer in enumerate(FULL.layers):
        p, weight = rome.pairs(lm, EDITS[:1], at(layer)), lm.parameter(lm.layout.weight(lm.layout.downs[layer]))
        wanted = p.residual[0].norm() * weight.detach().double().norm() ** 2 / p.key[0].norm() ** 2
        torch.testing.assert_close(ranks.scores[0, place], wanted, atol=1e-4, rtol=1e-4)


def test_one_candidate_block_is_rome_there(lm: LM) -> None:
    patch = wilke.fit(lm, EDITS[:1], replace(CFG, layers=(1,)))
    torch.testing.assert_close(change(patch), change(rome.fit(lm, EDITS[:1], at(1))), atol=1e-5, rtol=1e-4)


def test_no_weight_changes_while_blocks_are_ranked(lm: LM) -> None:
    before = state(lm)
    wilke.ranking(lm, EDITS, CFG)
    assert changed(before, state(lm)) == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["bare", "full"])
def test_fits_in_one_batch_equal_fits_one_by_one(lm: LM, rank: str) -> None:
    cfg = replace(CFG, rank=rank)
    for edit, patch in zip(EDITS, wilke.fit_each(lm, EDITS, cfg), strict=True):
        alone = wilke.fit(lm, [edit], cfg)
        assert patch.notes["layers"] == alone.notes["layers"] and patch.deltas.keys() == alone.deltas.keys()
        torch.testing.assert_close(change(patch), change(alone), atol=1e-4, rtol=1e-3)
        assert [e["prompt"] for e in patch.edits] == [edit.prompt]


@pytest.mark.slow
def test_facts_of_several_blocks_are_each_written_under_the_writes_below(
    lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wilke.Ranking, "best", property(lambda self: [1, 2]))
    patch = wilke.fit(lm, EDITS, CFG)
    names = [lm.layout.weight(lm.layout.downs[layer]) for layer in (1, 2)]
    assert list(patch.deltas) == names
    below = rome.fit(lm, EDITS[:1], at(1))
    with apply(lm, below, mount="side"):
        above = rome.fit(lm, EDITS[1:], at(2))
    delta = patch.deltas[names[1]]
    torch.testing.assert_close((delta.b @ delta.a).double(), change(above), atol=1e-5, rtol=1e-4)


def test_bad_input_is_refused_before_any_work(lm: LM) -> None:
    with pytest.raises(LayerOutOfRange, match=r"0\.\.3"):
        wilke.fit(lm, EDITS, replace(CFG, layers=(1, 9)))
    with pytest.raises(BadInput, match="no layers"):
        wilke.fit(lm, EDITS, replace(CFG, layers=()))
    with pytest.raises(BadInput, match="rank_steps"):
        wilke.fit(lm, EDITS, replace(CFG, rank_steps=0))
    with pytest.raises(SubjectNotFound, match="Louvre"):
        wilke.fit(lm, [Edit("The Eiffel Tower is in", subject="Louvre", target="Rome")], CFG)
    with pytest.raises(Contradiction, match="Rome.*Oslo"):
        wilke.fit(lm, [EDITS[0], Edit(EDITS[0].prompt, subject="Eiffel Tower", target="Oslo")], CFG)


@pytest.mark.real
def test_gemma_states_the_new_fact_and_forgets_it_again() -> None:
    lm = real_gemma()
    edit = Edit("The Eiffel Tower is located in the city of", subject="Eiffel Tower", target="Rome")
    before = generate(lm, edit.prompt, max_new_tokens=4)
    patch = wilke.fit(lm, [edit], wilke.Config(short_prefixes=1, long_prefixes=1, covariance=False))
    with apply(lm, patch):
        assert generate(lm, edit.prompt, max_new_tokens=4).strip().startswith("Rome")
    assert generate(lm, edit.prompt, max_new_tokens=4) == before
