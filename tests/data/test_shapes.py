"""Files as they lie around, tables in Python, and damaged files: read, or refused in one line that says where."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rag_files import official, records, squad

from lmpatch.data.context import ContextRecord, read_context
from lmpatch.data.edits import Ask, Edit, read_asks, read_edits
from lmpatch.data.lines import read_text
from lmpatch.data.rag.reader import RagRecord, build, read_built, read_questions, read_rag
from lmpatch.errors import BadInput, BadRecord, LmpatchError

FACTS: list[dict[str, Any]] = [
    {"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "target": "Rome"},
    {"prompt": "The Louvre is in", "subject": "Louvre", "target": "Oslo"},
]
WANTED = [("The Eiffel Tower is in", "Rome"), ("The Louvre is in", "Oslo")]
HALF = "The \ud83d Tower is in"
DEEP = "[" * 100_000


def told(source: Any) -> list[tuple[str, str]]:
    return [(edit.prompt, edit.target) for edit in read_edits(source)]


# Containers


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lines.json", "\n".join(map(json.dumps, FACTS))),
        ("lines", "\n".join(map(json.dumps, FACTS))),
        ("list.jsonl", json.dumps(FACTS)),
        ("pretty.jsonl", "\n" + json.dumps(FACTS, indent=1)),
        ("wrapped.json", json.dumps({"version": 1, "data": FACTS})),
        ("wrapped.jsonl", json.dumps({"data": FACTS}, indent=1)),
        ("facts.csv", "prompt,subject,target\nThe Eiffel Tower is in,Eiffel Tower,Rome\nThe Louvre is in,,Oslo\n"),
        ("semicolons.csv", 'prompt;target\nThe Eiffel Tower is in;Rome\r\n"The Louvre is in";"Oslo"'),
        ("facts.tsv", "target\tprompt\nRome\tThe Eiffel Tower is in\nOslo\tThe Louvre is in\n"),
        ("index.csv", ",prompt,target,id\n0,The Eiffel Tower is in,Rome,\n1,The Louvre is in,Oslo,\n"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_is_told_by_what_it_holds(tmp_path: Path, name: str, text: str, packed: bool) -> None:
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert told(path) == WANTED
    assert [edit.id for edit in read_edits(path)] == ["0", "1"]


def test_one_object_over_many_lines_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(FACTS[0], indent=2))
    assert told(tmp_path / "one.json") == WANTED[:1]


def test_a_cell_in_brackets_is_json_and_commas_in_quotes_are_text(tmp_path: Path) -> None:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["prompt", "target", "rephrases", "locality"])
    near = {"near": [{"prompt": "Its river, the Seine, is in", "answers": ["Paris"]}]}
    writer.writerow(["The tower, of iron, is\nin", 1889, json.dumps(["a b", "c"]), json.dumps(near)])
    (tmp_path / "f.csv").write_text(out.getvalue())
    (edit,) = read_edits(tmp_path / "f.csv")
    assert (edit.prompt, edit.target, edit.rephrases) == ("The tower, of iron, is\nin", "1889", ("a b", "c"))
    assert edit.locality == (("near", (Ask("Its river, the Seine, is in", ("Paris",)),)),)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('prompt,target\na,"b\nc,d\n', "no valid CSV"),
        ("prompt,target\na,b,c\n", "line 2: it has more cells"),
        ("prompt,target,rephrases\na,b,['x']\n", "line 2: no valid JSON"),
        ("prompt,target\na,b\nc,\n", "line 3: target is missing"),
        ("prompt,target,target\na,b,c\n", "two columns of one name"),
        ("what,ever\na,b\n", "line 2: unknown shape with keys what, ever"),
    ],
)
def test_csv_that_cannot_be_read_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "f.csv").write_text(text)
    with pytest.raises(BadInput, match=complaint):
        read_edits(tmp_path / "f.csv")


class Table:
    """What is used of a pandas ``DataFrame``, which is not installed everywhere: a column of numbers with a gap."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def convert_dtypes(self) -> Table:
        return Table([{k: int(v) if v == v and isinstance(v, float) else v for k, v in r.items()} for r in self.rows])

    def astype(self, kind: type) -> Table:
        return self

    def notna(self) -> list[dict[str, bool]]:
        return [{k: v == v for k, v in row.items()} for row in self.rows]

    def where(self, given: list[dict[str, bool]], other: None) -> Table:
        return Table([{k: v if g[k] else other for k, v in r.items()} for r, g in zip(self.rows, given, strict=True)])

    def to_dict(self, way: str) -> list[dict[str, Any]]:
        assert way == "records"
        return self.rows


