"""MEMIT spreads facts over layers, remembers earlier commits, and its options do what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from snapshot import Lines, changed, name, state
from tiny import real_gemma, tiny_lm

from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput, Contradiction
from lmpatch.inference.forward import blocks
from lmpatch.inference.generate import generate
from lmpatch.locate.covariance import estimate_covariance
from lmpatch.locate.solve import eigenvectors
from lmpatch.locate.value_search import search, texts_of
from lmpatch.methods import memit
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import apply
from lmpatch.patches.weight.patch import WeightPatch

EDITS, CFG = memit.example(tiny_lm("llama"))
LATER = [Edit("The Space Needle is in", subject="Space Needle", target="Tokyo")]
EXACT = replace(CFG, weight=1e-6, layers=(1,))


def change(patch: object, place: int = 0) -> torch.Tensor:
    delta = list(patch.deltas.values())[place]
    return (delta.b @ delta.a).double()


@pytest.mark.slow
def test_with_a_vanishing_weight_the_last_layer_inserts_all_that_is_left(lm: LM) -> None:
    cfg = replace(EXACT, spread="joint", long_prefixes=0)
    patch = memit.fit(lm, EDITS, cfg)
    keys = patch.extras["keys.1"].double()  # [u, f]
    values = search(lm, EDITS, [1], cfg)
    torch.testing.assert_close(change(patch) @ keys.T, values.delta[:, 0].T.double(), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_large_weight_writes_next_to_nothing(lm: LM) -> None:
    small, large = (change(memit.fit(lm, EDITS, replace(CFG, weight=w))).norm() for w in (1.0, 1e9))
    assert large < 1e-4 * small


def last_state(lm: LM, cfg: memit.Config) -> torch.Tensor:
    return memit.Reading(lm, EDITS, texts_of(lm, EDITS, cfg), 2, 2).at(2, whole=True)[2]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_residual_spread_brings_the_state_near_its_goal(family: str) -> None:
    lm = tiny_lm(family)
    cfg = replace(CFG, spread="residual", weight=1e-3, long_prefixes=0, clamp=0.3)
    values = search(lm, EDITS, [2], cfg, site="block")
    goal = values.clean[:, 0] + values.delta[:, 0]
    start = (goal - last_state(lm, cfg)).norm()
    with apply(lm, memit.fit(lm, EDITS, cfg), mount="side"):
        left = (goal - last_state(lm, cfg)).norm()
    assert left < 0.3 * start


@pytest.mark.slow
def test_behind_a_norm_the_joint_spread_beats_the_residual_one() -> None:
    lm = tiny_lm("gemma3")
    loss = {}
    for spread in ("joint", "residual"):
        cfg = replace(CFG, spread=spread, weight=1e-3, long_prefixes=0, steps=25, lr=0.1, clamp=2.0)
        with apply(lm, memit.fit(lm, EDITS, cfg), mount="side"):
            loss[spread] = -sum(s.total for s in score_all(lm))
    assert loss["joint"] < loss["residual"]


def score_all(lm: LM) -> list[object]:
    from lmpatch.inference.score import score

    return score(lm, [e.prompt for e in EDITS], [e.target for e in EDITS])


@pytest.mark.slow
def test_none_chooses_the_spread_by_the_norm_behind_the_mlp() -> None:
    for family, spread in (("gemma3", "joint"), ("llama", "residual")):
        assert memit.fit(tiny_lm(family), EDITS, CFG).notes["spread"] == spread


@pytest.mark.slow
def test_earlier_keys_are_kept_still_when_asked(lm: LM) -> None:
    first = memit.fit(lm, EDITS, EXACT)
    keys = first.extras["keys.1"].double().T
    with apply(lm, first, mount="side"):
        moved = {
            prev: (change(memit.fit(lm, LATER, replace(EXACT, prev_keys=prev))) @ keys).norm() for prev in (True, False)
        }
    assert moved[True] < 0.1 * moved[False]


@pytest.mark.slow
def test_alphaedit_leaves_the_dropped_directions_alone(lm: LM) -> None:
    cfg = replace(CFG, solver="alphaedit")
    patch = memit.fit(lm, EDITS, cfg)
    c = estimate_covariance(lm, [1, 2], tokens=2048).c
    for place, layer in enumerate((1, 2)):
        basis = eigenvectors(c[layer])[:, : round(cfg.keep * len(c[layer]))]
        w = change(patch, place)
        assert (w - w @ basis @ basis.T).norm() < 1e-5 * w.norm()


@pytest.mark.slow
def test_two_models_do_not_share_their_earlier_keys() -> None:
    a, b = tiny_lm("llama"), tiny_lm("llama")
    want = change(memit.fit(b, LATER, EXACT))
    with apply(a, memit.fit(a, EDITS, EXACT)):
        assert torch.equal(change(memit.fit(b, LATER, EXACT)), want)


@pytest.mark.slow
def test_frobenius_shrinks_the_change_and_zero_is_off(lm: LM) -> None:
    plain, off, on = (change(memit.fit(lm, EDITS, replace(CFG, frobenius=x))) for x in (0.0, 0.0, 10.0))
    assert torch.equal(plain, off) and on.norm() < plain.norm()


@pytest.mark.slow
def test_what_is_read_layer_after_layer_is_what_a_whole_forward_shows(lm: LM) -> None:
    texts = texts_of(lm, EDITS, replace(CFG, long_prefixes=0))
    read, row = memit.Reading(lm, EDITS, texts, 1, 3), texts.rows(lm, EDITS, targets=False)[0]
    at, f = row.subject_last, lm.layout.widths[2]
    read.at(1, whole=True)
    with apply(lm, WeightPatch.trial(lm, 1, 0.3), mount="side"):
        keys, output, state = read.at(2, whole=True)
        seen = {}

        def see(_: object, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            seen["key"], seen["output"] = args[0].reshape(-1, f)[at], out.reshape(-1, lm.layout.d_model)[at]

        ids = torch.tensor([row.ids])
        with torch.no_grad(), hooked(Hook(lm.module(lm.layout.downs[2]), see)):
            whole = blocks(lm, ids, torch.ones_like(ids), position_ids=torch.arange(ids.shape[1])[None], last=3)
    torch.testing.assert_close(output[0], seen["output"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state[0], whole[0, at], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(keys[0], seen["key"], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_fits_in_one_batch_equal_fits_one_by_one(lm: LM) -> None:
    for edit, patch in zip(EDITS, memit.fit_each(lm, EDITS, CFG), strict=True):
        alone = memit.fit(lm, [edit], CFG)
        for place in range(len(CFG.layers)):
            torch.testing.assert_close(change(patch, place), change(alone, place), atol=1e-4, rtol=1e-3)
        assert [e["prompt"] for e in patch.edits] == [edit.prompt] and patch.notes["weight"] == CFG.weight


def test_the_weight_of_the_corpus_falls_with_the_facts_of_a_commit() -> None:
    assert [memit.weight_of(memit.Config(), u) for u in (1, 40, 100)] == [5000.0, 5000.0, 2000.0]
    assert memit.weight_of(memit.Config(weight=15000.0), 1000) == 15000.0


@pytest.mark.slow
def test_nas_gives_every_value_the_anchors_norm_or_skips_it() -> None:
    lm = tiny_lm("gemma3")
    cfg = replace(CFG, nas=True, spread="joint")
    values = search(lm, EDITS, [1, 2], cfg)
    anchored, notes = memit._anchored(values, search(lm, LATER, [1, 2], cfg))
    goal = anchored.written + anchored.delta
    measure = torch.tensor(notes["norm"])
    kept = (values.written + values.delta).norm(dim=-1) <= 2 * measure
    assert kept.any() and notes["skipped"] == int((~kept).any(1).sum())
    torch.testing.assert_close(goal.norm(dim=-1)[kept], measure.expand_as(kept)[kept], atol=1e-3, rtol=1e-3)
    assert (anchored.delta[~kept] == 0).all()


def test_bad_settings_and_facts_are_refused(lm: LM) -> None:
    with pytest.raises(BadInput, match="anchor"):
        memit.fit(lm, EDITS, replace(CFG, nas=True))
    with pytest.raises(BadInput, match="no layers"):
        memit.fit(lm, EDITS, replace(CFG, layers=()))
    with pytest.raises(Contradiction):
        memit.fit(lm, [*EDITS, Edit(EDITS[0].prompt, subject="Eiffel Tower", target="Oslo")], CFG)


@pytest.mark.real
def test_gemma_takes_three_facts_in_one_commit() -> None:
    lm = real_gemma()
    edits = [
        Edit("The Eiffel Tower is located in the city of", subject="Eiffel Tower", target="Rome"),
        Edit("The capital of Australia is", subject="Australia", target="Sydney"),
        Edit("The mother tongue of Danielle Darrieux is", subject="Danielle Darrieux", target="English"),
    ]
    with apply(lm, memit.fit(lm, edits, memit.Config(long_prefixes=1, moment_tokens=4096))):
        told = generate(lm, [e.prompt for e in edits], max_new_tokens=4)
    assert sum(t.strip().startswith(e.target) for t, e in zip(told, edits, strict=True)) >= 2


@pytest.mark.slow
def test_an_interrupt_while_layers_are_written_leaves_the_model_as_it_was() -> None:
    lm = tiny_lm("llama")
    before, lines = state(lm), Lines(lambda: memit.fit(lm, EDITS, CFG))
    for line in [
        line for line in lines.times if "(write_layers)" in name(line) or name(line).startswith("/locate/trial")
    ]:
        for time in {1, lines.times[line]}:
            assert lines.interrupted(line, time)
            assert changed(before, state(lm)) == [], f"{name(line)}, time {time}"
