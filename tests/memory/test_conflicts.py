"""What a new fact contradicts is said as it is written, and retired on request."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_lm

from lmpatch import Edit, Memory
from lmpatch.memory.conflicts import bare
from lmpatch.methods import rag

pytest.importorskip("lancedb")

EIFFEL = Edit("The Eiffel Tower is in", "Paris", "Eiffel Tower")
OTHER = "The Eiffel Tower is located in"


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    made = Memory.create(tmp_path / "m", rag.editor_for(tiny_lm("llama")))
    made.add([EIFFEL, Edit("The Louvre is in", "Paris", "Louvre"), Edit("The Eiffel Tower was designed by", "Eiffel")])
    return made


def targets(memory: Memory) -> list[tuple[str, str]]:
    return [(entry.edit.prompt, entry.edit.target) for entry in memory.store.facts() if "Eiffel" in entry.edit.prompt]


@pytest.mark.slow
def test_a_fact_in_other_words_is_shown_and_both_stay_unless_asked(memory: Memory) -> None:
    added = memory.add([Edit(OTHER, "Rome")])
    (conflict,) = added.conflicts
    assert added == 2 and (conflict.old, conflict.version, conflict.superseded) == (EIFFEL, 1, False)
    assert len(memory) == 4
    assert not memory.add([Edit("The location of the Eiffel Tower is", "paris.")]).conflicts[1:], "Rome, not Paris"


@pytest.mark.slow
def test_superseding_retires_it_in_the_same_commit_and_leaves_the_rest(memory: Memory) -> None:
    added = memory.add([Edit(OTHER, "Rome")], supersede=True)
    assert [c.superseded for c in added.conflicts] == [True] and memory.store.version == added == 2
    assert targets(memory) == [("The Eiffel Tower was designed by", "Eiffel"), (OTHER, "Rome")]
    assert [e.state for e in memory.store.find("tower is in", history=True)] == ["superseded in 2"]
    assert len(memory) == 3 and [(v.put, v.dropped, v.live) for v in memory.store.versions()][1] == (1, 1, 3)
    memory.store.rollback(1)
    assert ("The Eiffel Tower is in", "Paris") in targets(memory)


@pytest.mark.slow
def test_a_new_fact_supersedes_for_its_own_time_alone(memory: Memory) -> None:
    memory.add([Edit(OTHER, "Rome", valid_from="2999-01-01")], supersede=True)
    spans = {e.edit.target: e.edit.span for e in memory.store.facts() if " is " in e.edit.prompt and e.edit.subject}
    assert spans["Paris"] != ("", "") or "Eiffel" not in str(targets(memory))
    finder = memory.patch().finder()
    assert finder.facts.fact(finder.search([OTHER])[0][0].place)[1] == "Paris"
    later = memory.patch(as_of="2999-01-01").finder()
    assert later.facts.fact(later.search([OTHER])[0][0].place)[1] == "Rome"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (Edit("The Louvre is found in", "Rome", "Louvre"), None),
        (Edit(OTHER, "PARIS"), "the same answer"),
        (Edit(OTHER, "Rome", aliases=["Paris"]), "an accepted answer"),
        (Edit("The Eiffel Tower weighs", "7300 tons"), "another relation"),
        (Edit("The Orsay is in", "Rome", "Orsay"), "another subject"),
    ],
)
def test_only_another_answer_to_the_same_question_is_a_contradiction(
    memory: Memory, edit: Edit, why: str | None
) -> None:
    assert bool(memory.add([edit]).conflicts) == (why is None)


@pytest.mark.slow
def test_facts_of_one_batch_and_of_one_prompt_are_seen_too(memory: Memory) -> None:
    both = [Edit("The Prado is in", "Madrid", "Prado"), Edit("The Prado is located in", "Rome", "Prado")]
    added = memory.add([*both, Edit(EIFFEL.prompt, "Oslo")], supersede=True)
    assert [(c.new.target, c.old.target, c.version) for c in added.conflicts] == [
        ("Rome", "Madrid", None), ("Oslo", "Paris", 1),
    ]  # fmt: skip
    assert [e.edit.target for e in memory.store.find("prado")] == ["Rome"]
    assert memory.add([Edit(OTHER, "Cairo")], check=False).conflicts == ()


@pytest.mark.slow
def test_times_that_do_not_meet_contradict_nothing_and_a_relation_id_decides(memory: Memory) -> None:
    memory.add([Edit("The mayor of Rome is", "Ann", "Rome", valid_to="2020-01-01", relation="P6")])
    assert not memory.add([Edit("Rome has as its mayor", "Bo", "Rome", valid_from="2020-01-01")]).conflicts
    assert memory.add([Edit("Who runs Rome?", "Di", "Rome", valid_to="2019-01-01", relation="P6")]).conflicts
    assert not memory.add([Edit("The mayor that Rome has is", "Ed", "Rome", relation="P7")]).conflicts[1:]


def test_the_subject_two_prompts_share() -> None:
    for new, old, without in [
        (Edit("A b X is", "t", "X"), Edit("X lies", "u"), ("b it is", "it lies")),
        (Edit("Obama won", "t", "Obama"), Edit("Barack Obama came", "u", "Barack Obama"), ("it won", "it came")),
        (Edit("France's head is", "t"), Edit("The head of France is", "u"), ("it's head is", "head of it is")),
        (Edit("The opera in New York is", "t"), Edit("Where is New York?", "u"), ("opera in it is", "where is it")),
    ]:  # fmt: skip
        assert bare(new, old) == without
    for new, old in [
        (Edit("X is", "t", "X"), Edit("Y is", "u", "Y")),
        (Edit("Paris is", "t"), Edit("Rome is", "u")),
        (Edit("The Louvre is in", "t"), Edit("The Eiffel Tower is in", "u")),
    ]:
        assert bare(new, old) is None