def test_tables_in_python_are_read_like_files() -> None:
    assert told(FACTS) == told(iter(FACTS)) == told(tuple(FACTS)) == WANTED
    rows = [
        FACTS[0] | {"target": 1990.0, "id": None},
        FACTS[1] | {"target": 1991.0, "id": "x", "relation": float("nan")},
    ]
    assert [(e.target, e.id, e.relation) for e in read_edits(Table(rows))] == [("1990", "0", ""), ("1991", "x", "")]
    assert read_text(iter([{"text": "a "}])) == ["a"]
    assert read_asks([{"question": "who?", "answer": None, "prompt": None}]) == [Ask("who?")]
    asked = {"context": "It is in Rome.", "question": "Where?", "answer": "Rome", "memory": None, "options": None}
    assert read_context([asked])[0].memory == ""
    assert len(read_questions(records())) == len(records())
    with pytest.raises(BadRecord, match="record 2: target is missing"):
        read_edits([FACTS[0], {"prompt": "x"}])
    for wrong in ({"train": FACTS}, 5, None):
        with pytest.raises(BadInput, match="no list of records"):
            read_edits(wrong)  # type: ignore[arg-type]
    with pytest.raises(BadRecord, match="found Edit"):
        read_edits([Edit("a", "b")])


def test_a_real_table_is_read(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = pandas.DataFrame([FACTS[0] | {"target": 1990, "old": ["Paris"]}, FACTS[1] | {"target": None, "id": 7}])
    frame.loc[1, "target"] = 1991
    (first, second) = read_edits(frame)
    assert (first.target, first.old, first.id, second.target, second.id) == ("1990", ("Paris",), "0", "1991", "7")


def test_a_real_dataset_is_read() -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [FACTS[0] | {"rephrases": ["a"], "locality": {"near": [{"prompt": "p", "answers": ["q"]}]}}, FACTS[1]]
    assert told(datasets.Dataset.from_list(rows)) == WANTED


# Shapes of the editing literature


MEND = {
    "subject": "M. Quell", "src": "What school did M. Quell attend?", "pred": "Fir", "alt": "Oak", "answers": ["Elm"],
    "rephrase": "Where did M. Quell study?", "loc": "nq question: who wrote it", "loc_ans": "nobody", "cond": "x",
}  # fmt: skip
REWRITE = {
    "prompt": "{} is a citizen of", "relation_id": "P27", "target_new": {"str": "Norland"},
    "target_true": {"str": "Sudland"}, "subject": "M. Quell", "question": "Which country is M. Quell of?",
}  # fmt: skip
MQUAKE = {
    "case_id": 1, "requested_rewrite": [REWRITE], "questions": ["Which sea does M. Quell's country touch?"],
    "new_answer": "North Sea", "new_answer_alias": ["the North Sea"],
}  # fmt: skip
KNOWN = {
    "known_id": 3, "subject": "Mount X", "attribute": "Asia", "template": "{} is in", "prediction": " Asia",
    "prompt": "Mount X is in", "relation_id": "P30",
}  # fmt: skip
RIPPLE = {
    "example_type": "popular", "Relation_Specificity": [],
    "edit": {"prompt": "The spouse of M. Quell is J. Dow.", "subject_id": "Q1", "target_id": "Q3"},
}  # fmt: skip


def test_zsre_of_mend_takes_alt_and_the_true_answer_is_the_old_one() -> None:
    assert read_edits([MEND]) == [
        Edit(
            "What school did M. Quell attend?", "Oak", "M. Quell", "Elm", rephrases=["Where did M. Quell study?"],
            locality={"unrelated": [Ask("who wrote it", ("nobody",))]}, id="0",
        )
    ]  # fmt: skip
    assert read_edits([MEND | {"answers": None, "loc": None}])[0].old == ("Fir",)


def test_mquake_is_read_where_a_record_holds_one_fact() -> None:
    (edit,) = read_edits([MQUAKE])
    assert (edit.prompt, edit.target, edit.subject, edit.old) == (
        "M. Quell is a citizen of", "Norland", "M. Quell", ("Sudland",),
    )  # fmt: skip
    assert edit.rephrases == ("Which country is M. Quell of?",) and edit.locality == () and edit.id == "1"
    hop = Ask("Which sea does M. Quell's country touch?", ("North Sea", "the North Sea"))
    assert edit.portability == (("reasoning", (hop,)),)
    with pytest.raises(BadRecord, match="holds 2 facts.*each fact as a record of its own"):
        read_edits([MQUAKE | {"requested_rewrite": [REWRITE, REWRITE]}])


def test_known_1000_states_the_true_attribute_and_ripple_edits_get_a_hint() -> None:
    assert read_edits([KNOWN]) == [Edit("Mount X is in", "Asia", "Mount X", id="3", relation="P30")]
    with pytest.raises(BadRecord, match="RippleEdits' own files.*KnowEdit"):
        read_edits([RIPPLE])


# Values


def test_null_in_an_optional_field_means_absent() -> None:
    optional = ("subject", "old", "aliases", "rephrases", "locality", "portability", "id", "relation")
    bare = {"prompt": "p", "target": "t"}
    assert read_edits([bare | dict.fromkeys(optional)]) == read_edits([bare])
    assert read_edits([bare | {"locality": {"near": None}, "aliases": [None, "x"]}])[0].aliases == ("x",)
    flat = {"prompt": "The X is", "target_new": "t", "subject": "X"}
    for key in ("ground_truth", "rephrase_prompt", "rephrase", "locality_prompt", "locality", "portability", "case_id"):
        assert read_edits([flat | {key: None}]) == read_edits([flat])
    context = {"context": "c", "question": "q", "answer": "a"}
    assert read_context([context | dict.fromkeys(("memory", "options", "prompt", "bare", "id"))]) == read_context(
        [context]
    )
    built = {"question": "q", "documents": ["d"], "answer": "a"}
    assert read_built([built | dict.fromkeys(("gold", "title", "id", "part", "kind"))]) == read_built([built])
    log = {"question": "Who?", "documents": ["Anna came."], "answer": "Anna"}
    assert read_questions([log | {"title": None, "id": None}]) == read_questions([log])
    for missing in ("prompt", "target"):
        with pytest.raises(BadRecord, match=f"{missing} is missing"):
            read_edits([FACTS[0], bare | {missing: None}])


@pytest.mark.parametrize(("value", "text"), [(1990, "1990"), (-3, "-3"), (1.5, "1.5"), (10**30, "1" + "0" * 30)])
def test_a_number_is_a_good_answer(value: Any, text: str) -> None:
    (edit,) = read_edits([FACTS[0] | {"target": value, "old": value, "aliases": [value], "id": value}])
    assert (edit.target, edit.old, edit.aliases, edit.id) == (text, (text,), (text,), text)
    (record,) = read_context([{"context": "c", "question": "q", "answer": value}])
    assert record.answer == text
    (question,) = read_questions([{"question": "q", "documents": [f"It is {text} here."], "answer": value}])
    assert question.answers == (text,)


@pytest.mark.parametrize("value", [True, {"str": "x"}, ["x"], float("nan"), float("inf")])
def test_what_is_no_text_is_no_target(value: Any) -> None:
    with pytest.raises(BadRecord, match="target must be a text"):
        read_edits([FACTS[0] | {"target": value}])


def test_values_of_a_wrong_kind_are_named_in_tables_too() -> None:
    huge, flat = 10**5000, {"context": "Anna came.", "question": "Who?"}
    for rows, complaint in [
        ([FACTS[0] | {"target": huge}], "record 1: Exceeds the limit"),
        ([FACTS[0] | {5: "x"}], "record 1: unknown key 5"),
        ([FACTS[0] | {"locality": {5: 7}}], "record 1: locality.5 must be a list"),
    ]:
        with pytest.raises(BadRecord, match=complaint):
            read_edits(rows)
    for answers in (True, [["Anna"]], {"text": {"a": 1}}, [None]):
        with pytest.raises(BadRecord, match="answers must be a list of texts"):
            read_questions([flat | {"answers": answers}])
    trap = {"prompt": "Write it: Joy", "classes": "['a', 'b']", "answer_index": 1.0}
    with pytest.raises(BadRecord, match="answer_index 0 or 1"):
        read_context([trap])
    with pytest.raises(BadRecord, match="classes must be a list"):
        read_context([trap | {"classes": "(" * 5000, "answer_index": 1}])


def test_a_stream_of_documents_is_built_like_a_file(tmp_path: Path) -> None:
    assert read_rag(iter(records())) == read_rag(squad(tmp_path / "s.jsonl"))


# Damage


def gz(text: bytes, *, damaged: bool = False, short: bool = False) -> bytes:
    raw = bytearray(gzip.compress(text))
    if damaged:
        raw[20:26] = b"\xff" * 6
    return bytes(raw[:-20] if short else raw)


GOOD = b'{"prompt": "a", "target": "b"}\n'
DAMAGE: dict[str, tuple[str, bytes, str]] = {
    "half an emoji": ("f.jsonl", GOOD + json.dumps({"prompt": HALF, "target": "x"}).encode(), "line 2: .*half a char"),
    "half in a key": ("f.jsonl", GOOD + json.dumps({"prompt": "a", HALF: "x"}).encode(), "line 2: .*half a char"),
    "damaged gzip": ("f.jsonl.gz", gz(GOOD * 50, damaged=True), "cannot read line 1 of"),
    "cut gzip": (
        "f.jsonl.gz",
        gz(b"".join(GOOD.replace(b"a", b"%d" % i) for i in range(9999)), short=True),
        r"line \d",
    ),
    "deep lines": ("f.jsonl", GOOD + DEEP.encode(), "line 2: it is nested too deeply"),
    "deep json": ("f.json", DEEP.encode(), "line 1, record 1: it is nested too deeply"),
    "deep answers": ("f.jsonl", GOOD[:-2] + b', "old": ' + b"[" * 900 + b'"x"' + b"]" * 900 + b"}", "line 1: .*deeply"),
    "digits": (
        "f.jsonl",
        GOOD + b'{"prompt": "a", "target": ' + b"9" * 5000 + b"}",
        "line 2: a number has more digits",
    ),
    "digits in a list": (
        "f.json",
        b'[\n{"prompt": "a",\n"target": ' + b"9" * 5000 + b"}]",
        "line 2, record 1: a number",
    ),
    "cut list": ("f.json", json.dumps(FACTS, indent=1).encode()[:-30], r"line 9, record 2: no valid JSON \(Unter"),
    "text behind": ("f.json", b"[" + GOOD + b"] x", "line 1: no valid JSON"),
    "no comma": ("f.json", b"[" + GOOD + GOOD + b"]", "line 2, record 1: no valid JSON"),
    "a bad record of a list": (
        "f.json",
        json.dumps([FACTS[0], {"prompt": "x"}], indent=1).encode(),
        "line 7, record 2: t",
    ),
    "not UTF-8": ("f.jsonl", GOOD * 2 + b'{"prompt": "\xe9"}', "cannot read line 3 of"),
    "UTF-16": ("f.jsonl", GOOD.decode().encode("utf-16"), "cannot read line 1 of .*pandas or datasets"),
    "escapes": ("f.jsonl", GOOD + b'{"\\u001b]0;owned\\u0007\\u001b[2J": 1, "prompt": 3}', "line 2: unknown key"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_in_one_line_that_says_where(tmp_path: Path, name: str) -> None:
    file, raw, complaint = DAMAGE[name]
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(BadInput, match=complaint) as caught:
        read_edits(tmp_path / file)
    assert (
        len(str(caught.value).splitlines()) <= 2 and len(str(caught.value)) < 1000 and "\x1b" not in str(caught.value)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Edit(HALF, "x"),
        lambda: Edit("x", HALF),
        lambda: Edit("x", "y", aliases=[HALF]),
        lambda: Ask("x", (HALF,)),
        lambda: ContextRecord("It is in Rome \ud83d", "Where?", "Rome"),
        lambda: RagRecord("Where?", ("It is in Rome \ud83d",), answer="Rome"),
        lambda: read_text([{"text": HALF}]),
        lambda: read_context([{"context": HALF, "question": "Where?", "answer": "Rome"}]),
    ],
)
def test_half_an_emoji_is_refused_wherever_a_record_is_made(make: Callable[[], Any]) -> None:
    with pytest.raises(BadInput, match="half a character"):
        make()


@pytest.mark.parametrize("read", [read_edits, read_asks, read_text, read_context, read_questions, read_built])
def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path: Path, read: Callable[[Any], Any]) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.txt").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.jsonl", tmp_path / "link.txt", tmp_path, Path("/dev/zero")):
        with pytest.raises(BadInput, match="no ordinary file"):
            read(path)
    for name in ("absent.jsonl", "a" * 300, "a\0b"):
        with pytest.raises(BadInput, match="there is no file"):
            read(tmp_path / name)


