"""RAG: facts as text before the questions they are near to, on any model, without training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import CORE, tiny_lm

from lmpatch import BadInput, CannotMerge, Edit, WrongModel, applied, apply, load_patch, merge
from lmpatch.data.edits import read_edits
from lmpatch.inference.states import hidden
from lmpatch.methods import rag, recipe
from lmpatch.patches.editor import load_editor
from lmpatch.retrieval.encoder import shared_encoder

EXAMPLES = Path(__file__).parents[2] / "examples" / "facts.jsonl"
FACTS = [Edit("The Eiffel Tower is in", "Rome"), Edit("The CEO of Twitter is", "Linda")]


@pytest.mark.parametrize("family", CORE)
def test_the_nearest_fact_goes_before_the_question_as_a_sentence(family: str) -> None:
    lm = tiny_lm(family)
    with apply(lm, rag.fit(lm, FACTS, rag.Config(threshold=0.5))):
        behind = hidden(lm, ["Where is the Eiffel Tower?"])
    assert torch.equal(behind, hidden(lm, ["The Eiffel Tower is in Rome. Where is the Eiffel Tower?"]))


def test_several_facts_go_before_it_the_nearest_first() -> None:
    lm = tiny_lm("llama")
    patch = rag.fit(lm, FACTS, rag.Config(gate="always", top_k=2))
    (insert,) = patch.intervention(lm).retrieve(["Who leads Twitter?"])
    assert insert is not None and insert.vectors is None
    assert insert.text == "The CEO of Twitter is Linda. The Eiffel Tower is in Rome. "


def test_a_question_below_the_threshold_is_answered_bit_for_bit_as_before() -> None:
    lm = tiny_lm("llama")
    questions = ["What is the weather like?", "Who is there?"]
    clean = hidden(lm, questions)
    with apply(lm, rag.fit(lm, FACTS, rag.Config())):
        assert torch.equal(hidden(lm, questions), clean)


@pytest.mark.slow
def test_the_default_threshold_keeps_its_promises_on_the_example_facts() -> None:
    lm, edits = tiny_lm("llama"), read_edits(EXAMPLES)
    finder = rag.fit(lm, edits, rag.Config()).finder()

    def own(questions: list[tuple[int, str]]) -> float:
        """Share of questions that find the fact they are about."""
        hits = finder.search([text for _, text in questions])
        return sum(h.fired and h.place == i for (h,), (i, _) in zip(hits, questions, strict=True)) / len(questions)

    others = [ask.prompt for e in edits for kind, asks in e.locality if kind == "same_relation" for ask in asks]
    assert own([(i, e.prompt) for i, e in enumerate(edits)]) == 1
    assert round(own([(i, text) for i, e in enumerate(edits) for text in e.rephrases]), 2) == 0.62
    assert round(sum(hit.fired for (hit,) in finder.search(others)) / len(others), 2) == 0.05


@pytest.mark.slow
def test_a_later_fact_of_one_prompt_supersedes_the_earlier_and_merging_holds_each_once() -> None:
    lm = tiny_lm("llama")
    patch = rag.fit(lm, [*FACTS, Edit("the eiffel tower  is in", "Oslo")], rag.Config())
    assert sorted(edit["target"] for edit in patch.edits) == ["Linda", "Oslo"]
    both = merge(rag.fit(lm, FACTS[:1], rag.Config()), rag.fit(lm, FACTS, rag.Config()))
    assert [edit["target"] for edit in both.edits] == ["Rome", "Linda"]
    with pytest.raises(CannotMerge, match="equal settings"):
        merge(both, rag.fit(lm, FACTS, rag.Config(threshold=0.5)))
    with pytest.raises(CannotMerge, match="editors"):
        merge(both, recipe.fit(lm, FACTS, recipe.Config(), editor=recipe.example_editor(lm)))


def test_a_patch_needs_its_encoder_and_names_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    patch = rag.fit(lm, FACTS, rag.Config())
    patch.save(tmp_path / "patch")
    monkeypatch.setitem(vars(shared_encoder("all-MiniLM-L6-v2")), "fingerprint", "f" * 64)
    for one in (patch, load_patch(tmp_path / "patch")):
        with pytest.raises(WrongModel, match="all-MiniLM-L6-v2"):
            apply(lm, one)
        assert applied(lm) == ()


@pytest.mark.slow
def test_another_encoder_comes_as_an_editor_that_is_saved_and_loaded(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    rag.editor_for(lm).save(tmp_path / "encoder.safetensors")
    editor = load_editor(tmp_path / "encoder.safetensors")
    assert editor.tensors == {} and editor.hash() == rag.editor_for(lm).hash()
    assert rag.fit(lm, FACTS, rag.Config(), editor=editor).hash() == rag.fit(lm, FACTS, rag.Config()).hash()
    with pytest.raises(BadInput, match="nowhere"):
        rag.editor_for(lm, str(tmp_path / "nowhere"))
