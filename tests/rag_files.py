"""A small SQuAD-format source, made of sentences whose answers have many types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOWNS = ("Arun", "Belmar", "Corvo", "Dunmore", "Elgin", "Fargo", "Gothem", "Hadley")
RULERS = (
    "Anna Reed",
    "Boris Kant",
    "Clara Moss",
    "David Lund",
    "Emma Stone",
    "Felix Hart",
    "Greta Holm",
    "Hugo Brandt",
)


def records() -> list[dict[str, Any]]:
    """Eight articles of three paragraphs, five answerable and two unanswerable questions each."""
    made: list[dict[str, Any]] = []
    for i, town in enumerate(TOWNS):
        crop = ("wheat", "rye", "hops", "oats")[i % 4]
        texts = [
            f"{town} was founded in {1801 + 7 * i} by settlers. It lies on a wide river. Boats come every day.",
            f"The mayor of {town} is {RULERS[i]}. The council meets in spring. Its hall is made of stone.",
            f"{town} has {120 + 13 * i} shops and {31 + i} schools. People there grow {crop}.",
        ]
        asked = [
            (0, f"When was {town} founded?", [str(1801 + 7 * i)]),
            (1, f"Who is the mayor of {town}?", [RULERS[i], RULERS[i].split()[1]]),
            (2, f"How many shops does {town} have?", [str(120 + 13 * i)]),
            (2, f"How many schools does {town} have?", [str(31 + i)]),
            (2, f"What do people of {town} grow?", [crop]),
            (0, f"How long is the river of {town}?", []),
            (1, f"Who built the hall of {town}?", []),
        ]
        for k, (place, question, answers) in enumerate(asked):
            made.append(
                {
                    "id": f"{town}-{k}",
                    "title": f"Town_of_{town}",
                    "context": texts[place],
                    "question": question,
                    "answers": [{"text": a, "answer_start": texts[place].find(a)} for a in answers],
                    "is_impossible": not answers,
                }
            )
    return made


def squad(path: Path) -> Path:
    """The source as JSON lines."""
    path.write_text("\n".join(json.dumps(r) for r in records()) + "\n")
    return path


def official(path: Path) -> Path:
    """The same in the official layout."""
    articles: dict[str, dict[str, list[Any]]] = {}
    for r in records():
        qa = {k: r[k] for k in ("id", "question", "answers", "is_impossible")}
        articles.setdefault(r["title"], {}).setdefault(r["context"], []).append(qa)
    data = [
        {"title": title, "paragraphs": [{"context": text, "qas": qas} for text, qas in paragraphs.items()]}
        for title, paragraphs in articles.items()
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return path
