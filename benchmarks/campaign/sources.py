"""What lmpatch reads that others wrote: model folders, facts and documents; and what proves that it was read right."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

import lmpatch as lp
from lmpatch.data.context import read_context
from lmpatch.data.edits import read_asks, read_edits
from lmpatch.data.lines import read_text
from lmpatch.data.rag.reader import read_rag
from lmpatch.patches.patch import plain

from .mutate import Files
from .subjects import Subject, folder_of, records
from .tally import Wrong

# Models


def models(room: Path) -> list[Subject]:
    """A model folder in one file, and in several with an index."""

    def saved(family: str, size: str, **settings: Any) -> Files:
        def save(path: Path) -> None:
            tiny_model(family, **settings).save_pretrained(path, max_shard_size=size)
            tiny_tokenizer().save_pretrained(path)

        return folder_of(save, room)

    one, many = saved("llama", "5GB"), saved("llama", "200KB")
    other, tied = saved("llama", "200KB", num_hidden_layers=3), saved("gpt2", "5GB")
    return [
        Subject("model folder", one, check_model, other=other),
        Subject("sharded model folder", many, check_model, other=other),
        Subject("tied model folder", tied, check_model, other=one),
    ]


def check_model(folder: Path) -> None:
    """Every weight of a loaded model is the file's, every tensor of the files is used, and the model works."""
    lm = lp.load(folder / "x")
    stored: dict[str, Tensor] = {}
    for path in sorted((folder / "x").glob("*.safetensors")):
        stored |= safetensors.torch.load(path.read_bytes())
    for name, parameter in lm.model.named_parameters():
        own = next((stored[n] for n in _names(name) if n in stored), None)
        if own is None or own.shape != parameter.shape or not torch.equal(own.to(parameter.dtype), parameter.detach()):
            if own is not None and bool(own.isnan().any()):
                continue
            raise Wrong(f"{name} is not what the files hold")
    known = {n for name in lm.model.state_dict() for n in _names(name)}
    if extra := set(stored) - known:
        raise Wrong(f"{sorted(extra)[0]} of the files is not used")
    lp.generate(lm, ["The tower", "The Eiffel Tower is in"], max_new_tokens=2)
    lp.score(lm, ["The tower is in", "x"], ["Rome", "Paris"])


def _names(name: str) -> tuple[str, str]:
    """What a weight may be called in a file: with or without the name of the model around the blocks."""
    return name, name.partition(".")[2]


# Facts and documents


def texts_of(value: Any) -> list[str]:
    """Every text inside."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in texts_of(item)]


def documents(room: Path) -> list[Subject]:
    """Files of facts, questions with contexts, documents and texts, in every shape that is read."""
    facts = [
        {"prompt": f"The tower number {i} is in", "subject": f"tower number {i}", "target": "Rome", "old": "Paris",
         "rephrases": [f"You find tower number {i} in"], "id": f"f{i}", "aliases": ["Roma"],
         "locality": {"same_relation": [{"prompt": "The Louvre is in", "answers": ["Paris"]}]},
         "portability": {"reasoning": [{"prompt": f"Near tower {i} they speak", "answers": "Italian"}]}}
        for i in range(5)
    ]  # fmt: skip
    counterfact = [
        {"prompt": f"The tower number {i} is in", "subject": f"tower number {i}", "target_new": "Rome",
         "ground_truth": "Paris", "rephrase_prompt": f"You find tower {i} in",
         "locality_prompt": f"The Louvre {i} is in", "locality_ground_truth": "Paris"}
        for i in range(5)
    ]  # fmt: skip
    asks = [{"question": f"What is {i}?", "answers": ["x", "y"]} for i in range(5)]
    own = [plain(record) for record in records(5)]
    traps = [
        {"prompt": f'Write a quote that ends in the word "early{i}": Better late than', "answer_index": 0,
         "classes": "[' early.', ' never.']"}
        for i in range(5)
    ]  # fmt: skip
    squad = {"data": [
        {"title": f"Town {i}", "paragraphs": [
            {"context": f"Town {i} was founded in {1800 + j} by settlers.", "qas": [
                {"id": f"{i}-{j}", "question": f"When was town {i} part {j} founded?", "is_impossible": False,
                 "answers": [{"text": str(1800 + j), "answer_start": 0}]}]}
            for j in range(4)]}
        for i in range(8)]}  # fmt: skip

    def jsonl(made: list[Any]) -> bytes:
        return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in made)

    prose = ("The tower is in Rome.\n\n" * 5).encode()
    table = b"prompt,subject,target\n" + b"".join(f"Tower {i} is in,Tower {i},Rome\n".encode() for i in range(5))
    shapes: list[tuple[str, bytes, Callable[[Path], Any]]] = [
        ("facts.jsonl", jsonl(facts), read_edits), ("facts.jsonl.gz", gzip.compress(jsonl(facts), mtime=0), read_edits),
        ("facts.json", json.dumps(facts).encode(), read_edits), ("facts.csv", table, read_edits),
        ("counterfact.jsonl", jsonl(counterfact), read_edits), ("asks.jsonl", jsonl(asks), read_asks),
        ("contexts.jsonl", jsonl(own), read_context), ("traps.jsonl", jsonl(traps), read_context),
        ("squad.json", json.dumps(squad).encode(), lambda path: read_rag(path, part="held_out")),
        ("text.txt", prose, read_text), ("text.jsonl", jsonl([{"text": f"Text {i}."} for i in range(5)]), read_text),
    ]  # fmt: skip
    return [_document(name, data, reader) for name, data, reader in shapes]


def _document(name: str, data: bytes, reader: Callable[[Path], Any]) -> Subject:
    """A file without a hash: a line that is as it was gives the row it gave, and every text can be written again."""
    by_line = ".jsonl" in name and reader is not read_text  # which leaves empty texts out

    def lines(raw: bytes) -> list[bytes]:
        return [line for line in (gzip.decompress(raw) if name.endswith(".gz") else raw).split(b"\n") if line.strip()]

    def check(folder: Path) -> None:
        found = [plain(row) for row in reader(folder / name)]
        for text in texts_of(found):
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise Wrong(f"half a character is accepted: {text!r}")
        if not by_line:
            return
        now = lines((folder / name).read_bytes())
        if len(found) != len(now):
            raise Wrong(f"{len(now)} lines gave {len(found)} records")
        wrong = [
            i for i, (line, row) in enumerate(zip(now, found, strict=True)) if line in rows and _bare(row) != rows[line]
        ]
        if wrong:
            raise Wrong(f"line {wrong[0] + 1} is as it was and gives another record")

    rows: dict[bytes, Any] = {}
    if by_line:
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / name).write_bytes(data)
            made = [plain(row) for row in reader(Path(place) / name)]
        rows = {line: _bare(row) for line, row in zip(lines(data), made, strict=True)}
    return Subject(name, {name: data}, check)


def _bare(row: Any) -> Any:
    """A record without the place it takes its name from."""
    return {key: value for key, value in row.items() if key != "id"} if isinstance(row, dict) else row
