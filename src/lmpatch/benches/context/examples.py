"""Solved examples that stand before a question with documents: few-shot prompts, in which a model sees how an answer
looks and when a document is to be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...data.context import InContext
from ...data.rag.reader import RagRecord, is_built, read_rag
from ...errors import BadInput
from ...provenance import hash_json

TRAIN = "train.jsonl"
"""Where ``lmpatch data rag`` writes the training articles."""
SHOWN = (("substituted", "adherence"), ("foreign", "robustness"), ("original", "adherence"), ("foreign", "robustness"))
"""Variants and kinds in the order they are shown: a document that answers, one that does not, in turn."""


class Records(list[RagRecord]):
    """Records that are asked, and those that examples may be drawn from."""

    def __init__(self, records: Sequence[RagRecord], pool: Pool) -> None:
        super().__init__(records)
        self.pool = pool


@dataclass(frozen=True)
class Pool:
    """The records of the training articles: of the file beside a built one, or built from a raw one when asked for."""

    path: str | Path

    @cached_property
    def records(self) -> list[RagRecord]:
        """Read, once.

        Raises:
            BadInput: there are none.
        """
        if not is_built(self.path):
            return read_rag(self.path, part="train")
        beside = Path(self.path).with_name(TRAIN)
        if not beside.is_file():
            raise BadInput(f"examples are drawn from {beside}, which is missing. Put it there, or set shots=0.")
        return read_rag(beside, part="train")


def chosen(records: Sequence[RagRecord], count: int, seed: int) -> list[RagRecord]:
    """Examples of both skills in turn, by the hash of their id; no question comes twice.

    Raises:
        BadInput: there are fewer.
    """
    order = sorted(records, key=lambda r: hash_json([seed, r.id]))
    found: list[RagRecord] = []
    for place in range(count):
        variant, kind = SHOWN[place % len(SHOWN)]
        taken = {r.question for r in found}
        fitting = (r for r in order if (r.variant, r.kind) == (variant, kind) and answer(r) and r.question not in taken)
        if (one := next(fitting, None)) is None:
            raise BadInput(f"{len(found)} examples of the training articles for shots={count}. Give fewer shots.")
        found.append(one)
    return found


def answer(record: RagRecord) -> str:
    """What is shown as its answer: the document's, or the true one where that does not answer."""
    return record.answer or next(iter(record.gold), "")


def written(examples: Sequence[RagRecord]) -> str:
    """The examples as they stand before a prompt: prompt and answer of each, and an empty line."""
    return "".join(f"{r.prompt}{answer(r)}\n\n" for r in examples)


def behind(shown: str, asked: InContext) -> InContext:
    """The question behind the examples, which stay where its own documents are left out."""
    return InContext(shown + asked.prompt, shown + asked.without_context)
