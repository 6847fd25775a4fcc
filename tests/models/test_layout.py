"""The parts of a block are found by structure on every family, and a wrong map is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from tiny import D_FF, D_MODEL, FAMILIES, LAYERS, VOCAB, tiny_lm, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from lmpatch.errors import LayerOutOfRange, UnknownLayout
from lmpatch.models.calls import first_tensor, forward, probe_ids
from lmpatch.models.discover import discover
from lmpatch.models.layout import Layout
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap
from lmpatch.provenance import hash_tensors

QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
LLAMA = ("model.layers.2", "mlp.down_proj", "mlp.gate_proj mlp.up_proj", "self_attn.o_proj", QKV)
EXPECTED = {  # block 2, and inside it: down, ups, attention output, attention inputs
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"], LLAMA),
    "phi3": ("model.layers.2", "mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"),
    "gpt2": ("transformer.h.2", "mlp.c_proj", "mlp.c_fc", "attn.c_proj", "attn.c_attn"),
    "gpt_neox": (
        "gpt_neox.layers.2",
        "mlp.dense_4h_to_h",
        "mlp.dense_h_to_4h",
        "attention.dense",
        "attention.query_key_value",
    ),
    "gptj": ("transformer.h.2", "mlp.fc_out", "mlp.fc_in", "attn.out_proj", "attn.q_proj attn.k_proj attn.v_proj"),
    "opt": ("model.decoder.layers.2", "fc2", "fc1", "self_attn.out_proj", QKV),
}
GEMMAS = ("gemma2", "gemma3")
TEXT = "The Colosseum is in Rome, the capital of Italy. What is"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_a_block_is_found(family: str) -> None:
    layout = tiny_lm(family).layout
    block, down, ups, attn_out, attn_ins = EXPECTED[family]
    assert layout.n_layers == LAYERS
    assert layout.blocks[2] == block
    assert layout.downs[2] == f"{block}.{down}"
    assert layout.ups[2] == tuple(f"{block}.{name}" for name in ups.split())
    assert layout.attn_outs[2] == f"{block}.{attn_out}"
    assert layout.attn_ins[2] == tuple(f"{block}.{name}" for name in attn_ins.split())
    assert (layout.d_model, layout.d_ff, layout.vocab) == (D_MODEL, D_FF, VOCAB)
    assert layout.transposed == (family == "gpt2")


def test_the_down_projection_has_the_stated_shape_and_orientation(any_lm: LM) -> None:
    layout = any_lm.layout
    shape = (layout.d_ff, layout.d_model) if layout.transposed else (layout.d_model, layout.d_ff)
    assert {tuple(any_lm.parameter(layout.weight(down)).shape) for down in layout.downs} == {shape}


def test_the_tail_turns_the_last_hidden_state_into_the_models_logits(any_lm: LM) -> None:
    layout, states = any_lm.layout, []  # type: ignore[var-annotated]
    ids = torch.tensor([any_lm.tokenizer(TEXT)["input_ids"]])
    logits = forward(any_lm.model, ids, {layout.blocks[-1]: states.append})
    state = states[0]
    for name in layout.tail:
        state = any_lm.module(name)(state)
    if layout.softcap is not None:
        state = layout.softcap * torch.tanh(state / layout.softcap)
    torch.testing.assert_close(state, logits)
    assert layout.tail[-1] == layout.head
    assert layout.final_norm == layout.tail[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_post_norm_says_whether_an_addition_to_the_down_projection_reaches_the_stream_unchanged(family: str) -> None:
    lm = tiny_lm(family)
    ids = torch.tensor([lm.tokenizer(TEXT)["input_ids"]])
    added = torch.randn(1, ids.shape[1], D_MODEL, generator=torch.Generator().manual_seed(0))
    states: list[Tensor] = []
    for change in (torch.zeros_like(added), added):
        forward(lm.model, ids, {lm.layout.downs[1]: change.add, lm.layout.blocks[1]: states.append})
    exact = torch.allclose(states[1] - states[0], added, atol=1e-4)
    assert exact is not lm.layout.post_norm
    assert lm.layout.post_norm == (family in GEMMAS)


@pytest.mark.parametrize("family", FAMILIES)
def test_embed_scale_is_the_root_of_the_width_on_gemma_and_one_elsewhere(family: str) -> None:
    scale = tiny_lm(family).layout.embed_scale
    assert scale == (pytest.approx(D_MODEL**0.5, rel=1e-3) if family in GEMMAS else 1.0)


def test_embed_scale_compares_sizes_per_coordinate_where_a_projection_widens_the_embedding() -> None:
    model = tiny_model("opt", word_embed_proj_dim=32)
    with torch.no_grad():
        model.model.decoder.project_in.weight.copy_(3 * torch.eye(32).repeat(2, 1))  # each coordinate twice, times 3
    assert discover(model).embed_scale == pytest.approx(3.0)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_says_whether_head_and_embedding_are_one_tensor(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    assert discover(model).tied is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@pytest.mark.slow
def test_softcap_is_read_from_the_config_and_only_there() -> None:
    assert discover(tiny_model("gemma2", final_logit_softcapping=7.0)).softcap == 7.0
    assert discover(tiny_model("gemma2", final_logit_softcapping=None)).softcap is None


def test_a_layer_counts_from_either_end_and_no_further(lm: LM) -> None:
    n = lm.layout.n_layers
    assert [lm.layout.check_layer(i - n) for i in range(n)] == [lm.layout.check_layer(i) for i in range(n)]
    for layer in (n, -n - 1):
        with pytest.raises(LayerOutOfRange, match=f"{layer} asked for, the model has {n}"):
            lm.layout.check_layer(layer)


def test_discovery_leaves_weights_hooks_and_random_state_as_they_were() -> None:
    model = tiny_model("gemma3")
    before, state = hash_tensors(model.named_parameters(), exact=True), torch.get_rng_state()
    discover(model, tiny_tokenizer())
    assert hash_tensors(model.named_parameters(), exact=True) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.slow
def test_hooks_come_off_when_a_check_fails() -> None:
    model = tiny_model("gpt2").train()
    with pytest.raises(UnknownLayout, match="change the logits"):  # dropout: two forwards differ
        discover(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_depends_on_neither_tokenizer_nor_dtype(family: str) -> None:
    layouts = [
        discover(tiny_model(family), tiny_tokenizer()),
        discover(tiny_model(family)),
        discover(tiny_model(family, torch.bfloat16)),
    ]
    names = [dataclasses.replace(layout, embed_scale=0.0) for layout in layouts]
    assert names[0] == names[1] == names[2]
    for layout in layouts[1:]:
        assert layout.embed_scale == pytest.approx(layouts[0].embed_scale, rel=0.01)


@pytest.mark.parametrize("before", [True, False])
def test_opt_with_projected_embeddings_keeps_its_projection_in_the_tail(before: bool) -> None:
    layout = discover(tiny_model("opt", word_embed_proj_dim=32, do_layer_norm_before=before))
    norm = ("model.decoder.final_layer_norm",) if before else ()
    assert layout.tail == (*norm, "model.decoder.project_out", "lm_head")
    assert layout.final_norm == (norm[0] if before else None)
    assert layout.post_norm is not before  # otherwise the norm stands after the addition, on the stream itself


def test_an_mlp_as_wide_as_the_model_is_told_from_attention() -> None:
    layout = discover(tiny_model("llama", intermediate_size=D_MODEL, num_key_value_heads=4))
    assert layout.downs[0].endswith("mlp.down_proj")
    assert layout.attn_outs[0].endswith("self_attn.o_proj")


def test_a_change_reaches_the_hidden_state_inside_a_tuple() -> None:
    lm = tiny_lm("llama")
    ids = probe_ids(lm.model, None)
    outputs: list[Any] = []
    handle = lm.model.model.layers[0].self_attn.register_forward_hook(lambda *call: outputs.append(call[2]))
    muted = forward(lm.model, ids, {"model.layers.0.self_attn": torch.zeros_like})
    handle.remove()
    with torch.no_grad():
        lm.parameter("model.layers.0.self_attn.o_proj.weight").zero_()
    assert isinstance(outputs[0], tuple)
    torch.testing.assert_close(muted, forward(lm.model, ids))


def test_fused_experts_are_refused_by_name() -> None:
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=VOCAB,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnknownLayout, match=r"mixture of experts.*experts.*Use a dense model"):
        discover(model)


def test_a_list_of_experts_is_refused_even_in_a_late_block() -> None:
    model = tiny_model("llama")
    model.model.layers[3].mlp.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(UnknownLayout, match=r"layers\.3\.mlp\.experts, a list of 2"):
        discover(model)


def test_a_block_that_runs_twice_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(UnknownLayout, match=r"model\.layers \(4\)"):
        discover(model)


def test_a_model_without_attention_is_refused_with_what_was_found() -> None:
    model = tiny_model("gpt_neox")
    for layer in model.gpt_neox.layers:
        layer.attention.query_key_value = nn.Sequential()  # no projection is left to read the stream
        layer.attention.forward = lambda state, *args, **kwargs: (torch.zeros_like(state), None)
    with pytest.raises(UnknownLayout, match=r"no attention followed by an MLP.*mlp\.dense_h_to_4h 64->128"):
        discover(model)


def test_a_parallel_block_that_runs_its_mlp_first_is_refused_not_mislabelled(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gptj.modeling_gptj import GPTJBlock

    def mlp_first(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        state = self.ln_1(hidden_states)
        written: Tensor = self.mlp(state) + hidden_states
        return (written + first_tensor(self.attn(hidden_states=state, **kwargs)), None)

    monkeypatch.setattr(GPTJBlock, "forward", mlp_first)
    with pytest.raises(UnknownLayout, match="across tokens"):
        discover(tiny_model("gptj", n_inner=D_MODEL))  # every projection is as wide as the model: widths tell nothing


def test_scaled_logits_are_refused() -> None:
    config = transformers.CohereConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB,
        logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with pytest.raises(UnknownLayout, match="logit scale"):
        discover(transformers.AutoModelForCausalLM.from_config(config).eval())


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnknownLayout, match="no language-model head"):
        discover(tiny_model("llama").model)


def test_a_layout_by_hand_is_used_as_it_is(lm: LM) -> None:
    mine = dataclasses.replace(lm.layout, embed_scale=2.0)
    assert wrap(lm.model, lm.tokenizer, layout=mine).layout is mine


def test_a_layout_by_hand_whose_part_runs_twice_is_refused(lm: LM) -> None:
    down = lm.layout.downs[1]

    def again(*_: Any) -> None:
        lm.module(down)(torch.zeros(1, D_FF))

    lm.module(lm.layout.blocks[1]).register_forward_hook(again)
    with pytest.raises(UnknownLayout, match=f"calls were .*{down}': 2"):
        wrap(lm.model, lm.tokenizer, layout=lm.layout)


def _swap(layout: Layout, **changes: Any) -> Layout:
    return dataclasses.replace(layout, **changes)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: _swap(x, ups=x.attn_ins, downs=x.attn_outs),
        lambda x: _swap(x, attn_ins=x.ups, attn_outs=x.downs),
        lambda x: _swap(x, tail=x.tail[-1:]),
        lambda x: _swap(x, d_model=x.d_model + 1),
        lambda x: _swap(x, blocks=x.blocks[:-1]),
        lambda x: _swap(x, softcap=0.1),
        lambda x: _swap(x, embed="nowhere"),
    ],
    ids=["attention-as-mlp", "mlp-as-attention", "no-norm", "width", "a-block-short", "softcap", "no-such-module"],
)
def test_a_layout_by_hand_that_does_not_hold_is_refused(lm: LM, mistake: Any) -> None:
    with pytest.raises(UnknownLayout):
        wrap(lm.model, lm.tokenizer, layout=mistake(lm.layout))
