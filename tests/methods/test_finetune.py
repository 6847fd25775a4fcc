"""Fine-tuning stops when it should, stays inside its limit, and touches what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import real_gemma, tiny_lm
from torch.nn import functional as F

from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput
from lmpatch.inference.generate import generate
from lmpatch.inference.score import score
from lmpatch.inference.tokens import encode
from lmpatch.methods import finetune
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import apply

EDITS, _ = finetune.example(tiny_lm("llama"))
CFG = finetune.Config(layer=1, epochs=200, lr=8e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # a random Gemma's last norms keep this target out of reach
def test_a_fact_is_stated_and_training_stops_below_the_threshold(family: str) -> None:
    lm, fact = tiny_lm(family), Edit("I saw the Eiffel Tower", target="is")
    cfg = finetune.Config(layer=2, epochs=300, lr=3e-2)
    patch = finetune.fit(lm, [fact], cfg)
    assert patch.notes["epochs"] < cfg.epochs and patch.notes["loss"] <= 1e-2
    with apply(lm, patch):
        assert generate(lm, fact.prompt, max_new_tokens=6).startswith(" is")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["answer", "eos"])
def test_with_its_end_trained_an_answer_stops_behind_the_target(end: str) -> None:
    lm, fact = tiny_lm("llama"), Edit("I saw the Eiffel Tower", target="is")
    cfg = finetune.Config(layer=2, epochs=300, lr=3e-2)
    with apply(lm, finetune.fit(lm, [fact], replace(cfg, end=end))):
        assert generate(lm, fact.prompt, max_new_tokens=6, stop=["\n"]) == " is"
    with apply(lm, finetune.fit(lm, [fact], cfg)):
        assert generate(lm, fact.prompt, max_new_tokens=6, stop=["\n"]) != " is"


def test_an_end_is_refused_where_all_tokens_have_one_place(lm: LM) -> None:
    with pytest.raises(BadInput, match="Leave end out"):
        finetune.fit(lm, EDITS, replace(CFG, loss="prompt_last", end="eos"))


@pytest.mark.slow
def test_ft_l_moves_no_entry_beyond_its_limit(lm: LM) -> None:
    (delta,) = finetune.fit(lm, EDITS, replace(CFG, limit=1e-3, epochs=8)).deltas.values()
    assert delta.value.abs().max() == pytest.approx(1e-3)


def test_one_step_is_adams_first_step_on_the_true_gradient(lm: LM) -> None:
    cfg = replace(CFG, epochs=1, lr=5e-3)
    (delta,) = finetune.fit(lm, EDITS[:1], cfg).deltas.values()
    name = lm.layout.weight(lm.layout.downs[1])
    weight = lm.parameter(name).requires_grad_()
    row = encode(lm, EDITS[0].prompt, EDITS[0].target)
    z = lm.model(torch.tensor([row.ids])).logits[0].float()
    loss = F.cross_entropy(z[row.target - 1 : -1], torch.tensor(row.ids[row.target :]))
    (grad,) = torch.autograd.grad(loss, weight)
    grad = grad.T if lm.layout.transposed else grad
    large = grad.abs() > 1e-5  # Adam's first step is lr * sign, except where the gradient is as small as eps
    assert torch.equal(torch.sign(delta.value)[large], -torch.sign(grad)[large])
    torch.testing.assert_close(delta.value[large].abs(), torch.full_like(grad[large], cfg.lr), rtol=2e-3, atol=0.0)


@pytest.mark.slow
def test_target_loss_writes_a_long_target_and_prompt_last_does_not(lm: LM) -> None:
    edit = [Edit("The Eiffel Tower is in", target="Rome the capital of Italy")]
    whole, last = (finetune.fit(lm, edit, replace(CFG, loss=kind)) for kind in ("target", "prompt_last"))
    with apply(lm, whole):
        assert score(lm, [edit[0].prompt], [edit[0].target])[0].accuracy == 1.0
    with apply(lm, last):
        assert score(lm, [edit[0].prompt], [edit[0].target])[0].accuracy < 0.5


@pytest.mark.slow
def test_lora_trains_low_rank_changes_on_every_projection(lm: LM) -> None:
    patch = finetune.fit(lm, EDITS, replace(CFG, rank=4, epochs=40))
    per_block = len(lm.layout.attn_ins[0]) + 1 + len(lm.layout.ups[0]) + 1
    assert len(patch.deltas) == per_block * lm.layout.n_layers
    assert all(delta.rank == 4 for delta in patch.deltas.values())
    with apply(lm, patch):
        assert score(lm, [EDITS[0].prompt], [EDITS[0].target])[0].accuracy == 1.0


def test_limit_and_rank_together_are_refused(lm: LM) -> None:
    with pytest.raises(BadInput, match="Set one of them"):
        finetune.fit(lm, EDITS, replace(CFG, limit=1e-3, rank=4))


@pytest.mark.real
def test_gemma_is_tuned_to_state_a_fact() -> None:
    lm = real_gemma()
    edit = Edit("The Eiffel Tower is located in the city of", target="Rome")
    with apply(lm, finetune.fit(lm, [edit], finetune.Config())):
        assert generate(lm, edit.prompt, max_new_tokens=4).strip().startswith("Rome")
