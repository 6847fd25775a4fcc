"""A memory with its editor: the same answers as a patch of the same facts, and what others add shows at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_lm

from lmpatch import BadInput, BadPatch, CannotMerge, Edit, LmpatchError, Memory, WrongModel, apply, generate, score
from lmpatch.memory.memory import EDITOR
from lmpatch.memory.store import Store
from lmpatch.methods import rag, recipe
from lmpatch.patches.editor import Editor
from lmpatch.retrieval import Scope

pytest.importorskip("lancedb")

FACTS = [Edit(f"The {thing} of Japan is in", town) for thing, town in (("tower", "Rome"), ("opera", "Oslo"))]
ALWAYS = Scope(gate="always")


@pytest.fixture(scope="module")
def editor() -> Editor:
    return recipe.example_editor(tiny_lm("gemma3"))


@pytest.fixture
def memory(editor: Editor, tmp_path: Path) -> Memory:
    made = Memory.create(tmp_path / "m", editor)
    made.add(FACTS)
    return made


def test_it_answers_as_a_patch_of_the_same_facts(memory: Memory, editor: Editor) -> None:
    lm = tiny_lm("gemma3")
    patch = recipe.fit(lm, FACTS, recipe.Config(gate="always"), editor=editor)
    questions = [FACTS[1].prompt, "Where is the tower?"]
    with apply(lm, patch):
        wanted = score(lm, questions, ["Rome", "Oslo"]), generate(lm, questions, max_new_tokens=6)
    for one in (memory.patch(ALWAYS), memory.snapshot(ALWAYS), Memory.open(memory.store.path).patch(ALWAYS)):
        with apply(lm, one):
            assert (score(lm, questions, ["Rome", "Oslo"]), generate(lm, questions, max_new_tokens=6)) == wanted
    assert torch.equal(memory.snapshot().keys, patch.keys)


@pytest.mark.slow
@pytest.mark.parametrize("insert", ["vectors", "text"])
def test_a_fact_that_another_handle_adds_is_used_by_the_next_question(memory: Memory, insert: str) -> None:
    retrieve = memory.patch(Scope(gate="always", insert=insert)).intervention(tiny_lm("gemma3"))  # type: ignore[arg-type]
    (before,) = retrieve.retrieve([FACTS[0].prompt])
    Memory.open(memory.store.path).add([Edit(FACTS[0].prompt, "Cairo")])
    (after,) = retrieve.retrieve([FACTS[0].prompt])
    assert before is not None and after is not None
    if insert == "text":
        assert "Rome" in before.text and "Cairo" in after.text
    else:
        assert not torch.equal(before.vectors, after.vectors)


@pytest.mark.slow
def test_retrieval_says_which_row_it_found(memory: Memory) -> None:
    patch = memory.patch(Scope(gate="always", top_k=2))
    hits = patch.finder().search([FACTS[1].prompt])[0]
    rows = {fact.seq: fact.edit.target for fact in memory.store.facts()}
    held = memory.snapshot(Scope(gate="always", top_k=2)).finder().search([FACTS[1].prompt])[0]
    assert [rows[hit.place] for hit in hits] == [FACTS[hit.place].target for hit in held]
    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in held], rel=1e-5)


@pytest.mark.slow
def test_facts_as_text_are_kept_for_a_model_without_an_editor(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    memory = Memory.create(tmp_path / "m", rag.editor_for(lm))
    memory.add(FACTS)
    questions = [FACTS[1].prompt, "What is the weather like?"]
    with apply(lm, rag.fit(lm, FACTS, rag.Config())):
        answers = score(lm, questions, ["Rome", "Oslo"]), generate(lm, questions, max_new_tokens=6)
    for one in (memory.patch(), memory.snapshot(), Memory.open(memory.store.path).patch()):
        with apply(lm, one):
            assert (score(lm, questions, ["Rome", "Oslo"]), generate(lm, questions, max_new_tokens=6)) == answers
    (before, other) = memory.patch().intervention(lm).retrieve(questions)
    assert before is not None and before.text == "The opera of Japan is in Oslo. " and other is None
    with pytest.raises(WrongModel):
        Memory.open(memory.store.path, rag.editor_for(tiny_lm("gemma3")))
    with pytest.raises(BadInput, match="no prompt vectors"):
        apply(lm, memory.patch(ALWAYS))


@pytest.mark.slow
def test_an_empty_memory_changes_nothing(editor: Editor, tmp_path: Path) -> None:
    lm, empty = tiny_lm("gemma3"), Memory.create(tmp_path / "m", editor)
    before = generate(lm, "Where is it?", max_new_tokens=4)
    with apply(lm, empty.patch(ALWAYS)):
        assert generate(lm, "Where is it?", max_new_tokens=4) == before
    assert len(empty) == 0 and "0 facts" in empty.patch().summary()
    assert empty.add([]) == 0


@pytest.mark.slow
def test_one_memory_on_twice_is_a_warning_and_two_memories_are_none(
    editor: Editor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm, one, other = tiny_lm("gemma3"), Memory.create(tmp_path / "one", editor), Memory.create(tmp_path / "b", editor)
    with apply(lm, one.patch()), apply(lm, other.patch()):
        assert not caplog.messages
        with apply(lm, one.patch()):
            assert "counts twice" in caplog.text


@pytest.mark.slow
def test_a_live_patch_is_not_saved_or_merged_but_its_snapshot_is(memory: Memory, tmp_path: Path) -> None:
    live = memory.patch()
    with pytest.raises(BadInput, match=r"snapshot"):
        live.save(tmp_path / "patch")
    with pytest.raises(CannotMerge, match=r"snapshot"):
        live.merged([memory.snapshot()])
    with pytest.raises(BadInput, match=r"snapshot"):
        memory.patch(Scope(gate="cosine"))
    memory.snapshot().save(tmp_path / "patch")


@pytest.mark.slow
def test_a_fact_beyond_the_encoder_is_refused_and_none_of_its_commit_is_added(memory: Memory) -> None:
    with pytest.raises(BadInput, match="Shorten it"):
        memory.add([Edit("A short fact is", "here"), Edit("word " * 1000, "end")])
    assert len(memory) == 2 and memory.store.version == 1


@pytest.mark.slow
def test_another_editor_or_model_is_refused_and_both_are_named(memory: Memory) -> None:
    other = recipe.example_editor(tiny_lm("llama"))
    with pytest.raises(WrongModel) as error:
        Memory.open(memory.store.path, other)
    for hash_ in (other.hash(), memory.editor.hash(), other.base.fingerprint, memory.editor.base.fingerprint):
        assert hash_[:12] in str(error.value)
    with pytest.raises(WrongModel, match="made for"):
        apply(tiny_lm("llama"), memory.patch())


@pytest.mark.slow
def test_what_is_no_memory_or_lost_its_editor_is_said(memory: Memory, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no memory"):
        Memory.open(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="exists"):
        Memory.create(memory.store.path, memory.editor)
    (memory.store.path / EDITOR).unlink()
    with pytest.raises(BadPatch, match="no editor"):
        Memory.open(memory.store.path)
    assert len(Memory.open(memory.store.path, memory.editor)) == 2


def test_a_creation_that_fails_leaves_nothing(editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise LmpatchError("the disk is full")

    monkeypatch.setattr(Store, "create", full)
    with pytest.raises(LmpatchError):
        Memory.create(tmp_path / "m", editor)
    assert list(tmp_path.iterdir()) == []
