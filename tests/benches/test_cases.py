"""Chunks and collisions: what is written, what is asked, and what is flagged."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpatch.benches.facts.cases import Chunk, Config, plan_chunks, with_fact
from lmpatch.data.edits import Ask, Edit
from lmpatch.errors import BadInput


def edits(count: int) -> list[Edit]:
    return [Edit(f"The capital of land {i} is", f"town {i}", f"land {i}") for i in range(count)]


def one(*records: Edit, **settings: Any) -> Chunk:
    (chunk,) = plan_chunks(records, Config(n=len(records), **{"pack": 0, **settings}), shuffled=False)
    return chunk


def flags(chunk: Chunk, kind: str) -> list[str]:
    return [q.flag for q in chunk.questions if q.kind == kind]


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 3))
def test_chunks_are_whole_disjoint_and_written_in_order(count: int, n: int, size: int, seed: int) -> None:
    if n > count:
        return
    chunks = plan_chunks(edits(count), Config(n=n, commit_size=size, seed=seed))
    assert len(chunks) == count // n
    seen = Counter(edit.prompt for chunk in chunks for edit in chunk.edits)
    assert len(seen) == n * len(chunks) and set(seen.values()) == {1}
    for chunk in chunks:
        assert [i for commit in chunk.commits for i in commit] == list(range(n))
        assert all(len(commit) == size for commit in chunk.commits[:-1])
        assert [q.case for q in chunk.questions] == sorted(q.case for q in chunk.questions)


def test_a_seed_decides_the_order_where_it_is_shuffled() -> None:
    def order(seed: int) -> list[str]:
        return [edit.id for edit in plan_chunks(edits(20), Config(n=20, seed=seed))[0].edits]

    assert [edit.id for edit in one(*edits(20)).edits] == [str(i) for i in range(20)]
    assert order(1) == order(1) != order(2)


def test_too_few_edits_are_refused() -> None:
    with pytest.raises(BadInput, match="needs n=5 edits, found 4"):
        plan_chunks(edits(4), Config(n=5, commit_size=1))


def test_every_case_gets_an_id_of_its_own() -> None:
    chunk = one(*(Edit(f"p{i}", "t", id="x") for i in range(3)), Edit("q", "t"))
    assert [edit.id for edit in chunk.edits] == ["x", "x#2", "x#3", "3"]


def test_each_case_asks_its_edit_rephrases_locality_and_portability() -> None:
    edit = Edit(
        "The tower is in", "Rome", "tower", old="Paris", aliases=["Roma"], rephrases=["Find the tower in"],
        locality={"same_relation": [Ask("The Louvre is in", ("Paris",))]},
        portability={"reasoning": [Ask("The tower's country is", ("Italy",))]},
    )  # fmt: skip
    asked = {q.kind: (q.prompt, q.answers, q.old) for q in one(edit).questions}
    assert asked == {
        "edit": ("The tower is in", ("Rome", "Roma"), ("Paris",)),
        "rephrase": ("Find the tower in", ("Rome", "Roma"), ("Paris",)),
        "loc/same_relation": ("The Louvre is in", ("Paris",), ()),
        "loc/distractor": ("The tower is in Rome. The Louvre is in", ("Paris",), ()),
        "port/reasoning": ("The tower's country is", ("Italy",), ()),
    }


def test_no_kind_asks_more_prompts_than_allowed() -> None:
    many = [Ask(f"q{i}") for i in range(9)]
    edit = Edit("p", "t", rephrases=[f"r{i}" for i in range(9)], locality={"a": many, "b": many[:1]})
    kinds = Counter(q.kind for q in one(edit, per_kind=4).questions)
    assert kinds == {"edit": 1, "rephrase": 4, "loc/a": 4, "loc/b": 1, "loc/distractor": 1}


def test_a_large_chunk_asks_about_a_fixed_sample() -> None:
    def cases(chunk: Chunk) -> set[int]:
        return {q.case for q in chunk.questions}

    chunk = one(*edits(30), sample=7)
    assert len(cases(chunk)) == 7 and len(chunk.edits) == 30
    assert cases(chunk) == cases(one(*edits(30), sample=7))


def test_the_same_fact_twice_is_one_edit() -> None:
    chunk = one(Edit("The capital is", "Perth"), Edit("the  capital is", "perth"))
    assert chunk.commits == ((0,),)
    assert flags(chunk, "edit") == ["", "repeated"] and chunk.counts == {"repeated": 1}


def test_a_later_target_supersedes_an_earlier_one_of_the_same_commit_unwritten() -> None:
    chunk = one(Edit("The capital is", "Perth"), Edit("The capital is", "Sydney"))
    assert chunk.commits == ((1,),)
    assert flags(chunk, "edit") == ["superseded", ""] and chunk.counts == {"superseded": 1}


def test_one_superseded_by_a_later_commit_is_written_and_asked_right_after_it() -> None:
    first = Edit("The capital is", "Perth", rephrases=["Its capital is"])
    chunk = one(first, Edit("The capital is", "Sydney"), commit_size=1)
    assert chunk.commits == ((0,), (1,))
    assert flags(chunk, "edit") == ["superseded", ""]
    assert [(q.kind, q.flag) for q in chunk.after_commit(0)] == [("edit", ""), ("rephrase", "")]


def test_three_in_a_row_leave_the_last() -> None:
    chunk = one(*(Edit("p", target) for target in "abc"))
    assert chunk.commits == ((2,),) and flags(chunk, "edit") == ["superseded", "superseded", ""]


def test_a_prompt_that_is_edited_elsewhere_in_the_chunk_leaves_its_metric() -> None:
    edit = Edit("A is in", "x", rephrases=["B is in"], locality={"same_relation": [Ask("b is in."), Ask("C is in")]})
    chunk = one(edit, Edit("B is in", "y"))
    assert flags(chunk, "rephrase") == ["collided"]
    assert flags(chunk, "loc/same_relation") == ["collided", ""]
    assert chunk.counts == {"collided/loc/same_relation": 1, "collided/rephrase": 1}
    distractor = next(q for q in chunk.questions if q.kind == "loc/distractor")
    assert distractor.prompt.endswith("C is in") and not distractor.flag


def test_subject_and_relation_of_another_edit_collide_in_other_words() -> None:
    near = {"same_relation": [Ask("Taipei's twin city is"), Ask("Oslo's twin city is")]}
    other = {"same_subject": [Ask("Taipei lies in")]}
    chunk = one(
        Edit("The twin of Rome is", "x", "Rome", locality=near | other),
        Edit("The twin of Taipei is", "y", "Taipei"),
        Edit("The mayor of Oslo is", "z", "Oslo"),
    )
    assert flags(chunk, "loc/same_relation") == ["collided", ""]
    assert flags(chunk, "loc/same_subject") == [""]


def test_a_given_relation_decides_over_the_wording() -> None:
    a = Edit("A lies in", "x", "A", relation="P17", rephrases=["Where is A?"])
    chunk = one(a, Edit("The land of A is", "y", "A", relation="P17"))
    assert flags(chunk, "rephrase") == ["collided"]
    chunk = one(a, Edit("The mayor of A is", "y", "A", relation="P6"))
    assert flags(chunk, "rephrase") == [""]


def test_a_locality_prompt_of_several_cases_weighs_once() -> None:
    near = {"same_relation": [Ask("The Louvre is in")]}
    chunk = one(Edit("A is in", "x", locality=near), Edit("B is in", "y", locality=near))
    assert flags(chunk, "loc/same_relation") == ["", "duplicate"]


def test_raw_switches_every_rule_off() -> None:
    near = {"same_relation": [Ask("B is in")]}
    chunk = one(
        Edit("A is in", "x", locality=near), Edit("B is in", "y", locality=near), Edit("B is in", "z"), raw=True
    )
    assert chunk.commits == ((0, 1, 2),) and not any(q.flag for q in chunk.questions) and not chunk.counts


def test_collisions_stay_inside_a_chunk() -> None:
    chunks = plan_chunks([Edit("p", "a"), Edit("p", "b")], Config())
    assert not any(q.flag for chunk in chunks for q in chunk.questions)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (Edit("The tower is in", "Rome"), "The tower is in Rome."),
        (Edit("Born in", "the U.S."), "Born in the U.S."),
        (Edit("首都是", "東京"), "首都是東京."),
    ],
)
def test_the_edit_sentence_reads_like_one(edit: Edit, text: str) -> None:
    question = one(edit).questions[0]
    assert with_fact(edit, question).text == f"{text} {edit.prompt}"
    assert with_fact(edit, question).prompt == edit.prompt


def test_retention_probes_spread_from_the_first_edit_to_the_last() -> None:
    assert one(*edits(3)).probes() == {0, 1, 2}
    assert len(one(*edits(40)).probes()) == 10 and {0, 39} <= one(*edits(40)).probes()
    assert len(one(*edits(200)).probes()) == 20
