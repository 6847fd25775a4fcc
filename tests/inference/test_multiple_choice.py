"""The logits of a few tokens are those of the whole head."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_lm

from lmpatch.inference.forward import logits
from lmpatch.inference.multiple_choice import option_logits
from lmpatch.inference.states import hidden
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM

PROMPTS = ["The Eiffel Tower is in", "Apple", "The mother tongue of Danielle Darrieux is", "Apple"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_option_logits_are_those_columns_of_the_logits(any_lm: LM, dtype: torch.dtype) -> None:
    any_lm.model.to(dtype)
    states, ids = hidden(any_lm, PROMPTS), [7, 3, 250, 12]
    with torch.no_grad():
        want = logits(any_lm, states.to(dtype))[:, ids]
    got = option_logits(any_lm, states, ids)
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert torch.equal(got.argmax(-1), want.argmax(-1))
    else:  # the full logits are rounded to bf16, these are not
        torch.testing.assert_close(got, want, atol=0.1, rtol=2e-2)


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma2"])  # plain, with a bias, soft-capped
def test_option_logits_run_no_full_head_where_it_is_a_plain_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm(family)
    states, head = hidden(lm, PROMPTS), lm.module(lm.layout.head)
    with torch.no_grad():
        want = logits(lm, states)[:, [5, 9]]
    monkeypatch.setattr(head, "forward", lambda *_: pytest.fail("the whole head ran"))
    torch.testing.assert_close(option_logits(lm, states, [5, 9]), want, atol=1e-4, rtol=1e-4)


def test_option_logits_see_what_a_hook_adds_to_the_head() -> None:
    lm = tiny_lm("llama")
    states, head = hidden(lm, PROMPTS), lm.module(lm.layout.head)
    before = option_logits(lm, states, [5, 9])
    with hooked(Hook(head, lambda _, __, out: out + torch.arange(out.shape[-1]))):
        torch.testing.assert_close(option_logits(lm, states, [5, 9]), before + torch.tensor([5.0, 9.0]))