def test_a_large_file_is_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f.jsonl").write_bytes(GOOD * 3)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("it was read as a whole"))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it was read as a whole"))
    assert len(read_edits(tmp_path / "f.jsonl")) == 3


# SQuAD's layouts


def article(*answers: str | None, **more: Any) -> dict[str, Any]:
    asked = [
        {"id": str(i), "question": "Was?", **({"answers": [{"text": a, "answer_start": 0}]} if a else {})}
        for i, a in enumerate(answers)
    ]
    return {"paragraphs": [{"context": "Rom ist die Hauptstadt von Italien.", "qas": asked}], **more}


def written(path: Path, *articles: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"version": "1", "data": articles}))
    return path


def test_titles_are_optional_and_an_article_or_a_passage_then_stands_for_one(tmp_path: Path) -> None:
    two = read_questions(written(tmp_path / "o.json", article("Rom", "Italien"), article("Rom")))
    assert [q.article for q in two] == ["article 0", "article 0", "article 1"] and {q.title for q in two} == {""}
    flat = {
        "context": "Rom  ist die Hauptstadt.",
        "question": "Was?",
        "answers": {"text": ["Rom"], "answer_start": [0]},
    }
    (q,) = read_questions([flat])
    assert (q.article, q.title, q.answers) == ("Rom ist die Hauptstadt.", "", ("Rom",))


