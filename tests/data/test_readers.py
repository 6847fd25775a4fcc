"""Readers: every public shape becomes the same records, and bad lines are named."""

from __future__ import annotations

import gzip
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpatch.data.edits import Ask, Edit, check_contradictions, prompt_key, read_asks, read_edits
from lmpatch.data.lines import read_text
from lmpatch.errors import BadInput, BadRecord, Contradiction

FACTS = Path(__file__).parents[2] / "examples" / "facts.jsonl"

OWN = {
    "prompt": "The Eiffel Tower is in",
    "target": "Rome",
    "subject": "Eiffel Tower",
    "old": "Paris",
    "aliases": ["Roma"],
    "rephrases": ["You find the Eiffel Tower in"],
    "locality": {"same_relation": [{"prompt": "The Louvre is in", "answers": ["Paris"]}]},
    "portability": {"reasoning": [{"prompt": "The Eiffel Tower is in the country of", "answers": "Italy"}]},
    "id": "eiffel",
    "relation": "P276",
}
COUNTERFACT = {
    "case_id": 7,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Danielle Darrieux speaks",
    "locality_prompt": "Michel Rocard is a native speaker of",
    "locality_ground_truth": "French",
}
ROME = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux speaks"],
    "neighborhood_prompts": ["Michel Rocard is a native speaker of", "The mother tongue of Léon Blum is"],
}
ZSRE = {
    "subject": "ZIC3",
    "target_new": "male",
    "prompt": "What species is ZIC3 specific to?",
    "ground_truth": ["human"],
    "rephrase_prompt": "In which living being can you find ZIC3?",
    "locality": {"Relation_Specificity": [{"prompt": "The strand of ZIC3 is", "ground_truth": ["forward"]}]},
    "portability": {"Subject_Aliasing": [{"prompt": "What is Zic family member 3?", "ground_truth": "male"}]},
}
WIKI = {
    "subject": "Leonardo DiCaprio",
    "prompt": "The country of Leonardo DiCaprio is",
    "target_new": "Syria",
    "rephrase": "Leonardo DiCaprio is a citizen of",
    "portability": {
        "Logical_Generalization": [],
        "Reasoning": [
            {"prompt": "The language of his country is", "ground_truth": [["Arabic", "ar"], ["Kurdish"]]},
            {"prompt": "The language of his country is", "ground_truth": [["Arabic", "Aramaic"]]},
        ],
    },
    "locality": {"Forgetfulness": [{"prompt": "His country, which is not Syria, is", "ground_truth": [[]]}]},
}


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "facts.jsonl"


def test_the_own_shape_keeps_every_field(file: Path) -> None:
    assert read_edits(write(file, [OWN])) == [
        Edit(
            "The Eiffel Tower is in",
            "Rome",
            "Eiffel Tower",
            ("Paris",),
            ("Roma",),
            ("You find the Eiffel Tower in",),
            {"same_relation": [Ask("The Louvre is in", ("Paris",))]},
            {"reasoning": [Ask("The Eiffel Tower is in the country of", ("Italy",))]},
            "eiffel",
            "P276",
        )
    ]


def test_an_edit_without_an_id_is_named_by_its_place(file: Path) -> None:
    short = {"prompt": "a", "target": "b"}
    assert [edit.id for edit in read_edits(write(file, [short, short, short | {"id": "c"}]))] == ["0", "1", "c"]


def test_counterfact_in_both_published_shapes_is_the_same_edit(file: Path) -> None:
    flat, nested = read_edits(write(file, [COUNTERFACT]))[0], read_edits(write(file, [ROME]))[0]
    for name in ("prompt", "target", "subject", "old", "rephrases", "id"):
        assert getattr(flat, name) == getattr(nested, name)
    near = Ask("Michel Rocard is a native speaker of", ("French",))
    assert flat.locality == (("same_relation", (near,)),)
    assert nested.locality[0][1] == (near, Ask("The mother tongue of Léon Blum is", ("French",)))
    assert nested.relation == "P103"


