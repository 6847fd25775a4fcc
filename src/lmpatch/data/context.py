"""Records for context tasks: a question, a text that answers it, and what the model may remember instead.

``read_context`` tells three shapes from the keys of the first record:

``lmpatch``    the keys of ``ContextRecord``; ``context``, ``question`` and ``answer`` are required::

    {"context": "Since 2024 the Eiffel Tower stands in Rome.", "question": "Where is the Eiffel Tower?",
     "answer": "Rome", "memory": "Paris"}

``memotrap``   MemoTrap's completions: ``prompt``, ``classes``, ``answer_index``
``kre``        COSE_KRE and ECARE_KRE: ``question``, ``choices``, ``answer``, ``candidate``, ``negative_context``
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from ..errors import BadInput, BadRecord
from ..provenance import hash_json
from .lines import Line, Shapes, Source, check_text, cut, only, read_shapes, text_of, texts_of
from .matching import first, normalise
from .record import Record

T = TypeVar("T")

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class InContext:
    """What a model reads with a context, and what it reads without."""

    prompt: str
    without_context: str


class Prompted(Record):
    """A record that is asked with a context and without."""

    prompt: str
    without_context: str

    @property
    def asked(self) -> InContext:
        """The two prompts as ``generate`` and ``score`` take them."""
        return InContext(self.prompt, self.without_context)


@dataclass(frozen=True)
class ContextRecord(Prompted):
    """A question with a context, as a model reads it with and without that context.

    Args:
        context: the text that answers the question.
        question: what is asked.
        answer: what the context says; a letter where there are ``options``.
        memory: what the model answers from memory, if that is known; a letter where there are ``options``.
        options: choices, lettered A, B, ... in the prompt.
        prompt: everything the model reads before the answer. Left out, it is made of the parts above.
        without_context: the same without the context.
        id: how reports name the case.
    Raises:
        BadInput: no context, question or answer, or an answer that is none of the options.
    """

    context: str
    question: str
    answer: str
    memory: str = ""
    options: tuple[str, ...] = ()
    prompt: str = ""
    without_context: str = ""
    id: str = ""

    @classmethod
    def read(cls, path: str | Path, *, limit: int | None = None, check: bool = False) -> list[ContextRecord]:
        """``read_context``."""
        return read_context(path, limit=limit)

    def __post_init__(self) -> None:
        check_text(vars(self))
        for name in ("context", "question", "answer"):
            if not getattr(self, name).strip():
                raise BadInput(f"a record has no {name}. Give context, question and answer; all three are texts.")
        options = tuple(option.strip() for option in self.options)
        if len(options) > len(LETTERS):
            raise BadInput(f"{len(options)} options; the letters end at {len(LETTERS)}.")
        put = object.__setattr__
        put(self, "options", options)
        put(self, "answer", _letter(self.answer.strip(), options))
        put(self, "memory", _letter(self.memory.strip(), options) if self.memory.strip() else "")
        put(self, "prompt", self.prompt or render(self.context, self.question, options))
        put(self, "without_context", self.without_context or render("", self.question, options))

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters of the options."""
        return tuple(LETTERS[: len(self.options)])


def render(context: str, question: str, options: Sequence[str] = ()) -> str:
    """The prompt, without a trailing blank; an empty context leaves its line out.

    Questions with options read as in IRCAN, others as the base prompt of Zhou et al.

    Source: Shi et al. 2024 (arXiv:2406.18406), app.; Zhou et al. 2023 (arXiv:2303.11315).
    """
    before = f"{context.strip()}\n" if context.strip() else ""
    if not options:
        return f"{before}Q:{question.strip()}\nA:"
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    head = "Choose the correct option to answer the following question: \n"
    return f"{head}{before}{question.strip()}\n{listed}\nAnswer:"


def one_line(prompt: str) -> bool:
    """Whether the answer to it is one line: it ends in a colon, as in ``A:``. Other prompts are texts to go on with."""
    return prompt.rstrip().endswith(":")


def completion(text: str, line: bool = False) -> str:
    """The text up to its first period, without blanks before it.

    Args:
        line: it ends at a new line, too.
    """
    return (text.partition("\n")[0] if line else text).strip().partition(".")[0]


def brief(records: Sequence[ContextRecord]) -> list[dict[str, str]]:
    """What a patch keeps of the records it was made from: no contexts, which may be long or private."""
    return [{"prompt": record.question, "target": record.answer, "id": record.id} for record in records]


