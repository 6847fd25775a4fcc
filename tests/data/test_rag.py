"""Sets for Parenting: deterministic, split by article, and what each record promises."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rag_files import official, records, squad

from lmpatch.data._rag_build import cut
from lmpatch.data._rag_source import has_words
from lmpatch.data._rag_types import answer_type, replaced, shape
from lmpatch.data.rag import Build, Sets, build, f1, known, read_built, read_questions, read_rag, refused, write
from lmpatch.errors import BadInput, BadRecord

SMALL = Build(held_out=0.5)


@pytest.fixture
def sets(tmp_path: Path) -> Sets:
    return build(read_questions(squad(tmp_path / "s.jsonl")), SMALL)


def lines(path: Path, *items: Any) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items) + "\n")
    return path


def test_two_runs_and_two_hash_seeds_write_the_same_bytes(tmp_path: Path) -> None:
    source = squad(tmp_path / "s.jsonl")
    code = (
        "import sys; from pathlib import Path; from lmpatch.data.rag import *\n"
        "cfg, source, out = Build(held_out=0.5), sys.argv[1], sys.argv[2]\n"
        "write(build(read_questions(source), cfg), out, source=source, cfg=cfg)"
    )
    found = []
    for seed in ("1", "2"):
        out = tmp_path / f"out{seed}"
        subprocess.run(
            [sys.executable, "-c", code, source, out], check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        found.append(
            [hashlib.sha256((out / name).read_bytes()).hexdigest() for name in ("train.jsonl", "held_out.jsonl")]
        )
    assert found[0] == found[1]
    manifest = json.loads((tmp_path / "out1/manifest.json").read_text())
    assert list(manifest["files"].values()) == found[0]
    train = read_built(tmp_path / "out1/train.jsonl")
    assert len(train) == sum(n for name, n in manifest["counts"].items() if name.startswith("train"))


def test_the_order_of_a_file_decides_nothing(tmp_path: Path) -> None:
    forward = build(read_questions(lines(tmp_path / "a.jsonl", *records())), SMALL)
    backward = build(read_questions(lines(tmp_path / "b.jsonl", *reversed(records()))), SMALL)
    assert [r for r in forward.records if r.kind != "extraction"] != []
    pick = ("original", "substituted", "foreign", "unanswerable")
    assert [r for r in forward.records if r.variant in pick] == [r for r in backward.records if r.variant in pick]


def test_both_layouts_of_squad_give_the_same_sets(tmp_path: Path, sets: Sets) -> None:
    assert build(read_questions(official(tmp_path / "o.json")), SMALL).records == sets.records


def test_no_article_stands_on_both_sides(sets: Sets) -> None:
    sides = {part: {r.title for r in sets.records if r.part == part} for part in ("train", "held_out")}
    assert all(sides.values()) and not sides["train"] & sides["held_out"]


def test_every_pair_is_whole_and_its_answer_is_replaced_everywhere(sets: Sets) -> None:
    originals = {r.id.partition(":")[0]: r for r in sets.records if r.variant == "original"}
    others = {r.id.partition(":")[0]: r for r in sets.records if r.variant == "substituted"}
    assert originals and originals.keys() == others.keys()
    for id, other in others.items():
        assert has_words(originals[id].documents[0], originals[id].answer)
        assert has_words(other.documents[0], other.answer)
        assert not any(has_words(other.documents[0], gold) for gold in other.gold)


def test_a_substitute_is_of_the_same_type(sets: Sets) -> None:
    pairs = [(r.gold[0], r.answer, r.question) for r in sets.records if r.variant == "substituted"]
    same = [shape(a) == shape(b) for a, b, _ in pairs]
    assert sum(same) >= 0.9 * len(same)


def test_robustness_documents_hold_no_true_answer_and_extraction_copies_word_for_word(sets: Sets) -> None:
    for r in sets.records:
        if r.kind == "robustness":
            assert not any(has_words(text, gold) for text in r.documents for gold in r.gold) and not r.answer
        if r.kind == "extraction":
            *labels, copy = r.answer.split("\n")
            assert copy in r.documents and copy in r.prompt
            assert sorted(line.partition(": ")[2] for line in labels) == [
                "off-topic noise", "relevant", "same-topic noise",
            ]  # fmt: skip
            assert labels[r.documents.index(copy)].endswith(": relevant")
    assert {r.kind for r in sets.records} == {"adherence", "robustness", "extraction"}


def test_documents_are_whole_sentences_within_the_limit(tmp_path: Path) -> None:
    made = build(read_questions(squad(tmp_path / "s.jsonl")), Build(held_out=0.5, words=9))
    texts = [text for r in made.records for text in r.documents]
    assert texts and max(len(text.split()) for text in texts) <= 9 and all(text.endswith(".") for text in texts)
    assert cut("One two. Three four five. Six.", 4, "four") == "Three four five. Six."
    assert cut("One two three.", 2) is None


def test_mixed_records_are_held_out_only_unless_distractors_are_asked_for(tmp_path: Path, sets: Sets) -> None:
    assert {r.part for r in sets.records if r.variant == "mixed"} == {"held_out"}
    more = build(read_questions(squad(tmp_path / "s.jsonl")), Build(held_out=0.5, distractors=True))
    assert {len(r.documents) for r in more.records if r.variant == "original" and r.part == "train"} == {3}


def test_a_raw_file_and_its_built_files_give_the_same_records(tmp_path: Path) -> None:
    source, cfg = squad(tmp_path / "s.jsonl"), Build()
    write(build(read_questions(source), cfg), tmp_path / "sets", source=source, cfg=cfg)
    for part in ("train", "held_out"):
        assert read_rag(source, part=part) == read_rag(tmp_path / f"sets/{part}.jsonl", part=part)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no records of the part held_out"):
        read_rag(tmp_path / "sets/train.jsonl", part="held_out")


def test_logs_that_share_a_document_stay_on_one_side(tmp_path: Path) -> None:
    shared = "The hall of Arun was built in 1820."
    logs = [
        {
            "question": f"When was house {i} built?",
            "documents": [f"House {i} was built in {1900 + i}.", *([shared] if i < 4 else [])],
            "answer": str(1900 + i),
        }
        for i in range(12)
    ]
    articles = [q.article for q in read_questions(lines(tmp_path / "l.jsonl", *logs))]
    assert len(set(articles[:4])) == 1 and len(set(articles)) == 9
    assert build(read_questions(tmp_path / "l.jsonl"), SMALL).records


def test_a_log_whose_documents_do_not_answer_is_unanswerable_and_keeps_its_answer(tmp_path: Path) -> None:
    log = {"question": "Who?", "documents": ["It rains."], "answer": "Anna"}
    (question,) = read_questions(lines(tmp_path / "l.jsonl", log))
    assert question.answers == () and question.gold == ("Anna",)


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"question": "Who?", "answer": "Anna"}, "unknown shape"),
        ({"question": "Who?", "documents": [], "answer": "Anna"}, "documents must be"),
        ({"question": "Who?", "documents": ["  "], "answer": "Anna"}, "documents must be"),
        ({"question": "Who?", "documents": ["It rains."]}, "answer is missing"),
        ({"question": "Who?", "documents": ["It rains."], "answer": " "}, "answer is missing"),
        ({"title": "T", "context": "It rains.", "question": "Who?"}, "no answers, and is_impossible"),
        ({"documents": ["It rains."], "answer": "Anna"}, "question is missing"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: Any, complaint: str) -> None:
    good = {"question": "Who?", "documents": ["Anna came."], "answer": "Anna"}
    with pytest.raises(BadRecord, match=f"(?s)line 2: .*{complaint}"):
        read_questions(lines(tmp_path / "l.jsonl", good, bad, good))


def test_one_article_cannot_be_split(tmp_path: Path) -> None:
    one = [r for r in records() if r["title"] == "Town_of_Arun"]
    with pytest.raises(BadInput, match="1 article cannot be split"):
        build(read_questions(lines(tmp_path / "s.jsonl", *one)))


def test_a_built_record_with_an_unknown_key_or_kind_is_named(tmp_path: Path) -> None:
    good = {"question": "Who?", "documents": ["Anna came."], "kind": "adherence", "answer": "Anna"}
    for bad, complaint in (({**good, "documnets": []}, "documents"), ({**good, "kind": "both"}, "kind is 'both'")):
        with pytest.raises(BadRecord, match=f"(?s)line 2: .*{complaint}"):
            read_built(lines(tmp_path / "b.jsonl", good, bad))


def test_replacing_keeps_to_whole_words_and_capitals() -> None:
    assert replaced("Rome, Romeo and rome.", "Rome", "Oslo") == "Oslo, Romeo and rome."
    assert replaced("the cat; The cats; The cat", "the cat", "a dog") == "a dog; The cats; A dog"
    assert replaced("no such", "Rome", "Oslo") is None
    assert replaced("a a", "a", "b") is None
    assert replaced("xx " * 7, "xx", "yy") is None


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("1953", "year"), ("4 May 1953", "date"), ("12%", "percent"), ("$40", "money"), ("30 km", "unit"),
        ("1,200", "number"), ("Anna Reed", "name"), ("Rome", "word"), ("wheat", "phrase1"),
        ("very cold water indeed", "phrase3"),
    ],
)  # fmt: skip
def test_the_shape_of_an_answer(answer: str, wanted: str) -> None:
    assert shape(answer) == wanted
    assert answer_type(answer, "In what year, and how many?") == (wanted, "what")


def test_refusals_and_known_answers() -> None:
    assert all(map(refused, ("", " . ", "I do not know.", "I don't know who", "Unknown")))
    assert not any(map(refused, ("Paris", "Not sureties", "Unknown Pleasures")))
    assert f1("the Eiffel Tower", "Eiffel tower!") == 1 and f1("a b", "c") == 0
    assert known("in Paris", ["Paris"]) and not known("Rome", ["Paris"]) and not known("", ["Paris"])