def test_knowedit_groups_get_our_names_and_nested_aliases_are_flat(file: Path) -> None:
    zsre, wiki = (read_edits(write(file, [record]))[0] for record in (ZSRE, WIKI))
    assert zsre.old == ("human",)
    assert zsre.rephrases == ("In which living being can you find ZIC3?",)
    assert zsre.locality == (("same_subject", (Ask("The strand of ZIC3 is", ("forward",)),)),)
    assert zsre.portability == (("subject_aliasing", (Ask("What is Zic family member 3?", ("male",)),)),)
    assert wiki.rephrases == ("Leonardo DiCaprio is a citizen of",)
    assert wiki.old == ()


def test_a_prompt_that_comes_twice_in_a_group_is_asked_once_and_any_answer_counts(file: Path) -> None:
    wiki = read_edits(write(file, [WIKI]))[0]
    joined = Ask("The language of his country is", ("Arabic", "ar", "Kurdish", "Aramaic"))
    assert wiki.portability == (("reasoning", (joined,)),)


def test_a_locality_prompt_without_answers_is_kept(file: Path) -> None:
    wiki = read_edits(write(file, [WIKI]))[0]
    assert wiki.locality == (("other_objects", (Ask("His country, which is not Syria, is"),)),)


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.jsonl.gz", "facts.json", "facts.json.gz"])
def test_every_container_gives_the_same_edits(tmp_path: Path, name: str) -> None:
    records = [OWN, OWN | {"prompt": "The Colosseum is in", "id": "c"}]
    one = json.dumps(records) if ".jsonl" not in name else "\n\n".join(map(json.dumps, records)) + "\r\n"
    data = ("﻿" + one).encode()  # a byte order mark is common
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [edit.id for edit in read_edits(tmp_path / name)] == ["eiffel", "c"]


def test_limit_takes_the_first_and_a_seed_shuffles_before(file: Path) -> None:
    write(file, [{"prompt": f"p{i}", "target": "t"} for i in range(50)])
    assert [edit.prompt for edit in read_edits(file, limit=3)] == ["p0", "p1", "p2"]
    drawn = [edit.prompt for edit in read_edits(file, limit=10, seed=1)]
    assert drawn == [edit.prompt for edit in read_edits(file, limit=10, seed=1)]
    assert drawn != [edit.prompt for edit in read_edits(file, limit=10, seed=2)]
    with pytest.raises(BadInput, match="limit is 0"):
        read_edits(file, limit=0)


def test_all_bad_lines_are_named_with_what_is_wrong(file: Path) -> None:
    good = json.dumps({"prompt": "p", "target": "t"})
    bad = [
        '{"prompt": "p"}',
        "{not json",
        '["a list"]',
        '{"prompt": "p", "target": "t", "rephrase": ["x"]}',
        '{"prompt": "p", "target": "  "}',
        '{"prompt": "p", "target": "t", "locality": {"k": ["x"]}}',
    ]
    file.write_text("\n".join([good, *bad, good]))
    with pytest.raises(BadRecord) as caught:
        read_edits(file)
    said = str(caught.value)
    assert str(file) in said and "6 bad lines" in said
    assert "line 2: target is missing" in said
    assert "line 3: no valid JSON" in said
    assert "line 4: a record must be an object, found list" in said
    assert "line 5: unknown key 'rephrase'. Did you mean 'rephrases'?" in said
    assert "line 6:" in said and "empty target" in said
    assert "line 7: locality.k must be a list of objects" in said
    assert "line 1" not in said and "line 8" not in said


def test_only_the_first_ten_bad_lines_are_listed(file: Path) -> None:
    file.write_text("".join(json.dumps({"prompt": "p", "target": "t", f"odd{i}": 1}) + "\n" for i in range(13)))
    with pytest.raises(BadRecord, match="13 bad lines") as caught:
        read_edits(file)
    assert "line 10:" in str(caught.value) and "line 11:" not in str(caught.value)
    assert "and 3 more" in str(caught.value)