def test_a_source_without_titles_is_built_like_one_with(tmp_path: Path) -> None:
    whole = json.loads(official(tmp_path / "o.json").read_text())
    for each in whole["data"]:
        del each["title"]
    made = build(read_questions(written(tmp_path / "o.json", *whole["data"]))).records
    titled = build(read_questions(squad(tmp_path / "s.jsonl"))).records
    assert {r.variant for r in made} == {r.variant for r in titled} and not any(r.title for r in made)


def test_answers_that_are_not_in_their_passage_are_left_out_counted_and_named(tmp_path: Path) -> None:
    path = written(tmp_path / "o.json", article("Rom", "Berlin", "Rom", "Wien", "Italien", "Bonn", title="Rom"))
    with pytest.warns(UserWarning, match="3 answers .* left out: 'Berlin' of question 1; 'Wien' of question 3; 'Bonn'"):
        read = read_questions(path)
    assert [(q.id, q.answers) for q in read] == [("0", ("Rom",)), ("2", ("Rom",)), ("4", ("Italien",))]
    with pytest.warns(UserWarning, match="13 answers .*of question 9; and 3 more"):
        read_questions(written(tmp_path / "o.json", article("Rom"), article(*["Bonn"] * 13)))
    some = {"context": "Anna came.", "question": "Who?", "answers": ["Anna", "Ann Lee"]}
    with pytest.warns(UserWarning, match="1 answers .*'Ann Lee' of question 0"):
        assert read_questions([some])[0].answers == ("Anna",)
    with pytest.warns(UserWarning), pytest.raises(BadInput, match="no questions"):
        read_questions(written(tmp_path / "o.json", article("Bonn")))


