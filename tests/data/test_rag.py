"""Sets for Parenting: deterministic, split by article, and what each record promises."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from rag_files import official, records, squad

from lmpatch.data.rag.build import cut
from lmpatch.data.rag.reader import (
    Build,
    Sets,
    build,
    f1,
    holds,
    known,
    normalise,
    read_built,
    read_questions,
    read_rag,
    refused,
    write,
)
from lmpatch.data.rag.types import answer_type, has_words, replaced, shape
from lmpatch.errors import BadInput, BadRecord

SMALL = Build(held_out=0.5)


@pytest.fixture
def sets(tmp_path: Path) -> Sets:
    return build(read_questions(squad(tmp_path / "s.jsonl")), SMALL)


def lines(path: Path, *items: Any) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items) + "\n")
    return path


@pytest.mark.slow
def test_two_runs_and_two_hash_seeds_write_the_same_bytes(tmp_path: Path) -> None:
    source = squad(tmp_path / "s.jsonl")
    code = (
        "import sys; from pathlib import Path; from lmpatch.data.rag.reader import *\n"
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
            [
                hashlib.sha256((out / name).read_bytes()).hexdigest()
                for name in ("train.jsonl", "dev.jsonl", "held_out.jsonl")
            ]
        )
    assert found[0] == found[1]
    manifest = json.loads((tmp_path / "out1/manifest.json").read_text())
    assert list(manifest["files"].values()) == found[0]
    train = read_built(tmp_path / "out1/train.jsonl")
    assert len(train) == sum(n for name, n in manifest["counts"].items() if name.startswith("train"))


@pytest.mark.slow
def test_the_order_of_a_file_decides_nothing(tmp_path: Path) -> None:
    forward = build(read_questions(lines(tmp_path / "a.jsonl", *records())), SMALL)
    backward = build(read_questions(lines(tmp_path / "b.jsonl", *reversed(records()))), SMALL)
    assert [r for r in forward.records if r.kind != "extraction"] != []
    pick = ("original", "substituted", "foreign", "unanswerable")
    assert [r for r in forward.records if r.variant in pick] == [r for r in backward.records if r.variant in pick]


@pytest.mark.slow
def test_both_layouts_of_squad_give_the_same_sets(tmp_path: Path, sets: Sets) -> None:
    assert build(read_questions(official(tmp_path / "o.json")), SMALL).records == sets.records


@pytest.mark.slow
def test_no_article_stands_on_both_sides(sets: Sets) -> None:
    sides = {part: {r.title for r in sets.records if r.part == part} for part in ("train", "dev", "held_out")}
    assert all(sides.values()) and sum(map(len, sides.values())) == len(set().union(*sides.values()))


def test_few_articles_are_split_without_dev(tmp_path: Path) -> None:
    made = build(read_questions(lines(tmp_path / "s.jsonl", *records()[: 4 * 7])), SMALL)
    assert {r.part for r in made.records} == {"train", "held_out"}


def test_every_pair_is_whole_and_its_answer_is_replaced_everywhere(sets: Sets) -> None:
    originals = {r.id.partition(":")[0]: r for r in sets.records if r.variant == "original"}
    others = {r.id.partition(":")[0]: r for r in sets.records if r.variant == "substituted"}
    assert originals and originals.keys() == others.keys()
    for id, other in others.items():
        assert has_words(originals[id].documents[0], originals[id].answer)
        assert has_words(other.documents[0], other.answer)
        if originals[id].answer in originals[id].documents[0]:  # else it begins a sentence there
            assert other.answer in other.documents[0]
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
    assert {r.part for r in sets.records if r.variant == "mixed"} == {"dev", "held_out"}
    more = build(read_questions(squad(tmp_path / "s.jsonl")), Build(held_out=0.5, distractors=True))
    assert {len(r.documents) for r in more.records if r.variant == "original" and r.part == "train"} == {3}


@pytest.mark.slow
def test_a_raw_file_and_its_built_files_give_the_same_records(tmp_path: Path) -> None:
    source, cfg = squad(tmp_path / "s.jsonl"), Build()
    write(build(read_questions(source), cfg), tmp_path / "sets", source=source, cfg=cfg)
    for part in ("train", "dev", "held_out"):
        assert read_rag(source, part=part) == read_rag(tmp_path / f"sets/{part}.jsonl", part=part)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no records of the part held_out"):
        read_rag(tmp_path / "sets/train.jsonl", part="held_out")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cfg = squad(tmp_path / "s.jsonl"), Build()
    sets = build(read_questions(source), cfg)
    real = Path.write_text

    def stop(path: Path, *args: Any, **settings: Any) -> int:
        if path.name == "held_out.jsonl":
            raise KeyboardInterrupt
        return real(path, *args, **settings)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_text", stop)
        write(sets, tmp_path / "sets", source=source, cfg=cfg)
    assert not (tmp_path / "sets").exists()
    write(sets, tmp_path / "sets", source=source, cfg=cfg)
    assert {p.name for p in tmp_path.iterdir()} == {"s.jsonl", "sets"}
    with pytest.raises(BadInput, match="exists already"):
        write(sets, tmp_path / "sets", source=source, cfg=cfg)


def test_what_was_asked_and_built_is_counted_and_every_skip_has_its_reason(sets: Sets) -> None:
    train = [r for r in sets.records if r.part == "train"]
    for name, variant in (("adherence", "substituted"), ("foreign", "foreign"), ("unanswerable", "unanswerable")):
        assert sets.built[f"train/{name}"][1] == sum(r.variant == variant for r in train)
    assert sets.built["train/adherence"][0] == 300 and sets.built["held_out/foreign"][0] == 1500
    answered = 5 * len({r.title for r in train})  # all were tried, since fewer were built than asked
    for name in ("adherence", "foreign", "extraction"):
        assert sets.built[f"train/{name}"][1] <= answered
    parts = {r.title: r.part for r in sets.records}.values()
    tried = sum(5 * 3 + 2 if part == "train" else 5 * 2 for part in parts)
    assert sum(built for _, built in sets.built.values()) + sum(sets.skipped.values()) == tried


def test_a_question_that_no_foreign_document_fits_is_counted(tmp_path: Path) -> None:
    every = "Arun, Belmar, Corvo, Dunmore, Elgin, Fargo, Gothem and Hadley grow wheat, rye, hops and oats."
    told = [r | {"context": f"{r['context']} {every}"} for r in records()]  # each holds the crops' answers
    made = build(read_questions(lines(tmp_path / "s.jsonl", *told)), SMALL)
    crops = sum(r["question"].startswith("What do people") for r in told)
    assert made.skipped["no document of another article is free of its answers"] == crops


def test_a_held_question_has_documents_of_several_other_articles(tmp_path: Path) -> None:
    cfg = Build(held_out=0.5, held_documents=2)
    made = build(read_questions(squad(tmp_path / "s.jsonl")), cfg).records
    texts = {q.context: q.article for q in read_questions(squad(tmp_path / "s.jsonl"))}
    found: dict[tuple[str, str], list[str]] = {}
    for r in made:
        if r.variant == "foreign":
            (article,) = {a for text, a in texts.items() if r.documents[0] in text}
            found.setdefault((r.part, r.id.partition(":")[0]), []).append(article)
    assert {len(set(articles)) for (part, _), articles in found.items() if part == "held_out"} == {2}
    assert all(len(articles) == 1 for (part, _), articles in found.items() if part == "train")
    assert len({r.id for r in made}) == len(made)


def test_training_pairs_look_for_no_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _rag_build: Any = import_module("lmpatch.data.rag.build")

    asked: list[str] = []
    real = _rag_build._Part._noise
    monkeypatch.setattr(_rag_build._Part, "_noise", lambda self, *rest: asked.append(self.part) or real(self, *rest))
    build(read_questions(squad(tmp_path / "s.jsonl")), Build(held_out=0.5, extraction=0))
    assert "train" not in asked and "held_out" in asked


def test_three_documents_are_shorter_than_one(tmp_path: Path) -> None:
    made = build(read_questions(squad(tmp_path / "s.jsonl")), Build(held_out=0.5, extraction_words=9)).records
    longest = {
        kind: max(len(text.split()) for r in made if r.kind == kind for text in r.documents)
        for kind in ("extraction", "robustness")
    }
    assert longest["extraction"] <= 9 < longest["robustness"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_logs_with_several_documents_give_every_set(tmp_path: Path) -> None:
    """What was retrieved beside the answer is noise on the same topic."""
    logs = [
        {
            "question": f"When was house {i} built?",
            "documents": [f"House {i} has {3 + i} doors.", f"House {i} was built in {1900 + i}."],
            "answer": str(1900 + i),
        }
        for i in range(12)
    ]
    made = build(read_questions(lines(tmp_path / "l.jsonl", *logs)), SMALL)
    three = [r for r in made.records if r.kind == "extraction"]
    assert three and all(f"House {r.id[:-6]}" for r in three)
    for r in three:
        labels = dict(zip(r.documents, (line.partition(": ")[2] for line in r.answer.split("\n")), strict=False))
        own = [text for text in r.documents if labels[text] == "same-topic noise"]
        assert own[0].endswith("doors.") and own[0].split()[1] == r.question.split()[3]
    assert {r.variant for r in made.records if r.part == "held_out"} >= {"original", "mixed", "foreign"}


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
        ({"title": "T", "context": "It rains.", "question": "Who?", "answers": [" "]}, "no answers, and is_impossible"),
        ({"documents": ["It rains."], "answer": "Anna"}, "question is missing"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: Any, complaint: str) -> None:
    good = {"question": "Who?", "documents": ["Anna came."], "answer": "Anna"}
    with pytest.raises(BadRecord, match=f"(?s)line 2: .*{complaint}"):
        read_questions(lines(tmp_path / "l.jsonl", good, bad, good))


def test_in_the_official_layout_the_question_is_named(tmp_path: Path) -> None:
    source = json.loads(official(tmp_path / "o.json").read_text())
    qa = source["data"][2]["paragraphs"][1]["qas"][0]
    qa["answers"] = [{"text": "  "}]
    (tmp_path / "o.json").write_text(json.dumps(source))
    with pytest.raises(BadRecord, match=f"question {qa['id']}: no answers"):
        read_questions(tmp_path / "o.json")


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
    assert replaced("Ore is Iron here.", "Iron", "wheat") == "Ore is wheat here."  # as the target says it
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


@pytest.mark.parametrize(
    "answer",
    [
        "", " . ", "I do not know.", "I don't know who", "Unknown", "N/A", "No answer", "I cannot answer", "None.",
        "I have no idea", "I'm sorry, I don't know", "Not mentioned", "It is unknown", "The answer is unknown",
        "I am not sure", "It is not known who did", "Sorry, but I can't say.",
    ],
)  # fmt: skip
def test_a_refusal_says_nothing(answer: str) -> None:
    assert refused(answer)


@pytest.mark.parametrize("answer", ["Paris", "Not sureties", "Unknown Pleasures", "Nonesuch", "I know: Rome", "Noah"])
def test_an_answer_is_no_refusal(answer: str) -> None:
    assert not refused(answer)


@pytest.mark.parametrize(
    ("text", "answer", "held"),
    [
        ("It is Rome.", "rome", True), ("Rome's hall", "Rome", True), ("Romeo", "Rome", False), ("", "", False),
        ("the 10th-century hall", "10th century", True), ("2,000 men", "2000", True), ("2,000 men", "2", False),
        ("2.5 km", "2", False), ("2.5 km", "25", False), ("the U.S. army", "US", True), ("Paris", "the", False),
    ],
)  # fmt: skip
def test_an_answer_is_held_as_whole_words_once_normalised(text: str, answer: str, held: bool) -> None:
    assert holds(text, [answer]) is held


def test_known_is_stricter_than_close() -> None:
    assert f1("the Eiffel Tower", "Eiffel tower!") == 1 and f1("a b", "c") == 0
    assert f1("9th century", "10th century") == 0.5 and not known("9th century", ["10th century"])
    assert f1("William", "William the Conqueror") > 0.5 and not known("William", ["William the Conqueror"])
    assert known("in Paris", ["Paris"]) and known("in May 1953", ["1953", "May 1953"]) and not known("", ["Paris"])
    assert holds("1953 or 1954", ["1953"]) and not known("1953 or 1954", ["1953"])  # another number is a guess


def test_a_number_is_not_replaced_inside_another() -> None:
    assert replaced("2,000 men and 2 dogs", "2", "7") is None  # shorter than two characters
    assert replaced("12,000 men and 12 dogs", "12", "77") == "12,000 men and 77 dogs"
    assert normalise("2.5 and 2,500.") == "2.5 and 2500"
