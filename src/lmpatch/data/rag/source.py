"""Where RAG records are built from: SQuAD-format files, and logs of questions with documents and answers.

``squad``   the official layout (``{"data": [{"title", "paragraphs": [...]}]}``), or one question a line::

    {"id": "q1", "title": "Normans", "context": "...", "question": "...", "answers": [{"text": "France"}]}

``logs``    a user's own, one object a line; ``title`` and ``id`` are optional::

    {"question": "...", "documents": ["...", "..."], "answer": "Paris"}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import BadInput, BadRecord
from ..lines import Line, read_records, text_of
from .types import has_words


@dataclass(frozen=True)
class Question:
    """One question of a source."""

    id: str
    article: str
    """What must not stand on both sides of a split: the title, or a group of logs that share documents."""
    context: str
    question: str
    answers: tuple[str, ...]
    """Answers that stand in the context; none: it does not answer."""
    gold: tuple[str, ...]
    """True answers, whether the context holds them or not."""
    title: str = ""
    others: tuple[str, ...] = ()
    """What else was retrieved and holds no answer."""


def read_questions(path: str | Path) -> list[Question]:
    """Read a source.

    Raises:
        BadInput: no such file, an empty one, or an unknown shape.
        BadRecord: lines that cannot be read: without documents, without an answer; names the first ten of them.
    """
    made: list[Question] = []
    logs: list[list[str]] = []  # the documents of each log

    def make(record: Line, place: int) -> None:
        if "data" in record:
            made.extend(_official(record))
        elif "documents" in record:
            documents = _documents(record)
            made.append(_log(record, documents, str(record.get("id", place))))
            logs.append(documents)
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


def _official(record: Line) -> Iterable[Question]:
    try:
        for article in record["data"]:
            for paragraph in article["paragraphs"]:
                for number, qa in enumerate(paragraph["qas"]):
                    whole = {"title": article["title"], "context": paragraph["context"], **qa}
                    id = str(qa.get("id", number))
                    try:
                        yield _flat(whole, id)
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
    answers = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not answers and record.get("is_impossible") is not True:
        raise BadRecord("no answers, and is_impossible is not true")
    if absent := [answer for answer in answers if answer not in context]:
        raise BadRecord(f"the answer {absent[0]!r} does not stand in its context")
    return Question(id, title, context, question, answers, answers, title)


def _documents(record: Line) -> list[str]:
    documents = record["documents"]
    if not isinstance(documents, list) or not all(isinstance(d, str) and d.strip() for d in documents) or not documents:
        raise BadRecord("documents must be a list of one or more texts, none of them empty")
    return documents


def _log(record: Line, documents: Sequence[str], id: str) -> Question:
    """The document with the answer is the context; without one the question is unanswerable from its documents."""
    given = record.get("answer", record.get("answers"))
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts) or not any(t.strip() for t in texts):
        raise BadRecord("answer is missing or empty; give a text, or a list of texts")
    gold = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
    holding = [d for d in documents if any(has_words(d, answer) for answer in gold)]
    context = (holding or documents)[0]
    found = tuple(answer for answer in gold if has_words(context, answer))
    title = text_of(record, "title", "")
    others = tuple(d for d in documents if d != context and d not in holding)
    return Question(id, title, context, text_of(record, "question"), found, gold, title, others)


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
