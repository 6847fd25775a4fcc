"""What a model answers without documents, asked once in batches and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..data.rag.reader import closed_book
from ..files import cache_dir
from ..models.lm import LM
from ..progress import Progress
from ..provenance import hash_json
from .generate import generate

TOKENS = 16  # of an answer at most; a new line ends it
KEPT = 256  # questions whose answers are written together


@dataclass(frozen=True)
class ClosedBookAnswer:
    """What a model answered on its own."""

    text: str
    """Stripped, perhaps empty."""
    ended: bool
    """The model ended it. Otherwise it was cut off."""


def closed_book_answers(
    lm: LM, questions: Sequence[str], *, batch_size: int = 64, progress: Progress | None = None
) -> list[ClosedBookAnswer]:
    """Greedy answers to the questions alone, as the model is now.

    Answers of a model without patches are kept in the user's cache by weights, dtype, chat template or none, and
    prompt; an interrupted run loses 256 of them at most.
    """
    prompts = [closed_book(question) for question in questions]
    path = _path(lm)
    found = _read(path)
    missing = [prompt for prompt in dict.fromkeys(prompts) if hash_json(prompt) not in found]
    for start in range(0, len(missing), KEPT):
        group = missing[start : start + KEPT]
        tokens = [0] * len(group)

        def count(place: int, _: str, tokens: list[int] = tokens) -> bool:
            tokens[place] += 1
            return False

        texts = generate(lm, group, max_new_tokens=TOKENS, batch_size=batch_size, enough=count)
        lines = []
        for prompt, text, n in zip(group, texts, tokens, strict=True):
            own = found[hash_json(prompt)] = ClosedBookAnswer(text.strip(), n < TOKENS)
            lines.append(b"\n" + json.dumps([hash_json(prompt), own.text, own.ended]).encode())
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:  # one write: lines of two processes do not mix
                file.write(b"".join(lines))
        if progress:
            progress(start + len(group), len(missing), "asking without documents")
    return [found[hash_json(prompt)] for prompt in prompts]


def _path(lm: LM) -> Path | None:
    ledger = getattr(lm.model, "_lmpatch_ledger", None)  # see patches.ledger
    if ledger and ledger.applied:  # answers are those of no known model
        return None
    try:
        form = "-chat" if lm.chat else "-raw" if lm.raw else ""  # one model answers otherwise through its template
        name = f"{lm.fingerprint()[:24]}-{str(lm.dtype).removeprefix('torch.')}-{TOKENS}{form}"
    except (RuntimeError, NotImplementedError):  # offloaded or quantised weights cannot be hashed
        return None
    return cache_dir() / "closed_book" / f"{name}.jsonl"


def _read(path: Path | None) -> dict[str, ClosedBookAnswer]:
    found = {}
    for line in path.read_bytes().splitlines() if path is not None and path.is_file() else ():
        with suppress(ValueError):  # a kill may leave half a line; the next one begins anew
            key, text, ended = json.loads(line)
            found[key] = ClosedBookAnswer(text, ended)
    return found
