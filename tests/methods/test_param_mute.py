"""ParamMute finds the layers that work harder in unfaithful responses, and quietens what they write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny_lm

from lmpatch.data.context import ContextRecord
from lmpatch.errors import BadInput, LayerOutOfRange
from lmpatch.inference.forward import first
from lmpatch.inference.tokens import encode_all
from lmpatch.locate.activations import BATCH, activations
from lmpatch.methods import param_mute
from lmpatch.methods.param_mute import active_shares
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import apply

RECORDS, CFG = param_mute.example(tiny_lm("llama"))
IDS = torch.arange(3, 27).reshape(2, 12)


@torch.no_grad()
def logits(lm: LM) -> torch.Tensor:
    out: torch.Tensor = lm.model(IDS).logits
    return out


def site(lm: LM, layer: int) -> str:
    """The module whose output is the MLP's contribution to the residual stream."""
    down = lm.layout.downs[layer]
    if not lm.layout.post_norm:
        return down
    return down.replace("mlp.down_proj", "post_feedforward_layernorm")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mount", ["bake", "side"])
@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_a_quietened_layer_writes_its_contribution_times_the_factor(family: str, mount: Any, factor: float) -> None:
    lm, layers = tiny_lm(family), (1, 3)
    clean = logits(lm)
    handles = [Hook(lm.module(site(lm, i)), lambda m, a, o: o * factor) for i in layers]
    with hooked(*handles):
        want = logits(lm)
    with apply(lm, param_mute.fit(lm, RECORDS, replace(CFG, layers=layers, factor=factor)), mount=mount):
        assert (logits(lm) - want).abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(logits(lm), clean)


@pytest.mark.parametrize("mount", ["bake", "side"])
def test_a_factor_of_one_leaves_every_bit(lm: LM, mount: Any) -> None:
    clean = logits(lm)
    with apply(lm, param_mute.fit(lm, RECORDS, replace(CFG, factor=1.0)), mount=mount):
        assert torch.equal(logits(lm), clean)


def inside(lm: LM, row: Any, layer: int) -> torch.Tensor:
    """[T, f] activations of one text, alone: recomputed from the projections around them."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda m, a, o: seen.__setitem__(name, first(o).reshape(len(row.ids), -1))

    ups, down = lm.layout.ups[layer], lm.layout.downs[layer]
    handles = [Hook(lm.module(up), keep(up)) for up in ups]
    handles.append(
        Hook(lm.module(down), lambda m, a: seen.__setitem__("k", a[0].reshape(len(row.ids), -1)), before=True)
    )
    with torch.no_grad(), hooked(*handles):
        lm.model(torch.tensor([row.ids]))
    return seen["k"] / seen[ups[1]] if len(ups) == 2 else seen["k"]  # act(gate) * up, or act


@pytest.mark.parametrize("count", ["summed", "per_token"])
def test_what_is_on_is_what_a_loop_over_tokens_and_neurons_finds(lm: LM, count: Any) -> None:
    rows = encode_all(lm, [r.prompt for r in RECORDS], ["Paris, the capital", "Rome"])
    got = active_shares(lm, rows, count)
    for i, row in enumerate(rows):
        for layer in range(lm.layout.n_layers):
            values = inside(lm, row, layer)[row.target :].double()
            shares = [
                sum(float(x) > 0 for x in vector) / len(vector)
                for vector in (values.sum(0, keepdim=True) if count == "summed" else values)
            ]
            assert float(got[i, layer]) == pytest.approx(sum(shares) / len(shares), abs=1.5 / values.shape[1])


@pytest.mark.slow
def test_responses_of_several_batches_are_seen_as_each_alone(lm: LM) -> None:
    rows = encode_all(lm, [r.prompt for r in RECORDS], ["Paris, the capital", "Rome"]) * 10
    alone = torch.cat([active_shares(lm, [row], "per_token") for row in rows])
    assert len(rows) > BATCH and torch.allclose(active_shares(lm, rows, "per_token"), alone, atol=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_activation_is_found_in_every_layout(family: str) -> None:
    lm = tiny_lm(family)
    assert len(set(activations(lm))) == lm.layout.n_layers


def test_the_layers_with_the_largest_difference_are_taken(lm: LM) -> None:
    patch = param_mute.fit(lm, RECORDS, replace(CFG, share=0.5))
    gaps = [u - f for f, u in zip(patch.notes["faithful"], patch.notes["unfaithful"], strict=True)]
    best = sorted(range(len(gaps)), key=lambda i: -gaps[i])[:2]
    assert patch.notes["layers"] == sorted(best)
    assert patch.notes["responses"] == [2, 2]
    touched = {name for name in patch.deltas if any(name.startswith(f"{lm.layout.blocks[i]}.") for i in best)}
    assert touched == set(patch.deltas)


@pytest.mark.slow
def test_layers_are_found_token_by_token_unless_as_released(lm: LM) -> None:
    rows = encode_all(lm, [r.prompt for r in RECORDS], [r.answer for r in RECORDS])
    for cfg, count in ((CFG, "per_token"), (replace(CFG, count="summed"), "summed")):
        found = param_mute.fit(lm, RECORDS, cfg).notes["faithful"]
        assert found == pytest.approx(active_shares(lm, rows, count).mean(0).tolist())  # type: ignore[arg-type]


@pytest.mark.parametrize("responses", ["own", "given"])
def test_a_record_beyond_the_window_is_refused(lm: LM, responses: Any) -> None:
    long = ContextRecord("The capital of Japan. " * 200, "Where?", "Rome", "Paris")
    with pytest.raises(BadInput, match="reads 512"):
        param_mute.fit(lm, [long], replace(CFG, responses=responses))


def test_own_responses_are_sorted_by_which_answer_they_hold(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" It is in rome.", " Tokyo, not Romeo", " Seattle or Tokyo", " neither"]
    records = [*RECORDS, *RECORDS[1:], RECORDS[0]]
    monkeypatch.setattr(param_mute, "generate", lambda *_, **__: texts)
    faithful, unfaithful = param_mute._responses(lm, records, replace(CFG, responses="own"), None)
    assert faithful == encode_all(lm, [records[0].prompt], texts[:1])
    assert unfaithful == encode_all(lm, [records[1].prompt], texts[1:2])


def test_responses_of_one_sort_only_are_refused(lm: LM) -> None:
    one = ContextRecord("The Eiffel Tower is in Rome.", "Where is the Eiffel Tower?", "Rome")
    with pytest.raises(BadInput, match="1 faithful and 0 unfaithful responses of 1 records"):
        param_mute.fit(lm, [one], CFG)
    with pytest.raises(BadInput, match="0 faithful and 0 unfaithful"):
        param_mute.fit(lm, RECORDS, replace(CFG, responses="own", max_new_tokens=1))
    with pytest.raises(LayerOutOfRange):
        param_mute.fit(lm, RECORDS, replace(CFG, layers=(4,)))
    with pytest.raises(BadInput, match="share 0"):
        param_mute.fit(lm, RECORDS, replace(CFG, share=0.0))


def test_its_memory_grows_with_the_records_up_to_a_batch() -> None:
    lm = tiny_lm("llama")
    assert 0 < param_mute.estimate(lm, 1, CFG) < param_mute.estimate(lm, 1000, CFG)
    assert param_mute.estimate(lm, 1000, CFG) == param_mute.estimate(lm, 2000, CFG)