def halves(records: Sequence[T]) -> tuple[list[T], list[T]]:
    """The first and the second half, 1:1 as in the paper: choose on the one, report on the other."""
    if len(records) < 2:
        raise BadInput(f"{len(records)} record cannot be halved. Give two or more.")
    middle = len(records) // 2
    return list(records[:middle]), list(records[middle:])


def others(records: Sequence[ContextRecord], seed: int) -> list[int | None]:
    """For each record the place of another one whose context is unrelated to it.

    The records stand in a circle in the order of their hashes; each takes the first one behind it whose context is
    another and holds neither of its answers. None: there is no such record.
    """
    ring = sorted(range(len(records)), key=lambda i: hash_json([seed, records[i].prompt, records[i].context, i]))
    partners: list[int | None] = [None] * len(records)
    for at, i in enumerate(ring):
        behind = ring[at + 1 :] + ring[:at]
        partners[i] = next((j for j in behind if _foreign(records[i], records[j].context)), None)
    return partners


def _foreign(record: ContextRecord, context: str) -> bool:
    answers = [a for a in (record.answer, record.memory) if a]
    if record.options:
        answers = [record.options[LETTERS.index(letter)] for letter in answers]
    same = context.strip() == record.context.strip()
    return not same and first(normalise(context), map(normalise, answers)) is None


def swapped(record: ContextRecord, context: str) -> ContextRecord | None:
    """The record with another's context in its prompt; None where its own does not stand in the prompt as it is."""
    own = record.context.strip()
    if own not in record.prompt:
        return None
    return replace(record, context=context, prompt=record.prompt.replace(own, context.strip(), 1))


def read_context(
    source: Source, *, limit: int | None = None, seed: int | None = None, format: str | None = None
) -> list[ContextRecord]:
    """Read a file of questions with contexts, as ``read_edits`` reads facts.

    Args:
        format: ``lmpatch``, ``memotrap`` or ``kre``; None tells it from the first record.
    """
    shapes: Shapes[ContextRecord] = {
        "kre": (("negative_context",), _kre),
        "memotrap": (("classes",), _memotrap),
        "lmpatch": (("question",), _own),
    }
    records = read_shapes(source, shapes, "A record needs context, question and answer.", format)
    return cut([record for _, record in records], limit, seed)


def _own(record: Line, place: str) -> ContextRecord:
    only(record, [*(field.name for field in fields(ContextRecord)), "bare"])
    return ContextRecord(
        text_of(record, "context"),
        text_of(record, "question"),
        text_of(record, "answer", numbers=True),
        text_of(record, "memory", "", numbers=True),
        texts_of(record, "options"),
        text_of(record, "prompt", ""),
        text_of(record, "without_context", text_of(record, "bare", "")),  # its name in files of lmpatch 0.1
        id=text_of(record, "id", place, numbers=True),
    )


def _memotrap(record: Line, place: str) -> ContextRecord:
    """``Write a quote that ends in the word "early": Better late than``: an instruction, and what it is about."""
    prompt = text_of(record, "prompt")
    instruction, colon, rest = prompt.partition(": ")
    if not colon:
        raise BadRecord(f"prompt has no instruction that ends in a colon: {prompt!r}")
    wanted, listed = record.get("answer_index"), text_of(record, "classes")
    classes: list[str] = []
    with suppress(ValueError, SyntaxError, TypeError, MemoryError):
        classes = [str(text).strip().removesuffix(".").strip() for text in ast.literal_eval(listed)]
    if len(classes) != 2 or wanted not in (0, 1) or not isinstance(wanted, int):
        raise BadRecord("classes must be a list of two texts, written as Python does, and answer_index 0 or 1")
    return ContextRecord(
        instruction + colon,
        rest,
        classes[wanted],
        classes[1 - wanted],
        prompt=prompt.rstrip(),
        without_context=rest.rstrip(),
        id=place,
    )


def _kre(record: Line, place: str) -> ContextRecord:
    context, question, answer, memory = (
        text_of(record, key) for key in ("negative_context", "question", "candidate", "answer")
    )
    return ContextRecord(context, question, answer, memory, options=texts_of(record, "choices"), id=place)


def _letter(answer: str, options: Sequence[str]) -> str:
    """The letter of an answer that is given as a letter or as the text of an option."""
    if not options or answer in tuple(LETTERS[: len(options)]):
        return answer
    if answer in options:
        return LETTERS[options.index(answer)]
    raise BadInput(f"the answer {answer!r} is none of the options {', '.join(options)}, nor a letter of one.")
