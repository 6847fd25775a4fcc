"""RASE-ROME: one stored ROME patch for each question and row, and none for questions that ask for no fact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from people import EDITED, NAMES, WORDINGS, people
from tiny import CORE, tiny_lm
from torch import Tensor

from lmpatch import (
    BadInput,
    BadPatch,
    CannotMerge,
    Edit,
    InContext,
    UnknownName,
    WrongModel,
    apply,
    fit,
    generate,
    load_patch,
    merge,
    score,
)
from lmpatch.inference.states import hidden
from lmpatch.methods import memit, rag, rase_rome, rome
from lmpatch.models.lm import LM
from lmpatch.patches.memory.calibrate import calibrated
from lmpatch.patches.memory.patch import MemoryPatch
from lmpatch.patches.memory.stored import Stored
from lmpatch.patches.weight.delta import Dense, LowRank
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.registry import get
from lmpatch.retrieval import load_retriever
from lmpatch.retrieval.rase import Rase

FACTS = [
    Edit("The Eiffel Tower is in", "Rome", "Eiffel Tower"),
    Edit("Steve Jobs founded", "Paris", "Steve Jobs"),
    Edit("The mother tongue of Danielle Darrieux is", "English", "Danielle Darrieux"),
]
OTHER = ["What is the weather like?", "Green ideas sleep"]
ASKED = [FACTS[1].prompt, OTHER[0], FACTS[0].prompt, OTHER[1], FACTS[2].prompt]
QUICK: dict[str, Any] = {"layer": 1, "steps": 3, "moment_tokens": 2048, "short_prefixes": 1, "long_prefixes": 0}
CFG = rase_rome.Config(**QUICK)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Statistics are kept in a folder of the test run, not the user's."""
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    yield


def singles(lm: LM) -> list[WeightPatch]:
    """The ROME patch of each fact alone, as large as a patch that was searched for long."""
    return [patch.scaled(4.0) for patch in rome.fit_each(lm, FACTS, rome.Config(**QUICK))]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5 * float(b.std()), rtol=1e-5)


@pytest.mark.parametrize("family", CORE)
def test_each_question_has_the_state_that_its_rome_patch_alone_gives(family: str) -> None:
    """In one batch. The slow form writes each dense change into the weight, one question at a time."""
    lm = tiny_lm(family)
    patches = singles(lm)
    alone = []
    for prompt in ASKED:
        own = [patch for patch, fact in zip(patches, FACTS, strict=True) if fact.prompt == prompt]
        dense = [{name: Dense(delta.dense()) for name, delta in patch.deltas.items()} for patch in own]  # type: ignore[attr-defined]
        with apply(lm, WeightPatch.make(lm, dense[0] if dense else {}, method="slow"), mount="bake"):
            alone.append(hidden(lm, [prompt])[0])
    with apply(lm, rase_rome.store(lm, patches, CFG)):
        close(hidden(lm, ASKED), torch.stack(alone))


@pytest.mark.parametrize("family", CORE)
def test_a_row_of_a_batch_is_answered_and_scored_as_alone(family: str) -> None:
    lm = tiny_lm(family)
    with apply(lm, rase_rome.store(lm, singles(lm), CFG)):
        answers = generate(lm, ASKED, max_new_tokens=6, stop=())
        assert answers == [generate(lm, prompt, max_new_tokens=6, stop=()) for prompt in ASKED]
        targets = [f" {answer}" if answer.strip() else " Rome" for answer in answers]  # of several lengths
        for prompt, target, both in zip(ASKED, targets, score(lm, ASKED, targets), strict=True):
            (single,) = score(lm, [prompt], [target])
            assert both.total == pytest.approx(single.total, rel=1e-4, abs=1e-4)