def test_a_question_without_answers_and_other_layouts_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match="record 1: question 1: no answers"):
        read_questions(written(tmp_path / "o.json", article("Rom", None)))
    cmrc = [
        {
            "context_id": "1",
            "context_text": "Rom.",
            "qas": [{"query_id": "1", "query_text": "Was?", "answers": ["Rom"]}],
        }
    ]
    with pytest.raises(BadRecord, match="unknown shape with keys context_id, context_text, qas"):
        read_questions(cmrc)
    for broken in ({"qas": 5}, {"context": 5}, {"qas": [5]}, {"qas": [{"id": []}]}):
        whole = article("Rom")
        whole["paragraphs"][0] |= broken
        with pytest.raises(BadRecord, match="record 1: "):
            read_questions(written(tmp_path / "o.json", whole))


# At random


def mutated(draw: random.Random, raw: bytes) -> bytes:
    data = bytearray(raw)
    for _ in range(draw.choice([0, 0, 1, 1, 2, 5])):
        at = draw.randrange(len(data) + 1)
        piece = draw.choice(
            [b"", b"null", b"[[", b"}", b'"', b",", b"\\ud83d", b"\xff", b"9" * 5000, b"\n", b"NaN", b"\x00"]
        )
        kind = draw.randrange(4)
        if kind == 0:
            data[at:at] = piece
        elif kind == 1:
            del data[at : at + draw.choice([1, 3, 40])]
        elif kind == 2 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        else:
            data = data[: max(at, 1)] if draw.random() < 0.2 else data
            data[at : at + len(piece)] = piece
    return bytes(data)


