"""A change that acts only in a context: there it does what it always would, elsewhere it leaves every bit."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshot import changed, state
from tiny import tiny_lm

from lmpatch.data.context import InContext
from lmpatch.errors import BadPatch, CannotMerge, CannotMount, WrongModel
from lmpatch.inference.generate import generate
from lmpatch.inference.interventions import Prompt
from lmpatch.inference.multiple_choice import next_logits
from lmpatch.inference.plain_text import perplexity
from lmpatch.inference.score import score
from lmpatch.inference.states import hidden
from lmpatch.models.lm import LM
from lmpatch.patches.decode.patch import DecodePatch
from lmpatch.patches.decode.rules import Power
from lmpatch.patches.export import export
from lmpatch.patches.file import load_patch
from lmpatch.patches.ledger import apply
from lmpatch.patches.merge import merge
from lmpatch.patches.weight.delta import Delta, LowRank, Scale, When
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.provenance import hash_json

QUESTIONS = ["The Eiffel Tower is in", "The mother tongue of Danielle Darrieux is", "Apple"]
ASKED = [InContext(f"It is said to be Rome. {q}", q) for q in QUESTIONS]
ALONE = [InContext(q, q) for q in QUESTIONS]
FORMS = ["scale", "low_rank"]


def patch_of(lm: LM, when: When, form: str = "scale", layer: int = 1, factor: float = 4.0) -> WeightPatch:
    source, d, f = torch.Generator().manual_seed(2), lm.layout.d_model, lm.layout.widths[layer]
    delta: Delta = Scale(torch.arange(20), torch.full((20,), factor), (d, f), when=when)
    if form == "low_rank":
        delta = LowRank(torch.randn(d, 2, generator=source), 0.1 * torch.randn(2, f, generator=source), when=when)
    return WeightPatch.make(lm, {lm.layout.weight(lm.layout.downs[layer]): delta}, method="push")


def all_logits(lm: LM, prompts: list[Prompt], **how: Any) -> torch.Tensor:
    return next_logits(lm, prompts, range(lm.layout.vocab), **how)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_context_every_bit_stays(lm: LM, form: str) -> None:
    plain: list[Prompt] = [*QUESTIONS, *ALONE]
    before = all_logits(lm, plain), hidden(lm, plain), score(lm, plain, ["Rome"] * 6), perplexity(lm)
    texts = generate(lm, plain, max_new_tokens=5, stop=())
    with apply(lm, patch_of(lm, "context", form)):
        after = all_logits(lm, plain), hidden(lm, plain), score(lm, plain, ["Rome"] * 6), perplexity(lm)
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
        assert before[2:] == after[2:]
        assert generate(lm, plain, max_new_tokens=5, stop=()) == texts


@pytest.mark.parametrize("form", FORMS)
def test_in_a_context_it_does_what_it_always_would(lm: LM, form: str) -> None:
    clean = all_logits(lm, [*ASKED])
    with apply(lm, patch_of(lm, "always", form), mount="side"):
        want, texts = all_logits(lm, [*ASKED]), generate(lm, ASKED, max_new_tokens=6, stop=())
        scores = score(lm, ASKED, ["Rome"] * 3)
    with apply(lm, patch_of(lm, "context", form)) as on:
        assert on.mount == "side"
        assert torch.equal(all_logits(lm, [*ASKED]), want)
        assert generate(lm, ASKED, max_new_tokens=6, stop=()) == texts
        assert score(lm, ASKED, ["Rome"] * 3) == scores
    assert not torch.allclose(clean, want, atol=1e-2)
    assert torch.equal(all_logits(lm, [*ASKED]), clean)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_one_batch_each_get_their_own(lm: LM, form: str) -> None:
    """Among them the same text, said to carry a context and not."""
    mixed: list[Prompt] = [ASKED[0], QUESTIONS[0], ASKED[1].prompt, ASKED[1], ALONE[2], ASKED[2]]
    has = torch.tensor([True, False, False, True, False, True])
    clean, said = all_logits(lm, mixed), generate(lm, mixed, max_new_tokens=6, stop=())
    with apply(lm, patch_of(lm, "always", form), mount="side"):
        moved, told = all_logits(lm, mixed), generate(lm, mixed, max_new_tokens=6, stop=())
    with apply(lm, patch_of(lm, "context", form)):
        found = all_logits(lm, mixed)
        assert torch.equal(found, torch.where(has[:, None], moved, clean))
        want = [t if on else s for t, s, on in zip(told, said, has.tolist(), strict=True)]
        assert generate(lm, mixed, max_new_tokens=6, stop=()) == want
        one_by_one = torch.cat([all_logits(lm, [prompt]) for prompt in mixed])
        assert torch.allclose(found, one_by_one, atol=1e-4)


def test_a_norm_behind_the_mlp_is_scaled_in_a_context_only() -> None:
    lm = tiny_lm("gemma3")
    name = "model.layers.1.post_feedforward_layernorm.weight"

    def norm(when: When) -> WeightPatch:
        scale = Scale(torch.tensor([0]), torch.tensor([0.25]), (lm.layout.d_model, 1), when=when)
        return WeightPatch.make(lm, {name: scale}, method="mute")

    mixed: list[Prompt] = [ASKED[0], QUESTIONS[0]]
    clean = all_logits(lm, mixed)
    with apply(lm, norm("always"), mount="side"):
        moved = all_logits(lm, mixed)
    with apply(lm, norm("context")):
        found = all_logits(lm, mixed)
    assert torch.equal(found[0], moved[0]) and torch.equal(found[1], clean[1])
    assert not torch.allclose(moved, clean, atol=1e-3)


def test_a_decode_rule_compares_it_with_the_untouched_stream(lm: LM) -> None:
    prompts: list[Prompt] = [*ASKED]
    with apply(lm, patch_of(lm, "always"), mount="side"):
        with_context = all_logits(lm, [a.prompt for a in ASKED])
    without = all_logits(lm, QUESTIONS)
    with ExitStack() as stack:
        for each in (patch_of(lm, "context"), DecodePatch.make(lm, Power(1.5), method="cad")):
            stack.enter_context(apply(lm, each))
        gap = all_logits(lm, prompts) - (1.5 * with_context - 0.5 * without)
    assert (gap - gap[:, :1]).abs().max() < 1e-3


@pytest.mark.parametrize("first", ["always", "context"])
def test_it_shares_a_weight_with_changes_that_always_act(lm: LM, first: When) -> None:
    before, second = state(lm), "context" if first == "always" else "always"
    whens: tuple[When, ...] = (first, second)  # type: ignore[assignment]
    parts = {"always": patch_of(lm, "always", "low_rank"), "context": patch_of(lm, "context", "scale")}
    with apply(lm, parts["always"], mount="side"):
        plain = all_logits(lm, [*QUESTIONS])
    with apply(lm, parts["always"], mount="side"), apply(lm, patch_of(lm, "always", "scale"), mount="side"):
        both = all_logits(lm, [*ASKED])
    with ExitStack() as stack:
        for when in whens:
            stack.enter_context(apply(lm, parts[when], mount="side"))
        assert torch.equal(all_logits(lm, [*QUESTIONS]), plain)
        assert torch.allclose(all_logits(lm, [*ASKED]), both, atol=1e-4)
    assert not changed(before, state(lm))


def test_a_file_keeps_when_it_acts(lm: LM, tmp_path: Path) -> None:
    always, gated = patch_of(lm, "always"), patch_of(lm, "context")
    assert always.hash() != gated.hash()
    for name, patch in (("always", always), ("context", gated)):
        patch.save(tmp_path / name)
        again = load_patch(tmp_path / name)
        assert again.hash() == patch.hash() and again.mounts == patch.mounts
        assert [d.when for d in again.deltas.values()] == [name]  # type: ignore[attr-defined]
    kinds = [json.loads((tmp_path / name / "patch.json").read_text())["parts"] for name in ("always", "context")]
    assert [[part["kind"] for part in parts.values()] for parts in kinds] == [["scale"], ["scale in context"]]
    assert "only in a context" in gated.summary() and "context" not in always.summary()


def test_a_time_that_is_none_is_refused(lm: LM, tmp_path: Path) -> None:
    from lmpatch.patches.format import sealed

    patch_of(lm, "context").save(tmp_path / "p")
    header = json.loads((tmp_path / "p/patch.json").read_text())
    for part in header["parts"].values():
        part["kind"] = "scale in summer"
    (tmp_path / "p/patch.json").write_bytes(sealed(header))
    with pytest.raises(BadPatch, match="cannot be read"):
        load_patch(tmp_path / "p")
    assert hash_json(header)  # the header itself is whole


@pytest.mark.parametrize("to", ["peft", "checkpoint"])
def test_what_acts_in_a_context_is_not_baked_nor_exported(lm: LM, to: Any, tmp_path: Path) -> None:
    patch = patch_of(lm, "context")
    with pytest.raises(CannotMount, match="only where one carries a context. Fit it again with when='always'"):
        apply(lm, patch, mount="bake")
    with pytest.raises(CannotMount, match="--set when=always"):
        export(lm, patch, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merged_it_still_acts_in_a_context_only_and_never_with_one_that_always_acts(lm: LM) -> None:
    both = merge(patch_of(lm, "context"), patch_of(lm, "context", factor=0.5))
    assert both.only_in_context
    clean = all_logits(lm, [*QUESTIONS])
    with apply(lm, both):
        assert torch.equal(all_logits(lm, [*QUESTIONS]), clean)
    with pytest.raises(CannotMerge, match="always and another only where a prompt carries a context"):
        merge(patch_of(lm, "context"), patch_of(lm, "always"))
    apart = merge(patch_of(lm, "context"), patch_of(lm, "always", layer=2))
    assert apart.mounts == ("side",)


def test_a_call_that_is_not_lmpatchs_sees_nothing_of_it(lm: LM) -> None:
    ids = torch.tensor([lm.tokenizer(ASKED[0].prompt)["input_ids"]])
    with torch.no_grad():
        before = lm.model(ids).logits
        with apply(lm, patch_of(lm, "context")):
            assert torch.equal(lm.model(ids).logits, before)


def test_the_head_cannot_tell_rows_apart() -> None:
    lm = tiny_lm("llama")
    scale = Scale(torch.tensor([0]), torch.tensor([2.0]), (lm.layout.vocab, lm.layout.d_model), when="context")
    patch = WeightPatch.make(lm, {"lm_head.weight": scale}, method="push")
    with pytest.raises(WrongModel, match="where no row is told from another"):
        apply(lm, patch)
