"""Records with contexts: every shape becomes the same record, and bad lines are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmpatch.data.context import ContextRecord, halves, read_context
from lmpatch.errors import BadInput, BadRecord

OWN = {"context": "The tower is in Rome.", "question": "Where is it?", "answer": "Rome", "memory": "Paris"}
MEMOTRAP = {
    "prompt": 'Write a quote that ends in the word "doubled": Joy shared, joy doubled: sorrow shared, sorrow',
    "classes": "[' halved.', \" can't, no.\"]",
    "answer_index": 1,
}
KRE = {
    "question": "Where is food kept cold?",
    "answer": "B",
    "candidate": "A",
    " golden_context": "in a refrigerator",
    "negative_context": "Some food is kept on a shelf.",
    "choices": ["shelf", "fridge", "shop"],
}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_a_record_of_its_own_shape_reads_its_prompts_from_its_parts(tmp_path: Path) -> None:
    (record,) = read_context(write(tmp_path / "r.jsonl", OWN))
    assert record.prompt == "The tower is in Rome.\nQ:Where is it?\nA:"
    assert record.without_context == "Q:Where is it?\nA:"
    assert (record.answer, record.memory, record.id) == ("Rome", "Paris", "0")


def test_prompts_that_are_given_are_left_as_they_are(tmp_path: Path) -> None:
    (record,) = read_context(write(tmp_path / "r.jsonl", OWN | {"prompt": "p", "bare": "b", "id": 7}))
    assert (record.prompt, record.without_context, record.id) == ("p", "b", "7")


def test_options_are_lettered_and_answers_may_be_their_texts() -> None:
    record = ContextRecord("C.", "Q?", " green", "red", options=("red", " green "))
    head = "Choose the correct option to answer the following question: \n"
    assert record.prompt == f"{head}C.\nQ?\nA. red B. green\nAnswer:"
    assert record.without_context == f"{head}Q?\nA. red B. green\nAnswer:"
    assert (record.answer, record.memory, record.letters) == ("B", "A", ("A", "B"))


def test_memotrap_is_cut_behind_its_instruction_and_its_classes_are_a_literal(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", MEMOTRAP)
    (record,) = read_context(path)
    assert record.context == 'Write a quote that ends in the word "doubled": '
    assert record.without_context == record.question == "Joy shared, joy doubled: sorrow shared, sorrow"
    assert record.prompt == MEMOTRAP["prompt"]
    assert (record.answer, record.memory) == ("can't, no", "halved")


def test_kre_asks_for_the_letter_that_the_context_supports(tmp_path: Path) -> None:
    (record,) = read_context(write(tmp_path / "k.jsonl", KRE))
    assert record.prompt.splitlines() == [
        "Choose the correct option to answer the following question: ",
        "Some food is kept on a shelf.",
        "Where is food kept cold?",
        "A. shelf B. fridge C. shop",
        "Answer:",
    ]
    assert (record.answer, record.memory) == ("A", "B")


def test_bad_lines_are_named(tmp_path: Path) -> None:
    bad = [OWN | {"context": " "}, OWN | {"answer": ""}, OWN | {"memry": "x"}, {"context": "c", "question": "q"}, "{"]
    bad += [OWN | {"options": ["x", "y"]}, OWN | {"options": "x"}, OWN | {"question": 3}]
    with pytest.raises(BadRecord) as error:
        read_context(write(tmp_path / "r.jsonl", OWN, *bad))
    lines = str(error.value).splitlines()
    for line, words in zip(
        lines[1:],
        [
            "line 2: a record has no context",
            "line 3: a record has no answer",
            "line 4: unknown key 'memry'. Did you mean 'memory'",
            "line 5: answer is missing",
            "line 6: no valid JSON",
            "line 7: the answer 'Rome' is none of the options x, y",
            "line 8: options must be a list",
            "line 9: question must be a text",
        ],
        strict=True,
    ):
        assert words in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "no instruction"}, "no instruction"),
        ({"classes": "[' a'"}, "classes must be a list of two"),
        ({"classes": "[' a.', ' b.', ' c.']"}, "classes must be a list of two"),
        ({"answer_index": 2}, "answer_index 0 or 1"),
    ],
)
def test_bad_memotrap_lines_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRecord, match=f"line 1: .*{words}"):
        read_context(write(tmp_path / "m.jsonl", MEMOTRAP | change))


def test_unknown_shapes_and_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match="unknown shape with keys text"):
        read_context(write(tmp_path / "r.jsonl", {"text": "x"}))
    with pytest.raises(BadInput, match="no format is called 'squad'"):
        read_context(write(tmp_path / "r.jsonl", OWN), format="squad")


def test_limit_and_seed_choose_records(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *(OWN | {"id": i} for i in range(20)))
    assert [r.id for r in read_context(path, limit=3)] == ["0", "1", "2"]
    shuffled = [r.id for r in read_context(path, seed=1)]
    assert shuffled != [str(i) for i in range(20)]
    assert sorted(shuffled, key=int) == [str(i) for i in range(20)]
    assert [r.id for r in read_context(path, seed=1, limit=3)] == shuffled[:3]


def test_halves_share_nothing_and_the_odd_one_goes_to_the_second() -> None:
    assert halves([1, 2, 3, 4, 5]) == ([1, 2], [3, 4, 5])
    with pytest.raises(BadInput, match="cannot be halved"):
        halves([1])


def test_a_file_of_facts_is_known_as_one(tmp_path: Path) -> None:
    facts = [{"prompt": f"{i}", "target": "t", **({"old": ["o"]} if i % 2 else {})} for i in range(32)]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    with pytest.raises(BadRecord, match="all 32 lines: it is a fact, as rome.* A record needs context") as caught:
        read_context(tmp_path / "facts.jsonl")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
