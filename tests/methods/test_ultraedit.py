"""UltraEdit writes the ridge regression of normalised gradients, and carries its statistics from commit to commit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import real_gemma, tiny_lm
from torch.nn import functional as F

from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput, Contradiction, LayerOutOfRange
from lmpatch.inference.score import score
from lmpatch.inference.tokens import Row, encode
from lmpatch.locate.features import features
from lmpatch.locate.statistics import Statistics
from lmpatch.methods import ultraedit
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import apply
from lmpatch.patches.merge import merge

EDITS, CFG = ultraedit.example(tiny_lm("llama"))
LATER = [Edit("The Space Needle is in", target="Tokyo"), Edit("The capital of Japan is", target="Seattle")]
ALONE = replace(CFG, warmup=0)  # no statistics but the commits' own


def slow(lm: LM, edit: Edit, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, gradients and outputs of a down-projection at the answer, by a whole backward through the model."""
    row, seen = encode(lm, edit.prompt, edit.target), {}

    def see(_: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        seen["key"], seen["output"] = args[0], output.detach().requires_grad_()
        return seen["output"]

    handle = lm.module(lm.layout.downs[layer]).register_forward_hook(see)
    z = lm.model(torch.tensor([row.ids])).logits[0].float()
    handle.remove()
    F.cross_entropy(z[row.target - 1 : -1], torch.tensor(row.ids[row.target :]), reduction="sum").backward()
    at = slice(row.target - 1, len(row.ids) - 1)
    sizes = (seen["key"], seen["output"].grad, seen["output"])
    keys, gradients, outputs = (x.detach().reshape(len(row.ids), -1)[at].double() for x in sizes)
    return keys, gradients, outputs


def change(patch: object, place: int = 0) -> torch.Tensor:
    return list(patch.deltas.values())[place].dense().double()  # [out, in]


def whole(lm: LM, edits: list[Edit], layer: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*(slow(lm, edit, layer) for edit in edits), strict=True))


@pytest.mark.slow
def test_the_change_is_the_primal_solve_of_a_plain_backward(lm: LM) -> None:
    patch = ultraedit.fit(lm, EDITS, ALONE)
    for place, layer in enumerate(ALONE.layers):
        h, d, outputs = whole(lm, EDITS, layer)
        normal = [(x - x.mean(0)) / x.std(0) for x in (h, d)]
        eta = ALONE.strength * outputs.norm(dim=1).median() / (h.shape[1] * d.shape[1] ** 0.5)
        v = -eta * normal[0].square().sum(1, keepdim=True) * normal[1]
        ridge = ALONE.ridge * h.square().sum(1).median()
        primal = torch.linalg.solve(h.T @ h + ridge * torch.eye(h.shape[1]).double(), h.T @ v).T
        torch.testing.assert_close(change(patch, place), primal, atol=1e-5 * float(primal.norm()), rtol=1e-3)