def test_one_complaint_is_said_once(file: Path) -> None:
    file.write_text("nonsense\n" * 13)
    with pytest.raises(BadRecord, match=r"13 bad lines:\s+all 13 lines: no valid JSON") as caught:
        read_edits(file)
    assert len(str(caught.value).splitlines()) == 2
    file.write_text("nonsense\n" * 5 + json.dumps({"prompt": "p", "target": "t"}) + "\n" + '{"prompt": "p"}')
    with pytest.raises(BadRecord, match="line 1, line 2, line 3 and 2 more: no valid") as caught:
        read_edits(file)
    assert "line 7: target is missing" in str(caught.value) and len(str(caught.value).splitlines()) == 3


def test_contradictions_are_refused_on_request_with_their_lines(file: Path) -> None:
    write(file, [{"prompt": "The capital of Australia is", "target": town} for town in ("Canberra", "Perth")])
    assert len(read_edits(file)) == 2
    with pytest.raises(Contradiction, match="line 1 says 'Canberra', line 2 says 'Perth'"):
        read_edits(file, check=True)


def test_a_prompt_is_the_same_whatever_its_case_and_white_space() -> None:
    assert prompt_key(" The  EIFFEL\tTower is in\n") == prompt_key("the eiffel tower is in") == "the eiffel tower is in"
    assert prompt_key("the eiffeltower is in") != prompt_key("the eiffel tower is in")
    with pytest.raises(Contradiction):
        check_contradictions([Edit("The sky is", "blue"), Edit("the  SKY is", "green")])


@pytest.mark.slow
@given(st.text(max_size=12))
def test_a_prompt_is_the_same_composed_or_decomposed(text: str) -> None:
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert prompt_key(composed) == prompt_key(decomposed) == prompt_key(prompt_key(text))
    with pytest.raises(Contradiction):
        check_contradictions([Edit("Caf\u00e9 is", "a"), Edit("Cafe\u0301 is", "b")])


def test_files_that_hold_nothing_usable_say_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no file"):
        read_edits(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(BadInput, match="no records"):
        read_edits(tmp_path / "empty.jsonl")
    with pytest.raises(BadRecord, match="unknown shape"):
        read_edits(write(tmp_path / "odd.jsonl", [{"question": "?"}]))
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(BadInput, match="gzipped"):
        read_edits(tmp_path / "no.jsonl.gz")
    with pytest.raises(BadInput, match="no format is called 'zsre'"):
        read_edits(FACTS, format="zsre")


def test_questions_are_read_with_nested_answers(file: Path) -> None:
    write(file, [{"question": "who?", "answers": [["a", "b"]]}, {"prompt": "when? ", "answer": "now"}])
    assert read_asks(file) == [Ask("who?", ("a", "b")), Ask("when?", ("now",))]


def test_text_comes_as_paragraphs_or_as_the_text_of_each_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(b" one\nstill one\n \n\ntwo\n"))
    write(tmp_path / "t.jsonl", [{"text": " one "}, {"text": ""}, {"text": "two"}])
    assert read_text(tmp_path / "t.txt.gz") == ["one\nstill one", "two"]
    assert read_text(tmp_path / "t.jsonl") == ["one", "two"]
    assert read_text(tmp_path / "t.jsonl", limit=1) == ["one"]
    with pytest.raises(BadRecord, match="line 1: text is missing"):
        read_text(write(tmp_path / "bad.jsonl", [{"words": "x"}]))


@pytest.mark.slow
def test_the_projects_own_facts_are_whole() -> None:
    edits = read_edits(FACTS, check=True)
    assert len(edits) >= 24
    for edit in edits:
        edit.need_subject()
        assert edit.old and len(edit.rephrases) >= 2 and edit.relation
        assert {kind for kind, _ in edit.locality} == {"same_relation", "same_subject"}
        assert all(ask.answers for _, asks in edit.locality + edit.portability for ask in asks)
        assert not set(edit.old) & set(edit.answers)
