"""LTE: a model is taught once to use updated information; facts are then text, and other questions are left alone."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from people import EDITED, TAUGHT, WORDINGS, people
from tiny import CORE, tiny_lm
from torch.nn import functional as F

import lmpatch as lp
from lmpatch import Ask, BadInput, BadPatch, CannotMerge, Edit, apply, merge
from lmpatch.inference.states import hidden
from lmpatch.inference.tokens import end_token
from lmpatch.memory.memory import Memory
from lmpatch.methods import lte, rag, rase_rome
from lmpatch.methods.lte.align import Align, nearest
from lmpatch.models.lm import LM
from lmpatch.patches.editor import Editor, load_editor
from lmpatch.patches.memory.patch import MemoryPatch, retriever_of
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.retrieval.lte import line
from lmpatch.training import adapter
from lmpatch.training.facts import Split

FACTS = [Edit("The Eiffel Tower is in", "Rome", "Eiffel Tower"), Edit("Steve Jobs founded", "Paris", "Steve Jobs")]
OTHER = ["What is the weather like?", "Green ideas sleep"]
ASKED = [FACTS[1].prompt, OTHER[0], FACTS[0].prompt]
PLACES = [("Paris", "Rome"), ("Italy", "France"), ("Japan", "Seattle"), ("Cairo", "Oslo")]
DATA = [
    Edit(
        f"The {thing} of {place} is in", answer, f"{thing} of {place}",
        rephrases=[f"You find the {thing} of {place} in"],
        locality={"same_relation": [Ask(f"The river of {place} is the", ("Seine",))]},
    )
    for thing in ("tower", "museum", "opera")
    for place, answer in PLACES
]  # fmt: skip
QUICK = lte.Training(rank=2, epochs=2, batch=4, answer_tokens=3, validate=2, validate_every=2, save_every=1, warmup=0)
OFTEN = lte.Config(threshold=0.9)


def editor_of(lm: LM) -> Editor:
    return lte.example_editor(lm)


@pytest.fixture(scope="module")
def whole() -> Editor:
    """A training that was not stopped."""
    return lte.train(tiny_lm("llama"), DATA, QUICK)


@pytest.mark.parametrize("family", CORE)
def test_a_question_is_answered_behind_the_fact_by_the_aligned_model_and_any_other_bit_for_bit_as_before(
    family: str,
) -> None:
    """In one batch; the slow form adapts the whole model and writes the line by hand."""
    lm = tiny_lm(family)
    clean, mixed = hidden(lm, OTHER), hidden(lm, ASKED)
    behind = [line(FACTS[1].prompt, FACTS[1].target) + ASKED[0], line(FACTS[0].prompt, FACTS[0].target) + ASKED[2]]
    with apply(lm, lte.alignment(lm, editor_of(lm)), mount="bake"):
        want = torch.stack([hidden(lm, [text])[0] for text in behind])
    with apply(lm, lte.fit(lm, FACTS, OFTEN, editor=editor_of(lm))):
        assert torch.equal(hidden(lm, OTHER), clean)
        now = hidden(lm, ASKED)
    torch.testing.assert_close(now[[0, 2]], want, atol=1e-5 * float(want.std()), rtol=1e-5)
    torch.testing.assert_close(now[1], mixed[1], atol=1e-5 * float(want.std()), rtol=1e-5)  # beside longer rows


def test_a_row_without_a_fact_is_the_same_to_the_bit_beside_rows_with_one() -> None:
    lm = tiny_lm("llama")
    patch = lte.fit(lm, FACTS, OFTEN, editor=editor_of(lm))
    with apply(lm, replace(patch, changes=None)):
        text_alone = hidden(lm, ASKED)
    with apply(lm, patch):
        now = hidden(lm, ASKED)
    assert torch.equal(now[1], text_alone[1]) and not torch.allclose(now[0], text_alone[0])


def test_with_acts_all_the_aligned_model_sees_the_bare_question_and_with_none_the_model_as_it_is_sees_the_fact() -> (
    None
):
    lm = tiny_lm("llama")
    editor = editor_of(lm)
    with apply(lm, lte.alignment(lm, editor), mount="side"):
        aligned = hidden(lm, OTHER)
    with apply(lm, lte.fit(lm, FACTS, replace(OFTEN, acts="all"), editor=editor)):
        torch.testing.assert_close(hidden(lm, OTHER), aligned, atol=1e-5, rtol=1e-5)
    told = hidden(lm, [line(FACTS[0].prompt, FACTS[0].target) + FACTS[0].prompt])
    with apply(lm, lte.fit(lm, FACTS, replace(OFTEN, acts="none"), editor=editor)):
        assert torch.equal(hidden(lm, [FACTS[0].prompt]), told)


def test_several_facts_are_lines_one_below_the_other() -> None:
    lm = tiny_lm("llama")
    patch = lte.fit(lm, FACTS, lte.Config(gate="always", top_k=2), editor=editor_of(lm))
    (insert,) = patch.intervention(lm).retrieve([FACTS[0].prompt])
    assert insert is not None and insert.change is not None
    assert insert.text == (
        "Updated information: The Eiffel Tower is in Rome.\nUpdated information: Steve Jobs founded Paris.\n"
    )


def test_the_threshold_of_the_editor_counts_unless_one_is_given(whole: Editor) -> None:
    lm = tiny_lm("llama")
    assert lte.fit(lm, FACTS, lte.Config(), editor=whole).scope.threshold == whole.config["threshold"]
    assert lte.fit(lm, FACTS, lte.Config(threshold=0.5), editor=whole).scope.threshold == 0.5
    for wrong in ({"threshold": 1.5}, {"top_k": 0}):
        with pytest.raises(BadInput, match="Give 1 or more facts, and a cosine"):
            lte.fit(lm, FACTS, lte.Config(**wrong), editor=whole)  # type: ignore[arg-type]


def test_training_calibrates_the_threshold_on_questions_it_did_not_learn_from() -> None:
    lm = tiny_lm("llama")
    unrelated = [Ask(f"Who lives in house {i} of the street?", ("Bob",)) for i in range(30)]
    data = lte.TrainingData(DATA, unrelated)
    editor = lte.train(lm, data, replace(QUICK, epochs=1, false_fires=0.1))
    assert editor.made["calibrated_on"] >= 30
    split = Split.of(DATA, unrelated, QUICK.validate, QUICK.seed, QUICK.batch)
    finder = lte.fit(lm, split.edits, lte.Config(), editor=editor).finder()
    texts = [ask.prompt for ask in unrelated] + [
        ask.prompt for edit in DATA for _, asks in edit.locality for ask in asks
    ]
    texts += [text for edit in split.held for text in (edit.prompt, *edit.rephrases)]
    texts = list(dict.fromkeys(texts))
    fired = sum(hit.fired for (hit,) in finder.search(texts))
    assert len(texts) == editor.made["calibrated_on"] and fired == int(0.1 * len(texts))


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on_to_the_same_editor(tmp_path: Path, whole: Editor) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lte.train(tiny_lm("llama"), DATA, QUICK, out=tmp_path / "run", progress=stop)
    resumed = lte.train(tiny_lm("llama"), DATA, QUICK, out=tmp_path / "run")
    assert resumed.hash() == whole.hash() and resumed.config == whole.config
    assert any(t.any() for name, t in whole.tensors.items() if name.endswith("/b"))
    points = [json.loads(row) for row in (tmp_path / "run" / "alignment.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == [2, 4] and {"told", "bare", "beside", "other"} <= set(points[0])
    with pytest.raises(BadInput, match="another run"):
        lte.train(tiny_lm("llama"), DATA, replace(QUICK, lr=1e-3), out=tmp_path / "run")


def test_training_leaves_the_model_as_it_was_and_the_editor_is_saved_whole(tmp_path: Path, whole: Editor) -> None:
    lm = tiny_lm("llama")
    before = lm.fingerprint()
    lp.train(lm, "lte", DATA, **{**vars(QUICK), "epochs": 1})
    assert lm.fingerprint() == before
    whole.save(tmp_path / "e.safetensors")
    loaded = load_editor(tmp_path / "e.safetensors")
    first, second = (lte.fit(lm, FACTS, lte.Config(), editor=one) for one in (whole, loaded))
    assert first.hash() == second.hash()


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"batch": 0}, {"epochs": 0}, {"verbatim": 1.5}, {"false_fires": -0.1}])
def test_a_setting_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        lte.train(tiny_lm("llama"), DATA, replace(QUICK, **wrong))


def test_without_an_editor_the_message_says_how_to_train_one_and_how_long_that_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = tiny_lm("llama")
    before = lm.fingerprint()
    with pytest.raises(BadInput, match=r"no lte editor for tiny-llama .*lmpatch train .* takes about \d+ minutes here"):
        lp.fit(lm, "lte", FACTS)
    assert lm.fingerprint() == before


def test_an_editor_or_a_patch_of_another_method_is_refused() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(BadPatch, match="editor of rag, lte was asked for"):
        lte.fit(lm, FACTS, OFTEN, editor=rag.editor_for(lm))
    patch = lte.fit(lm, FACTS, OFTEN, editor=editor_of(lm))
    with pytest.raises(CannotMerge, match="lte and rag"):
        merge(patch, rag.fit(lm, FACTS, rag.Config()))
    with pytest.raises(CannotMerge, match="lte and rase_rome"):
        merge(patch, rase_rome.fit(lm, FACTS, rase_rome.example(lm)[1]))
    other = editor_of(lm)
    other.tensors = {name: 2 * tensor for name, tensor in other.tensors.items()}
    with pytest.raises(CannotMerge, match="other weights"):
        merge(patch, lte.fit(lm, FACTS, OFTEN, editor=other))


def test_memories_of_one_editor_hold_the_facts_of_all_and_the_lora_once() -> None:
    lm = tiny_lm("llama")
    editor = editor_of(lm)
    each = lte.fit_each(lm, FACTS, OFTEN, editor=editor)
    assert merge(*each).hash() == lte.fit(lm, FACTS, OFTEN, editor=editor).hash()


def test_a_memory_on_disk_puts_the_lora_behind_its_facts(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    memory = Memory.create(tmp_path / "store", editor_of(lm))
    memory.add(FACTS)
    with apply(lm, lte.fit(lm, FACTS, OFTEN, editor=editor_of(lm))):
        want = hidden(lm, ASKED)
    for patch in (memory.patch(), memory.snapshot()):
        with apply(lm, patch):
            torch.testing.assert_close(hidden(lm, ASKED), want, atol=1e-6, rtol=1e-6)


def test_the_alignment_is_exported_as_an_adapter(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    found = lp.export(lm, lte.alignment(lm, editor_of(lm)), "peft", tmp_path / "adapter")
    assert set(found.ranks.values()) == {2}
    with pytest.raises(BadInput, match="cannot be a LoRA adapter"):
        lp.export(lm, lte.fit(lm, FACTS, OFTEN, editor=editor_of(lm)), "peft", tmp_path / "memory")


def task_of(lm: LM, **settings: Any) -> Align:
    cfg = replace(QUICK, **settings)
    split = Split.of(DATA, (), 2, cfg.seed, cfg.batch)
    return Align(lm, split, nearest(retriever_of(editor_of(lm)), split.edits, cfg.near), cfg)


def text(lm: LM, ids: Any) -> str:
    return str(lm.tokenizer.decode(list(ids), skip_special_tokens=True))


def test_a_step_has_four_rows_of_each_fact() -> None:
    lm = tiny_lm("llama")
    task = task_of(lm, several=0.0, verbatim=1.0, answer_tokens=8)
    places, samples, draw = task.split.batch(0, 4, 0)
    rows = task.rows(places, samples, draw)
    for row, s in zip(rows["told"], samples, strict=True):
        assert text(lm, row.ids[: row.target]) == line(s.prompt, s.target) + s.prompt
        assert text(lm, row.ids[row.target : -1]).strip() == s.target and row.ids[-1] == end_token(lm)
    for kind, before, questions in (
        ("bare", ["" for _ in samples], [s.prompt for s in samples]),
        ("other", ["" for _ in samples], [s.other for s in samples]),
        ("beside", [line(s.prompt, s.target) for s in samples], [s.other for s in samples]),
    ):
        own = [answer.strip() for answer in lp.generate(lm, questions, max_new_tokens=8)]
        want = [(b + q, a) for b, q, a in zip(before, questions, own, strict=True) if a]
        got = {(text(lm, row.ids[: row.target]), text(lm, row.ids[row.target :]).strip()) for row in rows[kind]}
        assert {pair[0] for pair in got} == {pair[0] for pair in want} and len(rows[kind]) == len(want)
        assert all(any(q == pair[0] and a.startswith(pair[1][:4]) for q, a in want) for pair in got)


def test_the_others_before_a_question_are_near_facts_and_the_own_one_is_among_them() -> None:
    lm = tiny_lm("llama")
    task = task_of(lm, several=1.0, near=3, answer_tokens=8)
    places, samples, _ = task.split.batch(0, 4, 0)
    for seed in range(8):
        for place, s in zip(places, samples, strict=True):
            lines = task._information(place, s, random.Random(seed)).splitlines(keepends=True)
            others = [line(task.split.edits[i].prompt, task.split.edits[i].target) for i in task.near[place]]
            assert len(lines) in (2, 3) and line(s.prompt, s.target) in lines and len({*lines}) == len(lines)
            assert {*lines} <= {*others, line(s.prompt, s.target)}
    keys = retriever_of(editor_of(lm)).keys([(e.prompt, e.target) for e in task.split.edits])
    order = (keys @ keys.T).fill_diagonal_(-9).argsort(dim=1, descending=True)
    assert task.near == order[:, :3].tolist()


@torch.no_grad()
def test_the_loss_is_that_of_the_model_with_the_changes_written_into_it() -> None:
    lm = tiny_lm("llama")
    task = task_of(lm)
    for i, value in enumerate(task.values.values()):
        value.copy_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(i)))
    places, samples, draw = task.split.batch(0, 4, 0)
    rows = [row for own in task.rows(places, samples, draw).values() for row in own]
    whole = WeightPatch.make(lm, adapter.deltas(lm, task.factors, task.scale), method="slow")
    losses = []
    with apply(lm, whole, mount="bake"):
        for row in rows:
            logits = lm.model(torch.tensor([row.ids])).logits[0, row.target - 1 : -1]
            losses.append(F.cross_entropy(logits, torch.tensor(row.ids[row.target :]), reduction="none"))
    assert task.loss(rows) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


@pytest.fixture(scope="module")
def aligned() -> Iterator[Editor]:
    known = people()
    taught = [*known.edits(TAUGHT), *known.edits(TAUGHT, seed=3, wording=1)]
    yield lte.train(
        known.lm, taught, lte.Training(epochs=14, batch=16, lr=2e-3, answer_tokens=2, end="eos", validate=8)
    )


@pytest.mark.slow
@pytest.mark.xdist_group("people")
def test_it_believes_what_it_is_told_where_the_model_doubts_it_at_ten_and_at_300_facts(aligned: Editor) -> None:
    known = people()
    edits, clean = known.edits(EDITED[:300], seed=2), [WORDINGS[0].format(name) for name in EDITED[300:]]
    kept = known.right(clean, [known.homes[name] for name in EDITED[300:]])

    def believed(patch: MemoryPatch, asked: list[Edit]) -> float:
        with apply(known.lm, patch):
            assert known.right(clean, [known.homes[name] for name in EDITED[300:]]) == kept
            return known.right([e.prompt for e in asked], [e.target for e in asked])

    whole = lte.fit(known.lm, edits, lte.Config(threshold=0.95), editor=aligned)
    tens = [believed(whole.of(range(i, i + 10)), edits[i : i + 10]) for i in range(0, 300, 10)]
    many, unaligned = believed(whole, edits), believed(replace(whole, changes=None), edits)
    assert abs(many - sum(tens) / len(tens)) <= 0.02
    assert many >= 0.3 and many >= 2.5 * unaligned


@pytest.mark.slow
@pytest.mark.xdist_group("people")
def test_without_a_fact_the_aligned_model_answers_as_the_model_did(aligned: Editor) -> None:
    """On at least nine of ten questions; by default it is not even asked there."""
    known = people()
    names = EDITED[:200]
    prompts = [WORDINGS[i % 2].format(name) for i, name in enumerate(names)]
    before = lp.generate(known.lm, prompts, max_new_tokens=2)
    with apply(known.lm, lte.alignment(known.lm, aligned)):
        after = lp.generate(known.lm, prompts, max_new_tokens=2)
    assert sum(a == b for a, b in zip(before, after, strict=True)) >= 0.9 * len(names)
