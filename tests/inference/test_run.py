"""Scoring and generation do not depend on batch, padding, order or cache."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_lm

from lmpatch.data.context import InContext
from lmpatch.errors import BadInput
from lmpatch.inference.forward import frozen, head_loss, logits
from lmpatch.inference.generate import Sampling, generate, stream
from lmpatch.inference.score import score
from lmpatch.inference.states import hidden, next_kl
from lmpatch.inference.tokens import encode, encode_all
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM

PROMPTS = ["The Eiffel Tower is in", "Apple", "The mother tongue of Danielle Darrieux is", "Apple"]
TARGETS = ["Rome", "was founded by Steve Jobs", "English", "is"]


def slow_greedy(lm: LM, prompt: str, count: int) -> list[int]:
    """One prompt, no cache, every logit: the reference."""
    ids = list(encode(lm, prompt).ids)
    new: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            token = int(lm.model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == lm.tokenizer.eos_token_id or "\n" in lm.tokenizer.decode([token]):
            break
        new.append(token)
    return new


@pytest.mark.slow
def test_batched_cached_generation_equals_one_prompt_at_a_time_without_cache(any_lm: LM) -> None:
    prompts = PROMPTS[:3]
    want = [any_lm.tokenizer.decode(slow_greedy(any_lm, p, 10), skip_special_tokens=True) for p in prompts]
    assert generate(any_lm, prompts, max_new_tokens=10) == want
    assert generate(any_lm, prompts, max_new_tokens=10, batch_size=2) == want
    assert generate(any_lm, prompts[0], max_new_tokens=10) == want[0]


def test_generation_stops_at_a_stop_text_and_leaves_it_out(lm: LM) -> None:
    whole = generate(lm, PROMPTS[0], max_new_tokens=12)
    mark = whole[3]
    assert mark not in generate(lm, PROMPTS[0], max_new_tokens=12, stop=[mark])


@pytest.mark.slow
def test_a_row_that_ends_early_does_not_disturb_the_others(lm: LM) -> None:
    texts = generate(lm, PROMPTS, max_new_tokens=12, stop=[])
    mark = texts[1][2]
    mixed = generate(lm, PROMPTS, max_new_tokens=12, stop=[mark])
    assert mixed == [generate(lm, p, max_new_tokens=12, stop=[mark]) for p in PROMPTS]


def test_an_answer_ends_with_the_token_that_is_enough_for_all_who_asked(lm: LM) -> None:
    prompts = ["The Eiffel Tower is in", "Steve Jobs founded", "Steve Jobs founded"]
    whole = generate(lm, prompts, max_new_tokens=6, stop=())
    short = generate(lm, prompts[0], max_new_tokens=1, stop=())
    said = generate(lm, prompts, max_new_tokens=6, stop=(), enough=lambda i, text: i < 2)
    assert said == [short, *whole[1:]]  # the third wants more, and is asked together with the second
    steps: list[int] = []
    with hooked(Hook(lm.module(lm.layout.blocks[0]), lambda *_: steps.append(1))):
        generate(lm, prompts, max_new_tokens=6, stop=(), enough=lambda i, text: True)
    assert len(steps) == 1


def test_scores_equal_a_plain_forward_with_all_logits(any_lm: LM) -> None:
    scores = score(any_lm, PROMPTS, TARGETS, batch_size=3)
    for prompt, target, got in zip(PROMPTS, TARGETS, scores, strict=True):
        row = encode(any_lm, prompt, target)
        with torch.no_grad():
            logp = any_lm.model(torch.tensor([row.ids])).logits[0].float().log_softmax(-1)
        want = [float(logp[t - 1, row.ids[t]]) for t in range(row.target, len(row.ids))]
        assert got.ids == row.ids[row.target :]
        assert got.logprobs == pytest.approx(want, abs=1e-4)
        assert got.argmax == tuple(logp[row.target - 1 : len(row.ids) - 1].argmax(-1).tolist())
        assert got.total == pytest.approx(sum(want), abs=1e-3)


def test_hidden_states_give_the_next_token_distribution(any_lm: LM) -> None:
    states = hidden(any_lm, PROMPTS, batch_size=2)
    for prompt, state in zip(PROMPTS, states, strict=True):
        with torch.no_grad():
            want = any_lm.model(torch.tensor([encode(any_lm, prompt).ids])).logits[0, -1]
            torch.testing.assert_close(logits(any_lm, state), want.float(), atol=1e-4, rtol=1e-4)


def test_kl_of_a_model_with_itself_is_nothing_and_positive_otherwise(lm: LM) -> None:
    states = hidden(lm, PROMPTS)
    assert next_kl(lm, states, states).abs().max() < 1e-6
    assert (next_kl(lm, states, states.roll(1, 0)) > 1e-4).all()


def test_a_loss_of_the_head_equals_one_over_all_logits_and_is_differentiable(lm: LM) -> None:
    base = torch.randn(3, lm.layout.d_model)
    with torch.no_grad():
        base_logp = logits(lm, base).log_softmax(-1)
    now = torch.randn(3, lm.layout.d_model, requires_grad=True)

    def drift(z: torch.Tensor, rows: slice) -> torch.Tensor:
        logp = z.log_softmax(-1)
        return (logp.exp() * (logp - base_logp[rows])).sum(-1)

    got, want = head_loss(lm, now, drift, chunk=2), drift(logits(lm, now), slice(0, 3))
    torch.testing.assert_close(got, want)
    (g1,) = torch.autograd.grad(got.sum(), now)
    (g2,) = torch.autograd.grad(want.sum(), now)
    torch.testing.assert_close(g1, g2)


@pytest.mark.slow
def test_a_stream_says_in_pieces_what_generate_says_at_once(any_lm: LM) -> None:
    for prompt in PROMPTS[:2]:
        pieces = list(stream(any_lm, prompt, max_new_tokens=6))
        assert "".join(pieces) == generate(any_lm, prompt, max_new_tokens=6)
        assert all(pieces)
    drawn = dict(max_new_tokens=6, temperature=1.0, top_p=0.9, seed=3)
    assert "".join(stream(any_lm, prompt, **drawn)) == generate(any_lm, prompt, **drawn)  # type: ignore[arg-type]


def test_a_stream_never_ends_a_piece_within_a_character(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(lm.tokenizer("é ü", add_special_tokens=False)["input_ids"])  # two tokens for each letter here
    monkeypatch.setattr(Sampling, "take", lambda *_: torch.tensor([next(said)]))
    assert list(stream(lm, "Apple", max_new_tokens=5)) == ["é", " ü"]


@pytest.mark.slow
def test_draws_depend_on_the_seed_and_the_place_and_not_on_the_batch(lm: LM) -> None:
    drawn = {"max_new_tokens": 12, "stop": [], "temperature": 1.5}
    texts = generate(lm, PROMPTS, **drawn)
    assert generate(lm, PROMPTS, batch_size=1, **drawn) == texts
    assert generate(lm, PROMPTS, seed=1, **drawn) != texts
    assert texts[1] != texts[3]  # equal prompts, two draws
    assert generate(lm, PROMPTS, **{**drawn, "top_p": 1e-6}) == generate(lm, PROMPTS, max_new_tokens=12, stop=[])


def test_what_the_window_does_not_hold_is_refused_before_anything_is_said(lm: LM) -> None:
    window = lm.window or 0
    (one,) = encode_all(lm, [long := "The capital of Japan. " * 200 + "It"])
    assert len(one.ids) > window
    complaint = f"takes [0-9]+ tokens.*reads {window}. Shorten its context"
    for ask in (
        lambda: generate(lm, ["It", long], max_new_tokens=1),
        lambda: list(stream(lm, long)),
        lambda: score(lm, [long], ["is"]),
        lambda: hidden(lm, [InContext(long, "It")]),
    ):
        with pytest.raises(BadInput, match=complaint):
            ask()
    short = encode_all(lm, ["It"])[0].ids
    with pytest.raises(BadInput, match=f"takes {len(short)} tokens and {window} new ones"):
        generate(lm, "It", max_new_tokens=window)


def test_progress_is_told_until_the_end(lm: LM) -> None:
    told: list[tuple[int, int, str]] = []
    generate(lm, PROMPTS, max_new_tokens=2, batch_size=1, progress=lambda *a: told.append(a))
    assert told[-1][0] == told[-1][1] == 3  # two of the four prompts are equal and run once


def test_an_empty_prompt_without_a_start_token_is_refused() -> None:
    lm = tiny_lm("llama")
    lm.tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(BadInput, match="tokenises to nothing"):
        generate(lm, ["", "x"])
    with pytest.raises(BadInput, match="nothing stands before"):
        score(lm, [""], ["Rome"])


def test_frozen_restores_the_flags(lm: LM) -> None:
    first = next(lm.model.parameters()).requires_grad_(True)
    with frozen(lm):
        assert not any(p.requires_grad for p in lm.model.parameters())
    assert first.requires_grad and sum(p.requires_grad for p in lm.model.parameters()) == 1