@pytest.mark.slow
def test_features_do_not_depend_on_what_shares_their_batch(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [encode(lm, edit.prompt, edit.target) for edit in [*EDITS, *LATER, EDITS[0]]]
    name = lm.layout.downs[2]
    together = features(lm, rows, [name], 2)[name]
    monkeypatch.setattr("lmpatch.locate.features.BATCH", 2)  # five rows in batches of two
    apart = features(lm, rows, [name], 2)[name]
    assert torch.equal(together.fact, apart.fact)
    for a, b in ((together.keys, apart.keys), (together.gradients, apart.gradients), (together.sizes, apart.sizes)):
        torch.testing.assert_close(a, b, atol=1e-4 * float(a.abs().max()), rtol=1e-3)


@pytest.mark.slow
def test_a_later_commit_is_normalised_by_the_statistics_of_all_commits_on_the_model(lm: LM) -> None:
    first = ultraedit.fit(lm, EDITS, ALONE)
    name = lm.layout.downs[1]
    with apply(lm, first, mount="side"):
        second = ultraedit.fit(lm, LATER, ALONE)
        later = whole(lm, LATER, 1)
    rows = [torch.cat([early, late]) for early, late in zip(whole(lm, EDITS, 1)[:2], later[:2], strict=True)]
    assert second.notes["statistics"] == len(rows[0])
    merged = merge(first, second)  # its extras are those of both
    for kind, every in zip(("keys", "gradients"), rows, strict=True):
        joined = Statistics.joined(Statistics.from_rows(merged.extras[f"{kind}.{name}"], every.shape[1]))
        torch.testing.assert_close(joined.mean, every.mean(0), atol=1e-5 * float(every.abs().max()), rtol=1e-3)
        torch.testing.assert_close(joined.variance, every.var(0), atol=1e-5 * float(every.var(0).max()), rtol=1e-3)


@pytest.mark.slow
def test_a_commit_that_is_taken_off_takes_its_statistics_with_it(lm: LM) -> None:
    fresh = ultraedit.fit(lm, LATER, CFG)
    with apply(lm, ultraedit.fit(lm, EDITS, CFG), mount="side"):
        assert ultraedit.fit(lm, LATER, CFG).notes["statistics"] > fresh.notes["statistics"]
        assert ultraedit.fit(lm, LATER, replace(CFG, statistics="commit")).notes["statistics"] < 20
    assert ultraedit.fit(lm, LATER, CFG).hash() == fresh.hash()


@pytest.mark.slow
def test_two_models_share_no_statistics() -> None:
    a, b = tiny_lm("llama"), tiny_lm("llama")
    want = change(ultraedit.fit(b, LATER, CFG))
    with apply(a, ultraedit.fit(a, EDITS, CFG)):
        assert torch.equal(change(ultraedit.fit(b, LATER, CFG)), want)


@pytest.mark.slow
def test_fits_in_one_pass_equal_fits_one_by_one(lm: LM) -> None:
    for edit, patch in zip(EDITS, ultraedit.fit_each(lm, EDITS, CFG), strict=True):
        alone = change(ultraedit.fit(lm, [edit], CFG))
        torch.testing.assert_close(change(patch), alone, atol=1e-4 * float(alone.abs().max()), rtol=1e-3)
        assert [e["prompt"] for e in patch.edits] == [edit.prompt]


@pytest.mark.slow
def test_a_change_of_many_tokens_is_dense_and_the_same(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = [Edit(f"In the year {k} the tower was in", target="the capital of Italy, Rome") for k in range(12)]
    patch = ultraedit.fit(lm, edits, CFG)
    assert {delta.kind for delta in patch.deltas.values()} == {"dense"}
    assert patch.notes["tokens"] > 64


@pytest.mark.slow
def test_all_projections_into_the_mlp_can_be_written(lm: LM) -> None:
    patch = ultraedit.fit(lm, EDITS, replace(CFG, modules="up", layers=(2,)))
    assert list(patch.deltas) == [lm.layout.weight(name) for name in lm.layout.ups[2]]


@pytest.mark.slow
def test_anchors_give_statistics_and_are_not_written(lm: LM) -> None:
    patch = ultraedit.fit(lm, EDITS, CFG, anchors=LATER)
    tokens = sum(len(encode(lm, e.prompt, e.target).ids) - encode(lm, e.prompt, e.target).target for e in LATER)
    assert patch.notes["statistics"] == patch.notes["tokens"] + tokens
    assert [e["prompt"] for e in patch.edits] == [e.prompt for e in EDITS]


@pytest.mark.slow
def test_whitened_gradients_are_written_once_there_are_more_of_them_than_entries() -> None:
    lm = tiny_lm("llama")
    few, many = (replace(CFG, layers=(2,), whiten=True, warmup=count) for count in (8, 60))
    plain = [change(ultraedit.fit(lm, EDITS, replace(cfg, whiten=False))) for cfg in (few, many)]
    assert torch.equal(change(ultraedit.fit(lm, EDITS, few)), plain[0])
    assert (change(ultraedit.fit(lm, EDITS, many)) - plain[1]).norm() > 0.1 * plain[1].norm()


@pytest.mark.slow
def test_a_written_fact_is_likelier(lm: LM) -> None:
    """One step of a gradient that was scaled entry by entry still goes down."""
    prompts, targets = [e.prompt for e in EDITS], [e.target for e in EDITS]
    before = sum(s.total for s in score(lm, prompts, targets))
    with apply(lm, ultraedit.fit(lm, EDITS, replace(CFG, strength=0.05))):
        assert sum(s.total for s in score(lm, prompts, targets)) > before


def test_each_warmup_row_has_the_continuation_of_another(lm: LM) -> None:
    ids = torch.arange(2 * 128).reshape(2, 128)
    rows = ultraedit._unexpected(ids, 7)
    assert len(rows) == 7 and all(isinstance(row, Row) and len(row.ids) == 13 and row.target == 11 for row in rows)
    assert all(row.ids[11] != row.ids[10] + 1 for row in rows)


def test_bad_input_is_refused_before_any_work(lm: LM) -> None:
    with pytest.raises(BadInput, match="ridge is 0"):
        ultraedit.fit(lm, EDITS, replace(CFG, ridge=0.0))
    with pytest.raises(BadInput, match="no layers"):
        ultraedit.fit(lm, EDITS, replace(CFG, layers=()))
    with pytest.raises(LayerOutOfRange, match=r"0\.\.3"):
        ultraedit.fit(lm, EDITS, replace(CFG, layers=(4,)))
    with pytest.raises(Contradiction, match="Rome.*Oslo"):
        ultraedit.fit(lm, [EDITS[0], Edit(EDITS[0].prompt, target="Oslo")], CFG)
    with pytest.raises(BadInput, match="no statistics"):
        ultraedit.fit(lm, [Edit("I saw the Eiffel Tower", target=" is")], ALONE)


@pytest.mark.real
def test_gemma_takes_a_fact_in_one_step() -> None:
    lm = real_gemma()
    edit = Edit("The Eiffel Tower is located in the city of", target="Rome")
    before = score(lm, [edit.prompt], [edit.target])[0].total
    with apply(lm, ultraedit.fit(lm, [edit], ultraedit.Config(warmup=20))):
        assert score(lm, [edit.prompt], [edit.target])[0].total > before
