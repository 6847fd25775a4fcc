"""ROME and r-ROME insert exactly what they promise, where they promise it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import real_gemma, tiny_lm

from lmpatch.api import fit
from lmpatch.data.edits import Edit
from lmpatch.errors import Contradiction, LayerOutOfRange, NotEnoughMemory, SubjectNotFound
from lmpatch.inference.generate import generate
from lmpatch.locate.covariance import estimate_covariance
from lmpatch.methods import rome
from lmpatch.methods.rome import pairs, r_rome
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import apply
from lmpatch.registry import get

EDITS, CFG = rome.example(tiny_lm("llama"))


def change(patch: object) -> torch.Tensor:
    (delta,) = patch.deltas.values()
    return (delta.b @ delta.a).double()  # [d, f]


@pytest.mark.slow
@pytest.mark.parametrize("mean_key", [False, True])
def test_every_key_gets_exactly_its_value(lm: LM, mean_key: bool) -> None:
    method, cfg = (r_rome, r_rome.Config(**vars(CFG))) if mean_key else (rome, CFG)
    p = pairs(lm, EDITS, cfg)
    w = change(method.fit(lm, EDITS, cfg))
    torch.testing.assert_close(w @ p.key.T, p.residual.T, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_value_is_exact_at_the_down_projections_output(lm: LM) -> None:
    p = pairs(lm, EDITS[:1], CFG)
    module = lm.module(lm.layout.downs[CFG.layer])
    with torch.no_grad():
        goal = module(p.key.float()).double() + p.residual
        with apply(lm, rome.fit(lm, EDITS[:1], CFG)):
            got = module(p.key.float()).double()
    torch.testing.assert_close(got, goal, atol=1e-4, rtol=1e-4)


def test_one_fact_is_a_rank_one_change_along_the_moments_inverse(lm: LM) -> None:
    w = change(rome.fit(lm, EDITS[:1], CFG))
    p = pairs(lm, EDITS[:1], CFG)
    gain = p.residual[0] / (p.key[0] @ p.direction[0])
    torch.testing.assert_close(w, torch.outer(gain, p.direction[0]), atol=1e-5, rtol=1e-4)


def test_with_covariance_corpus_keys_move_less_at_equal_insertion(lm: LM) -> None:
    moments = estimate_covariance(lm, [CFG.layer], tokens=2048).c[CFG.layer].double()
    moved = [
        torch.einsum("df,fg,dg->", w, moments, w)  # mean |ΔW k|² over the corpus
        for w in (change(rome.fit(lm, EDITS[:1], replace(CFG, covariance=c))) for c in (True, False))
    ]
    assert moved[0] < moved[1]


@pytest.mark.slow
def test_fits_in_one_batch_equal_fits_one_by_one(lm: LM) -> None:
    each = rome.fit_each(lm, EDITS, CFG)
    for edit, patch in zip(EDITS, each, strict=True):
        torch.testing.assert_close(change(patch), change(rome.fit(lm, [edit], CFG)), atol=1e-4, rtol=1e-3)
        assert [e["prompt"] for e in patch.edits] == [edit.prompt]


@pytest.mark.slow
def test_facts_that_share_a_key_are_written_as_their_average_not_as_noise(lm: LM) -> None:
    twins = [EDITS[0], Edit("The Eiffel Tower is made of", subject="Eiffel Tower", target="gold")]
    bare = replace(CFG, short_prefixes=0, long_prefixes=0)
    alone = max(change(p).norm() for p in rome.fit_each(lm, twins, bare))
    assert change(rome.fit(lm, twins, bare)).norm() < 2 * alone


def test_bad_input_is_refused_before_any_work(lm: LM) -> None:
    with pytest.raises(LayerOutOfRange, match=r"0\.\.3"):
        rome.fit(lm, EDITS, replace(CFG, layer=4))
    with pytest.raises(SubjectNotFound, match="Louvre"):
        rome.fit(lm, [Edit("The Eiffel Tower is in", subject="Louvre", target="Rome")], CFG)
    with pytest.raises(Contradiction, match="Rome.*Oslo"):
        rome.fit(lm, [EDITS[0], Edit(EDITS[0].prompt, subject="Eiffel Tower", target="Oslo")], CFG)


@pytest.mark.parametrize("name", ["rome", "r_rome", "memit", "finetune"])
def test_too_little_memory_is_said_before_any_work(lm: LM, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = get("methods", name)
    edits, cfg = method.example(lm)
    need = method.estimate(lm, len(edits), cfg)
    assert 0 < need < method.estimate(lm, 10 * len(edits), cfg)
    monkeypatch.setattr("lmpatch.resources.free_bytes", lambda device: need - 1)
    with pytest.raises(NotEnoughMemory, match="free"):
        fit(lm, name, edits, **vars(cfg))


@pytest.mark.real
@pytest.mark.parametrize("method", [rome, r_rome])
def test_gemma_states_the_new_fact_and_forgets_it_again(method: object) -> None:
    lm = real_gemma()
    edit = Edit("The Eiffel Tower is located in the city of", subject="Eiffel Tower", target="Rome")
    before = generate(lm, edit.prompt, max_new_tokens=4)
    patch = method.fit(lm, [edit], method.Config(short_prefixes=1, long_prefixes=1, covariance=False))
    with apply(lm, patch):
        assert generate(lm, edit.prompt, max_new_tokens=4).strip().startswith("Rome")
    assert generate(lm, edit.prompt, max_new_tokens=4) == before