def test_a_row_that_goes_on_when_others_have_ended_keeps_its_own_change() -> None:
    lm = tiny_lm("llama")
    patch = rase_rome.store(lm, singles(lm), CFG)
    with apply(lm, patch):
        whole = generate(lm, ASKED, max_new_tokens=12, stop=())
        short = {i: len(text) // 2 for i, text in enumerate(whole) if i % 2 == 0}  # more than a quarter leave the batch
        cut = generate(lm, ASKED, max_new_tokens=12, stop=(), enough=lambda i, text: len(text) > short.get(i, 999))
    assert [cut[i] for i in (1, 3)] == [whole[i] for i in (1, 3)]
    rest = [i for i in short if len(cut[i]) < len(whole[i])]
    assert rest and all(whole[i].startswith(cut[i][:1]) for i in rest)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_questions_are_answered_bit_for_bit_as_without_it_in_a_mixed_batch_too(
    family: str, dtype: torch.dtype
) -> None:
    lm = tiny_lm(family, dtype)
    clean, mixed = hidden(lm, OTHER), hidden(lm, ASKED)
    with apply(lm, rase_rome.store(lm, singles(lm), CFG)):
        assert torch.equal(hidden(lm, OTHER), clean)
        now = hidden(lm, ASKED)
    assert torch.equal(now[[1, 3]], mixed[[1, 3]])
    assert not any(torch.equal(now[i], mixed[i]) for i in (0, 2, 4))
    assert torch.equal(hidden(lm, ASKED), mixed)


def test_with_a_decode_rule_each_stream_has_the_change_that_its_own_prompt_asks_for() -> None:
    lm = tiny_lm("llama")
    asked = [InContext(f"Some text. {prompt}", OTHER[0]) for prompt in ASKED]
    with apply(lm, rase_rome.store(lm, singles(lm), CFG)), apply(lm, fit(lm, "cad", [], alpha=0.5)):
        both = score(lm, asked, [" Rome"] * len(asked))
        single = [score(lm, [one], [" Rome"])[0].total for one in asked]
    assert [one.total for one in both] == pytest.approx(single, rel=1e-4, abs=1e-4)


def test_two_memories_act_together_each_with_its_own_change() -> None:
    lm = tiny_lm("llama")
    first, second, third = singles(lm)
    with apply(lm, rase_rome.store(lm, [first, second], CFG)), apply(lm, rase_rome.store(lm, [third], CFG)):
        both = hidden(lm, ASKED)
    with apply(lm, rase_rome.store(lm, [first, second, third], CFG)):
        close(both, hidden(lm, ASKED))


def test_a_plain_forward_of_the_model_misses_it() -> None:
    lm = tiny_lm("llama")
    ids = torch.tensor([lm.tokenizer(FACTS[0].prompt)["input_ids"]])
    clean = lm.model(ids).logits
    with apply(lm, rase_rome.store(lm, singles(lm), replace(CFG, gate="always"))):
        assert torch.equal(lm.model(ids).logits, clean)


def test_fit_stores_what_rome_finds_for_each_fact_alone() -> None:
    lm = tiny_lm("llama")
    patch = rase_rome.fit(lm, FACTS, CFG)
    assert patch.changes is not None and len(patch.changes) == 3
    for i, single in enumerate(rome.fit_each(lm, FACTS, rome.Config(**QUICK))):
        (want,), (got,) = single.deltas.values(), patch.changes.delta(i).values()
        torch.testing.assert_close(got.dense(), want.dense(), atol=1e-6, rtol=1e-5)  # type: ignore[attr-defined]
    each = rase_rome.fit_each(lm, FACTS, CFG)
    assert [one.edits for one in each] == [(edit,) for edit in patch.edits]
    assert merge(*each).hash() == patch.hash()


def test_a_later_fact_of_one_prompt_supersedes_the_earlier_with_its_change() -> None:
    lm = tiny_lm("llama")
    old, new = rase_rome.fit_each(lm, [FACTS[0], replace_target(FACTS[0], "Oslo")], CFG)
    assert old.edits == new.edits  # of one prompt the later counts in fit_each, too
    first = rase_rome.fit(lm, FACTS[:1], CFG)
    again = rase_rome.fit(lm, [replace_target(FACTS[0], "Oslo")], CFG)
    both = merge(first, again)
    assert isinstance(both, MemoryPatch) and both.changes and again.changes and len(both.changes) == 1
    assert torch.equal(both.changes.delta(0).popitem()[1].b, again.changes.delta(0).popitem()[1].b)


def replace_target(edit: Edit, target: str) -> Edit:
    return Edit(edit.prompt, target, edit.subject)


def test_a_patch_of_another_method_is_refused_and_one_of_several_facts_and_one_of_another_weight(
    tmp_path: Path,
) -> None:
    lm = tiny_lm("llama")
    patches = singles(lm)
    edits, settings = memit.example(lm)
    for wrong, why in (
        (memit.fit(lm, edits, settings), "rome or r_rome, found one of memit"),
        (rag.fit(lm, FACTS, rag.Config()), "rome or r_rome, found one of rag"),
        (rome.fit(lm, FACTS, rome.Config(**QUICK)), "of one fact, found one of 3"),
        (rome.fit(lm, FACTS[:1], rome.Config(**{**QUICK, "layer": 2})), "Fit them with one layer"),
    ):
        with pytest.raises(BadInput, match=why):
            rase_rome.store(lm, [*patches, wrong], CFG)
    with pytest.raises(WrongModel):
        rase_rome.store(tiny_lm("llama", seed=1), patches, CFG)


def test_memories_of_other_methods_weights_or_settings_do_not_merge() -> None:
    lm = tiny_lm("llama")
    patch = rase_rome.store(lm, singles(lm), CFG)
    with pytest.raises(CannotMerge, match="rag and rase_rome"):
        merge(rag.fit(lm, FACTS, rag.Config()), patch)
    with pytest.raises(CannotMerge, match="equal settings"):
        merge(patch, rase_rome.store(lm, singles(lm), replace(CFG, threshold=0.7)))
    with pytest.raises(CannotMerge, match="other weights"):
        merge(patch, rase_rome.fit(lm, FACTS[:1], replace(CFG, layer=2)))
    with pytest.raises(CannotMerge, match="another does not"):
        merge(patch, replace(patch, changes=None))


def test_r_rome_in_capitals_is_refused_and_every_method_it_may_mean_is_listed() -> None:
    for name in ("R-ROME", "r-rome", "R_ROME"):
        with pytest.raises(UnknownName) as caught:
            get("methods", name)
        for own in ("rome is ROME", "r_rome is r-ROME", "rase_rome is RASE-ROME"):
            assert own in str(caught.value)
    assert get("methods", "r_rome") is rome.r_rome and get("methods", "rase_rome") is rase_rome


@pytest.mark.parametrize(
    "wrong",
    [{"threshold": 1.5}, {"threshold": -0.1}, {"lead": 2.0}, {"spread": -1.0}, {"floor": 1.2}, {"nearest": 0}],
)
def test_a_bound_out_of_range_is_refused_before_anything_is_searched(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        rase_rome.fit(tiny_lm("llama"), FACTS, replace(CFG, **wrong))


def unit(*numbers: float) -> Tensor:
    v = torch.tensor(numbers, dtype=torch.float32)
    return v / v.norm()


def test_the_second_look_is_the_mean_of_two_cosines_and_the_best_fires_where_it_stands_out() -> None:
    one = Rase("e", "f", 4, rivals=5, lead=0.25, spread=0.05, floor=0.5)
    query = unit(1, 0)
    keys = torch.stack([torch.cat([unit(1, 1), unit(1, 2)]), torch.cat([unit(0, 1), unit(0, 1)])])
    scores, fires = one.rank(query, keys)
    want = (2**-0.5 + 5**-0.5) / 2
    torch.testing.assert_close(scores, torch.tensor([want, 0.0]))
    assert fires  # leads by 0.58, and 0.58 > 0.5
    assert not one.rank(query, keys[:1])[1]  # alone it stands out of nothing
    for bound in ({"lead": 0.6}, {"spread": 0.3}, {"floor": 0.6}, {"lead": None}):
        changed = Rase("e", "f", 4, **{"rivals": 5, "lead": 0.25, "spread": 0.05, "floor": 0.5, **bound})  # type: ignore[arg-type]
        assert not changed.rank(query, keys)[1]


def test_the_second_look_may_choose_another_fact_than_the_first() -> None:
    lm = tiny_lm("llama")
    patch = rase_rome.store(lm, singles(lm)[:2], replace(CFG, gate="always"))
    e = patch.retriever.matched
    query = patch.retriever.queries(["Where is it?"])[0]
    away = torch.nn.functional.normalize(torch.randn(e, generator=torch.Generator().manual_seed(0)), dim=-1)
    near = torch.nn.functional.normalize(query + 0.5 * away, dim=-1)
    keys = torch.stack([torch.cat([query, -query]), torch.cat([near, query])]).half()
    (hits,) = replace(patch, keys=keys).finder().search(["Where is it?"])
    assert [hit.place for hit in hits] == [1]  # the first has the nearest prompt, the second the nearest sentence
    assert hits[0].score == pytest.approx((float(near @ query) + 1) / 2, abs=1e-3)


@pytest.mark.parametrize("wrong", [{"rivals": 0}, {"rivals": "5"}, {"lead": "x"}, {"lead": float("nan")}, {"width": 7}])
def test_parts_of_another_form_are_refused(wrong: dict[str, Any]) -> None:
    parts = Rase("e", "f", 8, 5, 0.25).parts()
    assert load_retriever("rase", parts, {}).parts() == parts
    with pytest.raises(BadPatch, match="no rase retriever"):
        load_retriever("rase", parts | wrong, {})


def test_stored_changes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    patch = rase_rome.store(lm, singles(lm), CFG)
    common = {name: getattr(patch, name) for name in ("method", "config", "base", "edits")}
    parts, tensors = patch.parts(), patch.tensors()
    assert MemoryPatch.from_parts(parts, tensors, **common).hash() == patch.hash()
    (weight,) = parts["changes"]["weights"]
    b, a = (tensors[f"change/{weight}/{side}"] for side in "ba")
    lies: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
        ({"weights": []}, {}), ({"weights": [5]}, {}), ({"weights": ["x"]}, {}), ({"shared": 1}, {}),
        ({"shared": True}, {}), ({"rows": "some"}, {}), ({}, {"b": b[:2]}), ({}, {"a": a.long()}), ({}, {"a": a[:, 0]}),
        ({}, {"b": b[:2], "a": a[:2]}), ({}, {"a": a * torch.inf}),
    ]  # fmt: skip
    for own, changed in lies:
        wrong = {**tensors, **{f"change/{weight}/{side}": t for side, t in changed.items()}}
        with pytest.raises(BadPatch):
            MemoryPatch.from_parts({**parts, "changes": {**parts["changes"], **own}}, wrong, **common)
    narrow = Stored.of([{weight: LowRank(torch.ones(3, 1), torch.ones(1, 5))}] * 3)
    with pytest.raises(WrongModel, match="5"):
        apply(lm, replace(patch, changes=narrow))
    patch.save(tmp_path / "patch")
    with pytest.raises(WrongModel):
        apply(tiny_lm("llama", seed=1), load_patch(tmp_path / "patch"))


def test_a_calibrated_threshold_is_the_lowest_that_fires_no_more_than_its_share() -> None:
    lm = tiny_lm("llama")
    patch = rag.fit(lm, FACTS, rag.Config())
    questions = [f"Who is in room {i} of the tower?" for i in range(40)]

    def fires(threshold: float) -> float:
        finder = replace(patch, scope=replace(patch.scope, threshold=threshold)).finder()
        return sum(hit.fired for (hit,) in finder.search(questions)) / len(questions)

    threshold = calibrated(patch, questions, share=0.1)
    assert fires(threshold) <= 0.1 < fires(threshold - 1e-6)
    with pytest.raises(BadInput, match="Give 100 or more"):
        calibrated(patch, questions)


@pytest.mark.slow
@pytest.mark.xdist_group("people")
def test_many_facts_are_as_good_as_few_while_rome_falls() -> None:
    """Shares of prompts answered with the new home, at 10 and at 300 facts."""
    known = people()
    lm, edits = known.lm, known.edits(EDITED[:300])
    text = [f"{wording.format(name)} {known.homes[name]}" for wording in WORDINGS for name in NAMES]
    settings: dict[str, Any] = {"layer": 2, "steps": 40, "lr": 0.6, "clamp": 10.0, "kl": 0.0, "moment_tokens": 2048}
    settings |= {"short_prefixes": 0, "long_prefixes": 0}
    rest = EDITED[300:]

    def shares(patch: object, count: int) -> tuple[float, float]:
        """New homes of the edited, and old ones of the others."""
        with apply(lm, patch):  # type: ignore[arg-type]
            return _right(known, edits[:count]), known.right(
                [WORDINGS[0].format(name) for name in rest], [known.homes[name] for name in rest]
            )

    memory = rase_rome.fit(lm, edits, rase_rome.Config(**settings), text=text)
    few, many = shares(memory.of(range(10)), 10), shares(memory, 300)
    written = [shares(rome.fit(lm, edits[:n], rome.Config(**settings), text=text), n) for n in (10, 300)]
    clean = known.right([WORDINGS[0].format(name) for name in rest], [known.homes[name] for name in rest])
    assert many[0] >= few[0] - 0.02 and many[0] >= 0.9
    assert few[1] == clean and many[1] >= clean - 0.06
    assert written[0][0] >= 0.9 and written[1][0] < many[0] - 0.3 and written[1][1] < many[1] - 0.3


def _right(known: Any, edits: Sequence[Edit]) -> float:
    return float(known.right([edit.prompt for edit in edits], [edit.target for edit in edits]))
