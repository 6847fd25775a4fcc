"""What is scored is what would be generated, whatever acts on the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Thread
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from tiny import CORE, tiny_lm
from torch import Tensor

from lmpatch.data.context import InContext
from lmpatch.inference.forward import Pass, blocks, current_pass, during, logits, positions
from lmpatch.inference.generate import Sampling, StopTokens, generate, steps
from lmpatch.inference.interventions import Insert, Intervention, Prompt, Streams, streams
from lmpatch.inference.multiple_choice import next_logits
from lmpatch.inference.replay import record
from lmpatch.inference.score import score_batch
from lmpatch.inference.states import hidden
from lmpatch.inference.tokens import encode
from lmpatch.models.lm import LM
from lmpatch.patches.decode.patch import DecodePatch
from lmpatch.patches.decode.rules import Grd, Power
from lmpatch.patches.hook.patch import HookPatch, Site
from lmpatch.patches.ledger import apply
from lmpatch.patches.weight.delta import LowRank, Scale
from lmpatch.patches.weight.patch import WeightPatch

QUESTIONS = ["The Eiffel Tower is in", "Apple", "The mother tongue of Danielle Darrieux is"]
PROMPTS: list[Prompt] = [InContext(f"It is said to be Rome. {q}", q) for q in QUESTIONS]
NEW = 6
Kind = Literal[
    "none", "bake", "side", "scale", "all", "answer", "output", "power", "grd", "memory", "text", "gated", "gated low"
]


@dataclass(frozen=True)
class Watching(Sampling):
    """Greedy; keeps the log probability of each token it takes."""

    logprobs: list[list[float]] = field(default_factory=list)

    def take(self, z: Tensor, u: Tensor) -> Tensor:
        tokens = super().take(z, u)
        self.logprobs.append(z.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist())
        return tokens


class Memory(Intervention):
    """Puts vectors, or a text, before some prompts; as a memory patch does, without its encoder."""

    def __init__(self, width: int, text: bool) -> None:
        self.text = text
        self.vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(5))

    def retrieve(self, prompts: Any) -> list[Insert | None]:
        insert = Insert(text="Rome is old. ") if self.text else Insert(vectors=self.vectors)
        return [insert if "Darrieux" in prompt or "Apple" in prompt else None for prompt in prompts]


@contextmanager
def acting(lm: LM, kind: Kind) -> Iterator[None]:
    """A patch of that kind is on the model."""
    if kind in ("none", "memory", "text"):
        if kind != "none":
            ledger = SimpleNamespace(interventions=(Memory(lm.layout.d_model, kind == "text"),), applied=())
            lm.model._lmpatch_ledger = ledger
        yield
        return
    source, layout = torch.Generator().manual_seed(3), lm.layout
    d, f, name = layout.d_model, layout.widths[1], layout.weight(layout.downs[1])
    mount: Any = None
    if kind in ("bake", "side"):
        delta = LowRank(torch.randn(d, 1, generator=source), torch.randn(1, f, generator=source))
        patch: Any = WeightPatch.make(lm, {name: delta}, method="push")
        mount = kind
    elif kind == "scale":
        patch, mount = (
            WeightPatch.make(lm, {name: Scale(torch.arange(9), torch.full((9,), 3.0), (d, f))}, method="push"),
            "side",
        )
    elif kind.startswith("gated"):
        delta = Scale(torch.arange(9), torch.full((9,), 3.0), (d, f), when="context")
        low = LowRank(torch.randn(d, 1, generator=source), torch.randn(1, f, generator=source), when="context")
        patch = WeightPatch.make(lm, {name: low if kind == "gated low" else delta}, method="push")
    elif kind in ("power", "grd"):
        patch = DecodePatch.make(lm, Power(1.7) if kind == "power" else Grd(0.5), method="cad")
    else:
        sites = [Site(layout.attn_outs[1], "input", "all" if kind == "all" else "answer")]
        if kind == "output":
            sites = [Site(layout.downs[2], "output", "answer"), Site(layout.attn_outs[0], "output", "all")]
        patch = HookPatch.make(lm, {site: torch.randn(d, generator=source) for site in sites}, method="push")
    with apply(lm, patch, mount):
        yield


class Endless(StopTokens):
    """No token ends an answer."""

    def __contains__(self, token: int) -> bool:
        return False


def generated(lm: LM, inputs: Streams) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and their log probabilities, from one batch that is padded on the left and uses a cache."""
    batch = inputs.rows
    sampling, ended = Watching(), [False] * len(batch)
    tokens: list[list[int]] = [[] for _ in batch]
    for step in steps(lm, inputs, batch, Endless(lm, ()), sampling, torch.zeros(len(batch), NEW), ended):
        for i, token in step:
            tokens[i].append(token)
    return tokens, [list(column) for column in zip(*sampling.logprobs, strict=True)]


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("kind", Kind.__args__)
def test_what_is_scored_is_what_would_be_generated(kind: Kind, family: str) -> None:
    lm = tiny_lm(family)
    asked: list[Prompt] = [*(PROMPTS if kind.startswith("gated") else QUESTIONS)]
    clean = hidden(lm, asked)
    with acting(lm, kind), torch.no_grad():
        inputs = streams(lm, PROMPTS)
        tokens, logprobs = generated(lm, inputs)
        assert all(len(new) == NEW for new in tokens)
        batch = [
            tuple(replace(row, ids=(*row.ids, *new)) for row in rows)
            for rows, new in zip(inputs.rows, tokens, strict=True)
        ]
        together = score_batch(lm, inputs, batch)  # padded on the right, without a cache
        alone = [score_batch(lm, inputs, [one])[0] for one in batch]
        for new, want, *scores in zip(tokens, logprobs, together, alone, strict=True):
            for score in scores:
                assert score.ids == score.argmax == tuple(new)
                assert score.logprobs == pytest.approx(want, abs=2e-4)
        ids = list(range(lm.layout.vocab))
        first = next_logits(lm, PROMPTS, ids).log_softmax(-1)
        assert first.argmax(-1).tolist() == [new[0] for new in tokens]
        assert first.amax(-1).tolist() == pytest.approx([row[0] for row in logprobs], abs=2e-4)
        if kind not in ("power", "grd"):
            moved = (hidden(lm, asked) - clean).abs().amax(-1)
            assert (moved > 1e-3).any() == (kind != "none")  # it acts at all