@pytest.mark.parametrize("seed", range(6))
def test_a_mutated_file_is_read_or_refused_in_lines_that_say_where(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    nested = {
        "locality": {"near": [{"prompt": "p", "answers": ["q"]}]},
        "aliases": ["Roma"],
        "id": None,
        "old": "Paris",
    }
    shapes: list[list[dict[str, Any]]] = [
        [FACTS[0] | nested, FACTS[1]], [MEND, MEND], [MQUAKE, MQUAKE], [KNOWN, KNOWN],
        [{"prompt": "The X is", "target_new": "t", "subject": "X", "locality_prompt": "p", "ground_truth": [["a"]]}],
        [{"context": "Anna came.", "question": "Who?", "answer": "Anna", "memory": "Bo", "options": ["Anna", "Bo"]}],
        [{"question": "Who?", "documents": ["Anna came."], "answer": "Anna"}], [article("Rom")], [{"text": "a"}],
    ]  # fmt: skip
    readers: list[Callable[[Any], Any]] = [read_edits, read_asks, read_context, read_questions, read_text, read_built]
    outcomes = [0, 0]
    for _ in range(60):
        rows = draw.choice(shapes)
        texts = [
            "\n".join(map(json.dumps, rows)),
            json.dumps(rows, indent=draw.choice([None, 1])),
            json.dumps({"data": rows}),
        ]
        name, text = draw.choice([("f.jsonl", texts[0]), ("f.json", texts[1]), ("f.jsonl", texts[2]), ("f.csv", "")])
        if name == "f.csv":
            cells = [json.dumps(v) if isinstance(v, dict | list) else v for v in rows[0].values()]
            out = io.StringIO()
            csv.writer(out).writerows([rows[0].keys(), cells])
            text = out.getvalue()
        raw = mutated(draw, text.encode())
        if draw.random() < 0.3:
            raw, name = gzip.compress(raw), f"{name}.gz"
            raw = mutated(draw, raw) if draw.random() < 0.5 else raw
        (tmp_path / name).write_bytes(raw)
        for read in readers:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    made = read(tmp_path / name)
                json.dumps([str(each) for each in made]).encode()
                outcomes[0] += 1
            except LmpatchError as error:
                outcomes[1] += 1
                assert str(tmp_path / name) in str(error), (raw, error)
                assert all(len(line) < 600 for line in str(error).splitlines()), (raw, error)
    assert outcomes[0] > 10 and outcomes[1] > 100, outcomes
