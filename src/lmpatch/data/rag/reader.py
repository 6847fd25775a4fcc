"""Reading and writing built files, and sets built from raw ones."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from ...errors import BadInput, BadRecord
from ..lines import Line, only, read_records, text_of
from .build import Build, Sets, build
from .record import Part, RagRecord, render
from .source import Question, read_questions
from .types import f1, holds, known, normalise, whole

__all__ = [
    "Build", "Question", "RagRecord", "Sets", "build", "closed_book", "counts", "f1", "holds", "is_built", "known",
    "normalise", "read_built", "read_questions", "read_rag", "refused", "render", "whole", "write",
]  # fmt: skip

STORED = [f.name for f in fields(RagRecord) if f.name not in ("prompt", "without_context")]
REFUSAL = re.compile(
    r"((i ?a?m )?sorry |but |unfortunately )*"
    r"(i (do not|dont|did not|didnt) know|(i ?a?m )?not sure|(i have )?no (idea|answer)"
    r"|i (can ?not|cant) (answer|say|tell)"
    r"|not (mentioned|given|stated|known)|it is (unknown|not (mentioned|known))|(answer is )?(unknown|none|na)$)\b"
)
"""An answer that begins so, normalised, says nothing."""
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
    records = read_built(path) if is_built(path) else build(read_questions(path)).records
    seen: Counter[str] = Counter()
    kept = []
    for record in records:
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
    found: list[bool] = []

    class Enough(Exception):
        pass

    def look(record: Line, _: int) -> None:
        found.append("kind" in record)
        raise Enough

    with suppress(Enough):
        read_records(Path(path), look)
    return found[0]


def read_built(path: str | Path) -> list[RagRecord]:
    """Read a file that ``write`` made, or one by hand.

    Raises:
        BadInput, BadRecord: as ``read_rag``.
    """

    def make(record: Line, place: int) -> RagRecord:
        only(record, [field.name for field in fields(RagRecord)])
        for name in ("documents", "gold"):
            value = record.get(name, [])
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                raise BadRecord(f"{name} must be a list of texts, found {value!r}")
        texts = {name: text_of(record, name, "") for name in record if name not in ("documents", "gold", "id")}
        lists: dict[str, Any] = {name: tuple(record.get(name, ())) for name in ("documents", "gold")}
        return RagRecord(**{"question": "", **texts}, **lists, id=str(record.get("id", place)))  # type: ignore[arg-type]

    return [record for _, record in read_records(Path(path), make)]


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
    work = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    work.mkdir(parents=True)
    files = {}
    for part in get_args(Part):
        lines = [
            json.dumps({n: getattr(r, n) for n in STORED}, ensure_ascii=False) for r in sets.records if r.part == part
        ]
        path = work / f"{part}.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
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
    work.rename(folder)
    return manifest


def counts(records: Sequence[RagRecord]) -> dict[str, int]:
    """``part/kind/variant`` → how many."""
    found = Counter(f"{r.part}/{r.kind}/{r.variant}" for r in records)
    return dict(sorted(found.items()))


def closed_book(question: str) -> str:
    """The prompt without documents that asks for the model's own answer.

    Differs: three examples follow the instruction of COIECD's prompt (arXiv:2402.11893); without them a small base
    model often answers nothing at all.
    """
    asked = [*SHOWN, (question.strip(), "")]
    return "\n\n".join([INSTRUCTION, *(f"Question: {q}\nAnswer: {a}".rstrip() for q, a in asked)])


def refused(answer: str) -> bool:
    """The answer is empty or says that there is none."""
    said = normalise(answer)
    return not said or REFUSAL.match(said) is not None