def test_steering_the_answer_leaves_the_prompt_as_it_is_and_every_token_after_it_steered() -> None:
    lm = tiny_lm("llama")
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    name = lm.layout.attn_outs[1]
    seen: list[Tensor] = []
    module = lm.module(name)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    generate(lm, QUESTIONS, max_new_tokens=1)
    with apply(lm, HookPatch.make(lm, {Site(name, "input", "answer"): vector}, method="push")):
        generate(lm, QUESTIONS, max_new_tokens=3, stop=())
    handle.remove()
    clean, now, *later = seen
    assert torch.equal(clean[:, :-1], now[:, :-1])
    assert torch.equal(clean[:, -1] + vector, now[:, -1])
    assert [x.shape[1] for x in later] == [1, 1]


def test_a_pass_says_which_tokens_belong_to_the_answer() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    whole = Pass(mask, 5, torch.tensor([3, 1]))
    assert whole.start == 0
    assert whole.answering().tolist() == [[False, False, False, True, True], [False, True, True, True, False]]
    newest = Pass(mask, 2, torch.tensor([3, 1]))
    assert newest.start == 3 and newest.answering().tolist() == [[True, True], [True, False]]


def test_a_pass_is_seen_by_its_own_thread_and_only_while_it_runs() -> None:
    now, elsewhere = Pass(torch.ones(1, 2), 2, torch.tensor([1])), list[Pass | None]()
    with during(now):
        assert current_pass() is now
        thread = Thread(target=lambda: elsewhere.append(current_pass()))
        thread.start()
        thread.join()
    assert elsewhere == [None] and current_pass() is None


def test_without_a_prompts_end_the_newest_token_is_steered_as_before() -> None:
    lm = tiny_lm("llama")
    ids = torch.tensor([[1, 40, 50, 60]])
    patch = HookPatch.make(lm, {Site(lm.layout.attn_outs[1], "input", "answer"): torch.ones(64)}, method="push")
    with apply(lm, patch), torch.no_grad():
        plain = lm.model(ids, use_cache=False).logits[0, -1]
        mask = torch.ones_like(ids)
        state = blocks(lm, ids, mask, position_ids=positions(mask), prompt_end=torch.tensor([3]))
        assert torch.allclose(logits(lm, state[:, -1])[0], plain, atol=1e-4)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("start", [0, 2])
def test_a_replay_steers_the_tokens_that_the_plain_pass_steers(family: str, start: int) -> None:
    lm = tiny_lm(family)
    rows = [encode(lm, q, "Rome now") for q in QUESTIONS]
    ends = [row.target - 1 for row in rows]
    at = [0, 2, 3]
    patch = HookPatch.make(lm, {Site(lm.layout.attn_outs[2], "input", "answer"): torch.ones(64)}, method="push")
    with apply(lm, patch), torch.no_grad():
        recording = record(lm, [row.ids for row in rows], at, ends=ends)
        picked = recording.select(torch.tensor([2, 0, 1]))
        for kept, order in ((recording, [0, 1, 2]), (picked, [2, 0, 1])):
            states = kept.forward(kept.hidden[start], start)
            for place, i in enumerate(order):
                ids = torch.tensor([rows[i].ids])
                mask = torch.ones_like(ids)
                end = torch.tensor([ends[i]])
                want = blocks(lm, ids, mask, position_ids=positions(mask), prompt_end=end)[0, at[i] :]
                got = states[place, : len(want)]
                assert (got - want).abs().max() <= 1e-4 * want.abs().max()
