"""A folder with a few made-up records of every task the general bench reads, in the shapes they are published in."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

ARC = [
    {"id": f"a{i}", "question": f"Where is the tower number {i}?", "answerKey": key,
     "choices": {"text": ["in Paris", "in Rome", "Tokyo", "near Seattle"][: len(labels)], "label": list(labels)}}
    for i, (key, labels) in enumerate([("A", "ABCD"), ("3", "1234"), ("B", "ABC")])
]  # fmt: skip

RECORDS: dict[str, list[dict[str, Any]]] = {
    "general/commonsense_qa_val.jsonl.gz": [
        {"question": f"What is the capital of {place}?", "answerKey": key,
         "choices": {"label": list("ABCDE"), "text": ["Rome", "Paris", "Tokyo", "an Apple", "French"]}}
        for place, key in (("Italy", "A"), ("France", "B"), ("Japan", "C"))
    ],
    **{
        f"general/anli_R{i}_dev.jsonl.gz": [
            {"context": f"The tower {i} is in Rome.", "hypothesis": "It is in Italy.", "label": label}
            for label in "enc"
        ]
        for i in (1, 2, 3)
    },
    "mmlu/test_7000.jsonl.gz": [
        {"question": f"What is {i} times 2?", "answer": str(i), "subject": "math"}
        | {f"choice{j}": str(2 * j) for j in range(4)}
        for i in range(3)
    ],
    "squad/squad_v2_dev.jsonl.gz": [
        {"id": str(i), "title": "Tower", "context": "The tower is in Rome.", "question": f"Where is it {i}?",
         "answers": [{"text": "in Rome", "answer_start": 13}], "is_impossible": False}
        for i in range(3)
    ] + [{"id": "9", "title": "Tower", "context": "x", "question": "Why?", "answers": [], "is_impossible": True}],
    "general/arc_easy_val.jsonl.gz": ARC,
    "general/arc_challenge_val.jsonl.gz": ARC,
    "general/hellaswag_val.jsonl.gz": [
        {"ind": i, "ctx": f"Danielle {i} speaks French. She", "label": i,
         "endings": ["lives in Paris.", "is a tower.", "founded Apple.", "is the capital."]}
        for i in range(3)
    ],
    "general/piqa_val.jsonl.gz": [
        {"goal": f"find tower {i}", "sol1": "go to Rome ", "sol2": "speak French", "label": i % 2} for i in range(3)
    ],
    "general/winogrande_val.jsonl.gz": [
        {"sentence": f"Steve {i} met Danielle because _ speaks French.", "option1": "Steve", "option2": "Danielle",
         "answer": str(1 + i % 2)}
        for i in range(3)
    ],
    "general/boolq_val.jsonl.gz": [
        {"question": f"is the tower {i} in rome", "answer": i == 1, "passage": "The tower is in Rome."}
        for i in range(3)
    ],
    "general/openbookqa_val.jsonl.gz": [
        {"question_stem": f"The tower {i} is in", "answerKey": "B",
         "choices": {"text": ["Paris", "Rome", "Japan", "Italy"], "label": list("ABCD")}}
        for i in range(3)
    ],
}  # fmt: skip
TEXT = "wikitext2/raw_test.txt.gz"
WORDS = "The tower is in Rome . Paris is the capital of France and Danielle speaks French .".split()  # noqa: SIM905


def write(folder: Path, *names: str) -> Path:
    """The files of those names, all of them without any, and three windows of text; names may be parts."""
    for name, records in RECORDS.items():
        if not names or any(part in name for part in names):
            put(folder / name, "".join(json.dumps(record) + "\n" for record in records))
    if not names or any(part in TEXT for part in names):
        put(folder / TEXT, " ".join(WORDS[i * i % len(WORDS)] for i in range(3 * 256 + 100)))
    return folder


def put(path: Path, text: str) -> None:
    """A file, gzipped if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
