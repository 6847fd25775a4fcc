"""Reading records with documents, their sources, and writing built files.

A source is told from its records:

``squad``   the official layout (``{"data": [{"title", "paragraphs": [...]}]}``), or one question a line::

    {"id": "q1", "title": "Normans", "context": "...", "question": "...", "answers": [{"text": "France"}]}

``logs``    a user's own, one object a line; ``title`` and ``id`` are optional::

    {"question": "...", "documents": ["...", "..."], "answer": "Paris"}
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

from ...errors import BadInput, BadRecord
from ...files import new_folder
from ..lines import Line, only, parsed, read_records, text_of, texts_of
from ..matching import whole
from .build import Build, Sets, build
from .record import Part, Question, RagRecord, render
from .types import f1, has_words, holds, known, normalise, refused

__all__ = [
    "Build", "Question", "RagRecord", "Sets", "build", "closed_book", "counts", "f1", "holds", "is_built", "known",
    "normalise", "read_built", "read_questions", "read_rag", "refused", "render", "whole", "write",
]  # fmt: skip

STORED = [f.name for f in fields(RagRecord) if f.name not in ("prompt", "without_context")]
INSTRUCTION = "Answer the following questions based on your internal knowledge with one or few words."
SHOWN = (
    ("What is the capital of France?", "Paris"),
    ("When did the Second World War end?", "1945"),
    ("What gas do plants take in from the air?", "carbon dioxide"),
)
"""Questions with answers that stand before the one asked."""


def read_rag(path: str | Path, *, part: Part = "train", limit: int | None = None) -> list[RagRecord]:
    """The records of one part, from a built file or a raw one, built with the default ``Build``.

    Args:
        limit: at most this many records of each kind, the first ones.
    Raises:
        BadInput: no such file, an unknown shape, or no records of that part.
        BadRecord: lines that cannot be read; names the file and the first ten of them.
    """
    if limit is not None and limit < 1:
        raise BadInput(f"limit is {limit}; give 1 or more.")
    seen: Counter[str] = Counter()
    kept = []
    for record in read_built(path) if is_built(path) else build(read_questions(path)).records:
        if record.part == part:
            seen[record.kind + record.variant] += 1
            if limit is None or seen[record.kind + record.variant] <= limit:
                kept.append(record)
    if not kept:
        raise BadInput(f"{path} holds no records of the part {part}. Give the other file of `lmpatch data rag`.")
    return kept


def _read(path: str | Path, *, limit: int | None = None, check: bool = False) -> list[RagRecord]:
    return read_rag(path, limit=limit)


RagRecord.read = staticmethod(_read)  # type: ignore[method-assign]  # here, since a raw file is built on the way in


def is_built(path: str | Path) -> bool:
    """Whether a file holds built records rather than their source; told from its first record."""
    return "kind" in next((record for _, record in parsed(Path(path)) if isinstance(record, dict)), ())


def read_built(path: str | Path) -> list[RagRecord]:
    """Read a file that ``write`` made, or one by hand."""

    def make(record: Line, place: int) -> RagRecord:
        only(record, [field.name for field in fields(RagRecord)])
        values: dict[str, Any] = {name: texts_of(record, name) for name in ("documents", "gold")}
        values |= {name: text_of(record, name, "") for name in record if name not in (*values, "id")}
        return RagRecord(**{"question": "", **values, "id": str(record.get("id", place))})

    return [record for _, record in read_records(Path(path), make)]


def read_questions(path: str | Path) -> list[Question]:
    """Read a source. What cannot be read, without documents or an answer, is named as by ``read_rag``."""
    made: list[Question] = []
    logs: list[list[str]] = []  # the documents of each log

    def make(record: Line, place: int) -> None:
        if "data" in record:
            made.extend(_official(record))
        elif "documents" in record:
            made.append(_log(record, str(record.get("id", place))))
            logs.append(record["documents"])
        elif "context" in record:
            made.append(_flat(record, str(record.get("id", place))))
        else:
            raise BadRecord(
                f"unknown shape with keys {', '.join(record) or 'none'}. A log has question, documents and answer; "
                "a SQuAD record has context, question and answers"
            )

    read_records(Path(path), make)
    if not made:
        raise BadInput(f"{path} holds no questions.")
    if len(logs) not in (0, len(made)):
        raise BadInput(f"{path} mixes logs and SQuAD records. Give one sort in a file.")
    return _grouped(made, logs) if logs else made


def _official(record: Line) -> Iterator[Question]:
    try:
        for article in record["data"]:
            for paragraph in article["paragraphs"]:
                for number, qa in enumerate(paragraph["qas"]):
                    id = str(qa.get("id", number))
                    try:
                        yield _flat({"title": article["title"], "context": paragraph["context"], **qa}, id)
                    except BadRecord as error:  # the whole file is one line
                        raise BadRecord(f"question {id}: {error}") from None
    except (KeyError, TypeError) as error:
        raise BadRecord(f"not the official SQuAD layout: {error!r}") from None


def _flat(record: Line, id: str) -> Question:
    title, context, question = (text_of(record, key) for key in ("title", "context", "question"))
    given: Any = record.get("answers") or []
    given = given.get("text", []) if isinstance(given, dict) else given  # a column of texts, as some copies have it
    texts: list[Any] = [a.get("text") if isinstance(a, dict) else a for a in given]
    if not all(isinstance(text, str) for text in texts):
        raise BadRecord(f"answers must be a list of texts, or of objects with text, found {given!r}")
    if not context.strip():
        raise BadRecord("the context is empty")
    answers = _distinct(texts)
    if not answers and record.get("is_impossible") is not True:
        raise BadRecord("no answers, and is_impossible is not true")
    if absent := [answer for answer in answers if answer not in context]:
        raise BadRecord(f"the answer {absent[0]!r} does not stand in its context")
    return Question(id, title, context, question, answers, answers, title)


def _log(record: Line, id: str) -> Question:
    """The document with the answer is the context; without one the question is unanswerable from its documents."""
    documents = texts_of(record, "documents")
    if not documents or not all(map(str.strip, documents)):
        raise BadRecord("documents must be a list of one or more texts, none of them empty")
    given = record.get("answer", record.get("answers"))
    gold = _distinct([given] if isinstance(given, str) else texts_of({"answer": given or []}, "answer"))
    if not gold:
        raise BadRecord("answer is missing or empty; give a text, or a list of texts")
    holding = [d for d in documents if any(has_words(d, answer) for answer in gold)]
    context = (holding or documents)[0]
    answers = tuple(answer for answer in gold if has_words(context, answer))
    title = text_of(record, "title", "")
    others = tuple(d for d in documents if d != context and d not in holding)
    return Question(id, title, context, text_of(record, "question"), answers, gold, title, others)


def _distinct(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _grouped(questions: Sequence[Question], documents: Sequence[Sequence[str]]) -> list[Question]:
    """Logs that share a title or a document, directly or through others, are one article."""
    parent = list(range(len(questions)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, (question, texts) in enumerate(zip(questions, documents, strict=True)):
        marks = [f"text {' '.join(text.split()).casefold()}" for text in texts]
        marks += [f"title {question.title}"] if question.title else []
        for mark in marks:
            parent[root(i)] = root(first.setdefault(mark, i))
    names = [questions[root(i)].title or f"log {questions[root(i)].id}" for i in range(len(questions))]
    return [replace(question, article=name) for question, name in zip(questions, names, strict=True)]


def write(sets: Sets, folder: str | Path, *, source: str | Path, cfg: Build) -> dict[str, Any]:
    """Write ``train.jsonl``, ``dev.jsonl``, ``held_out.jsonl`` and ``manifest.json`` into a new folder, all or none.

    Returns:
        the manifest: settings, counts, asked and built of each set, what was skipped and why, SHA-256 of source and
        files.
    Raises:
        BadInput: the folder is there.
    """
    folder = Path(folder)
    if folder.exists():
        raise BadInput(f"{folder} exists already. Give another folder, or remove it first.")
    with new_folder(folder) as work:
        files = {}
        for part in get_args(Part):
            kept = [{name: getattr(record, name) for name in STORED} for record in sets.records if record.part == part]
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
            (work / f"{part}.jsonl").write_text(text, encoding="utf-8", newline="\n")
            files[f"{part}.jsonl"] = hashlib.sha256(text.encode()).hexdigest()
        manifest = {
            "source": Path(source).name,
            "source_sha256": hashlib.sha256(Path(source).read_bytes()).hexdigest(),
            "settings": asdict(cfg),
            "counts": counts(sets.records),
            "built": {name: {"asked": asked, "built": built} for name, (asked, built) in sets.built.items()},
            "skipped": dict(sets.skipped),
            "files": files,
        }
        (work / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def counts(records: Sequence[RagRecord]) -> dict[str, int]:
    """``part/kind/variant`` → how many."""
    return dict(sorted(Counter(f"{r.part}/{r.kind}/{r.variant}" for r in records).items()))


def closed_book(question: str) -> str:
    """The prompt without documents that asks for the model's own answer.

    Differs: three examples follow the instruction of COIECD's prompt (arXiv:2402.11893); without them a small base
    model often answers nothing at all.
    """
    asked = [*SHOWN, (question.strip(), "")]
    return "\n\n".join([INSTRUCTION, *(f"Question: {q}\nAnswer: {a}".rstrip() for q, a in asked)])
