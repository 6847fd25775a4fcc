"""Ways to word a question with a context, and which other context stands in for it when it should not matter.

Of the wordings, ``base``, ``attr``, ``instr``, ``opin`` and ``instr+opin`` are those of context-faithful prompting for
questions with options. The rest are this project's own: the three after IRCAN's, whose wording is not published, and
every wording of a completion. Source: Zhou et al. 2023 (arXiv:2303.11315); Shi et al. 2024 (arXiv:2406.18406).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from ...data.context import LETTERS, ContextRecord
from ...data.matching import first, normalise
from ...provenance import hash_json

Wording = Literal[
    "plain", "base", "attr", "instr", "opin", "instr+opin", "based_on", "based_on_formatted", "utilizing_formatted"
]  # fmt: skip
OWN: tuple[Wording, ...] = ("based_on", "based_on_formatted", "utilizing_formatted")
READ = "Instruction: read the given information and answer the corresponding question.\n\n"
GO_ON = "Instruction: read the given instruction and continue the text accordingly.\n\n"
ENDING = "Answer:"
CHOOSE = "choose the correct option to answer the following question: \n"


def worded(record: ContextRecord, wording: Wording, *, suffix: str = ENDING, official: bool = False) -> ContextRecord:
    """The record with its prompts in other words; its context and answers stay.

    Args:
        suffix: what stands in place of ``Answer:`` at the end of a question with options, plainly worded. Blanks at its
            end belong to the answer and are dropped.
        official: the released typo of ``attr``, and the suffix as it is.
    """
    if not record.options:
        return record if wording == "plain" else replace(record, prompt=_completion(record, wording))
    end = suffix if official else suffix.rstrip(" ")
    plain = replace(record, prompt=_ending(record.prompt, end), without_context=_ending(record.without_context, end))
    if wording == "plain":
        return plain
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, record.options, strict=False))
    prompt = _question(record.context.strip(), record.question.strip(), listed, wording, official)
    if wording in OWN:  # their template is the plain one's
        return replace(plain, prompt=prompt)
    return replace(record, prompt=prompt, without_context=f"Q:{record.question.strip()}\nChoices: {listed}\nA:")


def _ending(prompt: str, suffix: str) -> str:
    return f"{prompt.removesuffix(ENDING)}{suffix}" if prompt.endswith(ENDING) else prompt


def _question(context: str, question: str, listed: str, wording: Wording, official: bool) -> str:
    plain, end = question.removesuffix("?").rstrip(), f"Choices: {listed}\nA:"
    instr = READ if wording.startswith("instr") else ""
    match wording:
        case "attr":
            return f"{context}\nQ:{plain} based on the given {'tex' if official else 'text'}?\n{end}"
        case "opin" | "instr+opin":
            quoted = context.replace('"', "")
            return f'{instr}Bob said "{quoted}"\nQ: {plain} in Bob\'s opinion?\n{end}'
        case "based_on":
            return f"Based on the context, {CHOOSE}{context}\n{question}\n{listed}\nAnswer:"
        case "based_on_formatted" | "utilizing_formatted":
            how = "Based on" if wording.startswith("based") else "Utilizing"
            return f"{how} the context, {CHOOSE}Context: {context}\nQuestion: {question}\n{listed}\nAnswer:"
    return f"{instr}{context}\nQ:{question}\n{end}"


def _completion(record: ContextRecord, wording: Wording) -> str:
    """The context is an instruction, the question a text to continue, which stands last."""
    order, text = record.context.strip(), record.question.strip()
    instr = GO_ON if wording.startswith("instr") else ""
    match wording:
        case "attr":
            return f"{order}\nBased on the given instruction: {text}"
        case "opin" | "instr+opin":
            quoted = order.replace('"', "").removesuffix(":")
            return f'{instr}Bob said "{quoted}"\nIn Bob\'s opinion: {text}'
        case "based_on":
            return f"Based on the instruction, continue the text.\n{order} {text}"
        case "based_on_formatted" | "utilizing_formatted":
            how = "Based on" if wording.startswith("based") else "Utilizing"
            return f"{how} the instruction, continue the text.\nInstruction: {order}\nText: {text}"
    return f"{instr}{order} {text}"


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
