"""Two streams in one cached batch give what two models called in turn would give; nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import CORE, FAMILIES, tiny_lm
from torch import Tensor

from lmpatch.data.context import ContextRecord, InContext
from lmpatch.errors import BadInput, BadPatch, CannotMerge
from lmpatch.inference.generate import generate, stream
from lmpatch.inference.interventions import Insert, Intervention, Rule, streams
from lmpatch.inference.multiple_choice import next_logits, option_logits
from lmpatch.inference.score import score
from lmpatch.inference.states import hidden
from lmpatch.inference.tokens import encode
from lmpatch.models.lm import LM
from lmpatch.patches.decode.patch import Combine, DecodePatch
from lmpatch.patches.decode.rules import AdaCAD, Arr, Coiecd, Grd, Power
from lmpatch.patches.file import load_patch
from lmpatch.patches.ledger import applied, apply
from lmpatch.patches.merge import merge
from lmpatch.patches.patch import Base

ASKED = [
    InContext("The Eiffel Tower is in Rome. The Eiffel Tower is in", "The Eiffel Tower is in"),
    InContext("Steve Jobs founded the Louvre. Apple", "Apple"),
    InContext("Rome", "The capital of Italy, which is not France, is"),
]
TARGETS = ["Rome", "was founded by Steve Jobs", "English"]
RULES: dict[str, Rule] = {
    "cad": Power(1.5),
    "mixture": Power(0.5),
    "adacad": AdaCAD(0.0),
    "adacad with a floor": AdaCAD(0.3),
    "arr": Arr(),
    "grd": Grd(0.75),
    "grd by entropy": Grd(0.75, "entropy"),
    "coiecd": Coiecd(1.0, 4.0),
    "coiecd as released": Coiecd(1.0, 4.0, tail=True),
}
every_rule = pytest.mark.parametrize("name", RULES)
shared = cache(tiny_lm)  # a rule writes no weight, so all tests may ask one model


@pytest.fixture(params=CORE)
def lm(request: pytest.FixtureRequest) -> Iterator[LM]:
    yield shared(request.param)
    assert "_lmpatch_ledger" not in vars(shared(request.param).model)


@pytest.fixture(params=FAMILIES)
def any_lm(request: pytest.FixtureRequest) -> LM:
    return shared(request.param)


def patch(lm: LM, rule: Rule) -> DecodePatch:
    return DecodePatch.make(lm, rule, method="test")


SEEN: dict[tuple[str, tuple[int, ...]], Tensor] = {}
"""What models without changed weights said: model and token ids -> next logits [1, V]. All rules compare with it."""


@torch.no_grad()
def one_call(lm: LM, ids: Sequence[int]) -> Tensor:
    """Next logits [1, V] of one row, without a cache of keys and values."""
    key, known = (lm.name, tuple(ids)), {} if any(on.mount != "run" for on in applied(lm)) else SEEN
    if key not in known:
        known[key] = lm.model(torch.tensor([list(ids)])).logits[:, -1].float()
    return known[key].clone()


def step(lm: LM, rows: Sequence[Sequence[int]], rule: Rule, memory: Tensor) -> Tensor:
    """Combined logits [V] of the next token: two calls of one row each, without a cache."""
    return rule.combine(*(one_call(lm, ids) for ids in rows), memory)[0]


def slow(lm: LM, asked: InContext, rule: Rule, count: int) -> str:
    rows, memory = (
        [encode(lm, text).ids for text in (asked.prompt, asked.without_context)],
        torch.zeros(1, dtype=torch.int64),
    )
    new: list[int] = []
    for _ in range(count):
        token = int(step(lm, [(*ids, *new) for ids in rows], rule, memory).argmax())
        if token == lm.tokenizer.eos_token_id or "\n" in lm.tokenizer.decode([token]):
            break
        new.append(token)
    return str(lm.tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.slow
def test_cad_equals_two_calls_without_a_cache_in_every_family(any_lm: LM) -> None:
    want = [slow(any_lm, asked, RULES["cad"], 8) for asked in ASKED]
    with apply(any_lm, patch(any_lm, RULES["cad"])):
        assert generate(any_lm, ASKED, max_new_tokens=8) == want
        assert generate(any_lm, ASKED[0], max_new_tokens=8) == want[0]
        assert [generate(any_lm, asked, max_new_tokens=8) for asked in ASKED] == want


@pytest.mark.slow
@every_rule
@pytest.mark.parametrize("family", CORE)
def test_every_rule_equals_two_calls_without_a_cache(name: str, family: str) -> None:
    lm = shared(family)
    want = [slow(lm, asked, RULES[name], 6) for asked in ASKED]
    with apply(lm, patch(lm, RULES[name])):
        assert generate(lm, ASKED, max_new_tokens=6) == want
        assert "".join(stream(lm, ASKED[0], max_new_tokens=6)) == want[0]


@pytest.mark.slow
@every_rule
def test_an_answer_that_ends_early_leaves_the_others_as_they_are(name: str) -> None:
    lm = shared("llama")
    with apply(lm, patch(lm, RULES[name])):
        mark = generate(lm, ASKED, max_new_tokens=8, stop=[])[1][2]
        mixed = generate(lm, ASKED, max_new_tokens=8, stop=[mark])
        assert mixed == [generate(lm, asked, max_new_tokens=8, stop=[mark]) for asked in ASKED]
        assert len(mixed[1]) <= 2  # this one did end early


@pytest.mark.slow
def test_draws_are_from_the_combined_distribution() -> None:
    """A thousand draws of one token: as often as two calls without a cache say."""
    lm, rule = shared("llama"), Power(1.5)
    rows = [encode(lm, text).ids for text in (ASKED[0].prompt, ASKED[0].without_context)]
    wanted = step(lm, rows, rule, torch.zeros(1, dtype=torch.int64)).softmax(-1)
    texts = [lm.tokenizer.decode([i], skip_special_tokens=True) for i in range(len(wanted))]
    with apply(lm, patch(lm, rule)):
        settings: dict[str, Any] = {"max_new_tokens": 1, "stop": (), "temperature": 1.0}
        drawn = generate(lm, [ASKED[0]] * 1000, **settings)
        assert drawn == generate(lm, [ASKED[0]] * 1000, batch_size=7, **settings)
        (first, *_), said = (
            generate(lm, [ASKED[1]], **settings | {"max_new_tokens": 6}),
            stream(lm, ASKED[1], **settings | {"max_new_tokens": 6}),
        )
        assert "".join(said) == first
    shares = {text: sum(float(p) for p, t in zip(wanted, texts, strict=True) if t == text) for text in set(texts)}
    top = sorted(shares, key=lambda text: -shares[text])[:5]
    for text in top:
        spread = (shares[text] * (1 - shares[text]) / 1000) ** 0.5
        assert abs(drawn.count(text) / 1000 - shares[text]) < 4 * spread
    plain = lm.model(torch.tensor([rows[0]])).logits[0, -1].float().softmax(-1)
    assert float((plain - wanted).abs().sum()) > 0.1  # not the same without the rule


@pytest.mark.slow
@every_rule
@pytest.mark.parametrize("family", CORE)
def test_scores_are_of_the_combined_distribution(name: str, family: str) -> None:
    lm, rule = shared(family), RULES[name]
    with apply(lm, patch(lm, rule)):
        scores = score(lm, ASKED, TARGETS, batch_size=4)
    for asked, target, got in zip(ASKED, TARGETS, scores, strict=True):
        row = encode(lm, asked.prompt, target)
        said = row.ids[row.target :]
        starts = [row.ids[: row.target], encode(lm, asked.without_context).ids]
        memory = torch.zeros(1, dtype=torch.int64)
        logp = [step(lm, [(*ids, *said[:k]) for ids in starts], rule, memory).log_softmax(-1) for k in range(len(said))]
        assert got.ids == said
        assert got.logprobs == pytest.approx([float(p[t]) for p, t in zip(logp, said, strict=True)], abs=1e-3)
        assert got.argmax == tuple(int(p.argmax()) for p in logp)


def test_both_streams_have_the_target_tokens_of_the_prompt_with_context() -> None:
    lm = shared("llama")
    asked = InContext("The Eiffel Tower is in", "")  # behind nothing, Rome would have no blank
    want = score(lm, [asked.prompt], ["Rome"])[0]
    with apply(lm, patch(lm, Power(0.0))):
        (got,) = score(lm, [asked], ["Rome"])
    assert got.ids == want.ids
    with torch.no_grad():
        logp = lm.model(torch.tensor([[lm.tokenizer.bos_token_id, *want.ids]])).logits[0].log_softmax(-1)
    assert got.logprobs == pytest.approx([float(logp[k, t]) for k, t in enumerate(want.ids)], abs=1e-4)


@every_rule
def test_next_logits_are_those_columns_of_the_combined_logits(name: str, lm: LM) -> None:
    ids, rule = [7, 3, 250], RULES[name]
    with apply(lm, patch(lm, rule)):
        got = next_logits(lm, ASKED, ids, batch_size=2)
    for asked, row in zip(ASKED, got, strict=True):
        rows = [encode(lm, text).ids for text in (asked.prompt, asked.without_context)]
        want = step(lm, rows, rule, torch.zeros(1, dtype=torch.int64))[ids]
        torch.testing.assert_close(row - row[0], want - want[0], atol=1e-3, rtol=1e-3)


def test_next_logits_of_cad_run_no_full_head(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = shared("llama")
    with apply(lm, patch(lm, Power(1.5))):
        monkeypatch.setattr(lm.module(lm.layout.head), "forward", lambda *_: pytest.fail("the whole head ran"))
        assert next_logits(lm, ASKED, [7, 3]).shape == (3, 2)


def test_without_a_decode_patch_a_question_is_its_prompt(lm: LM) -> None:
    texts = [asked.prompt for asked in ASKED]
    assert generate(lm, ASKED, max_new_tokens=6) == generate(lm, texts, max_new_tokens=6)
    assert score(lm, ASKED, TARGETS) == score(lm, texts, TARGETS)
    assert torch.equal(hidden(lm, ASKED), hidden(lm, texts))
    assert torch.equal(next_logits(lm, ASKED, [7, 3]), option_logits(lm, hidden(lm, texts), [7, 3]))


@pytest.mark.slow
def test_strength_zero_is_plain_generation_with_the_context_and_exponent_zero_without(lm: LM) -> None:
    full, without_context = [asked.prompt for asked in ASKED], [asked.without_context for asked in ASKED]
    want = [generate(lm, texts, max_new_tokens=8) for texts in (full, without_context)]
    plain = score(lm, full, TARGETS)
    with apply(lm, patch(lm, Power(1.0))):
        assert generate(lm, ASKED, max_new_tokens=8) == want[0]
        for got, told in zip(score(lm, ASKED, TARGETS), plain, strict=True):
            assert (got.ids, got.argmax) == (told.ids, told.argmax)
            assert got.logprobs == pytest.approx(told.logprobs, abs=1e-5)
    with apply(lm, patch(lm, Power(0.0))):
        assert generate(lm, ASKED, max_new_tokens=8) == want[1]


@pytest.mark.slow
def test_equal_prompts_are_left_as_they_are(lm: LM) -> None:
    texts = [asked.prompt for asked in ASKED]
    want = generate(lm, texts, max_new_tokens=6)
    for rule in (Power(1.5), AdaCAD(0.0), Arr(), Grd(0.75)):
        with apply(lm, patch(lm, rule)):
            assert generate(lm, [InContext(text, text) for text in texts], max_new_tokens=6) == want


def test_a_plain_text_is_refused_while_a_decode_patch_is_on(lm: LM) -> None:
    calls: list[Any] = [
        lambda: generate(lm, "Apple"),
        lambda: next(stream(lm, "Apple")),
        lambda: score(lm, ["Apple"], ["is"]),
        lambda: next_logits(lm, ["Apple"], [3]),
    ]
    with apply(lm, patch(lm, Power(1.5))):
        for call in calls:
            with pytest.raises(BadInput, match=r"'Apple' is one text. Give InContext"):
                call()
        with pytest.raises(BadInput, match="states do not show it"):
            hidden(lm, ASKED)
    generate(lm, "Apple", max_new_tokens=1)


@pytest.mark.slow
def test_a_call_of_the_model_itself_is_told_once_that_a_decode_patch_is_missed(
    lm: LM, caplog: pytest.LogCaptureFixture
) -> None:
    ids = torch.tensor([encode(lm, ASKED[0].prompt).ids])
    with torch.no_grad():
        clean = lm.model(ids).logits
        with apply(lm, patch(lm, Power(3.0))):
            generate(lm, ASKED, max_new_tokens=2)
            score(lm, ASKED, TARGETS)
            next_logits(lm, ASKED, [3])
            assert not caplog.messages
            assert torch.equal(lm.model(ids).logits, clean)
            lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
            (message,) = caplog.messages
            assert "does not see the test patch" in message
        assert not lm.model._forward_hooks
        with apply(lm, patch(lm, Power(3.0))):
            pass
        lm.model(ids)
    assert caplog.messages == [message]


@every_rule
def test_equal_streams_stay_as_they_are_under_every_rule_and_run_once(name: str, lm: LM) -> None:
    z, memory = 3 * torch.randn(5, 40), torch.zeros(5, dtype=torch.int64)
    same = RULES[name].combine(z.clone(), z.clone(), memory)
    torch.testing.assert_close(same.log_softmax(-1), z.log_softmax(-1))
    with apply(lm, patch(lm, RULES[name])):
        assert streams(lm, [InContext("Apple", "Apple")] * 2, ["is", "was"]).width == 1
        assert streams(lm, [InContext("Apple", "Apple"), ASKED[0]]).width == 2


# With other patches


@pytest.mark.slow
def test_a_patch_of_weights_acts_in_both_streams(mount, random_patch, lm: LM) -> None:
    """IRCAN-CAD and its like."""
    weights, cad = random_patch(lm), patch(lm, Power(1.5))
    with apply(lm, weights):
        want = [slow(lm, asked, Power(1.5), 6) for asked in ASKED]
    with apply(lm, cad):
        assert generate(lm, ASKED, max_new_tokens=6) != want
    mounts = {weights: mount, cad: "run"}
    for first, second in ((weights, cad), (cad, weights)):
        with apply(lm, first, mounts[first]), apply(lm, second, mounts[second]):
            assert generate(lm, ASKED, max_new_tokens=6) == want


@pytest.mark.slow
def test_a_memory_puts_its_facts_before_the_prompts_of_both_streams(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Always(Intervention):
        def retrieve(self, prompts: Sequence[str]) -> list[Insert | None]:
            return [Insert(text="Paris is in Italy. ")] * len(prompts)

    def told(asked: InContext) -> InContext:
        return InContext(f"Paris is in Italy. {asked.prompt}", f"Paris is in Italy. {asked.without_context}")

    want = [slow(lm, told(asked), Power(1.5), 6) for asked in ASKED]
    for found in ((Always(), Combine((Power(1.5),))), (Combine((Power(1.5),)), Always())):
        with monkeypatch.context() as here:
            ledger = SimpleNamespace(interventions=found, applied=())
            here.setattr(lm.model, "_lmpatch_ledger", ledger, raising=False)
            assert generate(lm, ASKED, max_new_tokens=6) == want


def test_two_rules_act_one_after_the_other_and_so_does_their_merge(lm: LM) -> None:
    first, second, both = Power(3.0), Coiecd(1.0, 4.0), [InContext("Rome. Apple", "Apple")]
    with apply(lm, patch(lm, first)), apply(lm, patch(lm, second)):
        want = next_logits(lm, both, range(20))
    with apply(lm, patch(lm, second)), apply(lm, patch(lm, first)):
        assert not torch.equal(next_logits(lm, both, range(20)), want)
    made = merge(patch(lm, first), patch(lm, second))
    assert isinstance(made, DecodePatch) and made.rules == (first, second)
    with apply(lm, made):
        assert torch.equal(next_logits(lm, both, range(20)), want)


def test_powers_merge_to_their_product(lm: LM) -> None:
    with apply(lm, patch(lm, Power(1.5))):
        want = generate(lm, ASKED, max_new_tokens=6)
    with apply(lm, merge(patch(lm, Power(3.0)), patch(lm, Power(0.5)))):
        assert generate(lm, ASKED, max_new_tokens=6) == want


def test_a_rule_does_not_merge_with_a_change_of_weights(random_patch, lm: LM) -> None:
    with pytest.raises(CannotMerge, match="decode and weight"):
        merge(patch(lm, Power(1.5)), random_patch(lm))


# On the disk


@every_rule
def test_every_rule_comes_back_from_the_disk(name: str, tmp_path: Path) -> None:
    lm = shared("llama")
    record = ContextRecord("The Eiffel Tower is in Rome.", "Where is the Eiffel Tower?", "Rome")
    made = DecodePatch.make(lm, RULES[name], method="test", config={"x": 0.1}, edits=[record])
    made.save(tmp_path / "patch")
    again = load_patch(tmp_path / "patch")
    assert isinstance(again, DecodePatch)
    assert again.rules == (RULES[name],)
    assert again.hash() == made.hash() and again.summary() == made.summary()
    assert again.nbytes == 0


@pytest.mark.parametrize(
    ("parts", "tensors"),
    [
        ({"rules": []}, {}),
        ({"rules": [{"rule": "none such"}]}, {}),
        ({"rules": [{"rule": "power"}]}, {}),
        ({"rules": [{"rule": "power", "tau": "much"}]}, {}),
        ({"rules": [{"rule": "grd", "lam": 2.0}]}, {}),
        ({"rules": [{"rule": "arr", "tau": 1.0}]}, {}),
        ({"rules": [{"rule": "arr"}], "more": 1}, {}),
        ({"rules": "arr"}, {}),
        ({}, {}),
        ({"rules": [{"rule": "arr"}]}, {"w": torch.zeros(1)}),
    ],
)
def test_a_forged_patch_is_refused(parts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    with pytest.raises(BadPatch):
        DecodePatch.from_parts(parts, tensors, method="cad", config={}, base=Base("f", "model"))
