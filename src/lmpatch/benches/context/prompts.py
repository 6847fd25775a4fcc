"""Ways to word a question with a context.

Of the wordings, ``base``, ``attr``, ``instr``, ``opin`` and ``instr+opin`` are those of context-faithful prompting for
questions with options. The rest are this project's own: the three after IRCAN's, whose wording is not published, and
every wording of a completion. Source: Zhou et al. 2023 (arXiv:2303.11315); Shi et al. 2024 (arXiv:2406.18406).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ...data.context import LETTERS, ContextRecord

Wording = Literal[
    "plain", "base", "attr", "instr", "opin", "instr+opin", "based_on", "based_on_formatted", "utilizing_formatted"
]  # fmt: skip
OWN: tuple[Wording, ...] = ("based_on", "based_on_formatted", "utilizing_formatted")
ENDING = "Answer:"
READ = "Instruction: read the given information and answer the corresponding question.\n\n"
BASE = "{context}\nQ:{question}\n{end}"
OPINION = 'Bob said "{quoted}"\nQ: {plain} in Bob\'s opinion?\n{end}'
CHOOSE = "the context, choose the correct option to answer the following question: \n"
FORMATTED = "Context: {context}\nQuestion: {question}\n{options}\nAnswer:"
QUESTIONS: dict[Wording, str] = {
    "base": BASE,
    "attr": "{context}\nQ:{plain} based on the given {text}?\n{end}",
    "instr": READ + BASE,
    "opin": OPINION,
    "instr+opin": READ + OPINION,
    "based_on": f"Based on {CHOOSE}" + "{context}\n{question}\n{options}\nAnswer:",
    "based_on_formatted": f"Based on {CHOOSE}" + FORMATTED,
    "utilizing_formatted": f"Utilizing {CHOOSE}" + FORMATTED,
}
GO_ON = "Instruction: read the given instruction and continue the text accordingly.\n\n"
BOB = 'Bob said "{quoted}"\nIn Bob\'s opinion: {question}'
CONTINUE = "the instruction, continue the text."
COMPLETIONS: dict[Wording, str] = {  # the context is an instruction, the question a text to continue, which stands last
    "base": "{context} {question}",
    "attr": "{context}\nBased on the given instruction: {question}",
    "instr": GO_ON + "{context} {question}",
    "opin": BOB,
    "instr+opin": GO_ON + BOB,
    "based_on": f"Based on {CONTINUE}" + "\n{context} {question}",
    "based_on_formatted": f"Based on {CONTINUE}" + "\nInstruction: {context}\nText: {question}",
    "utilizing_formatted": f"Utilizing {CONTINUE}" + "\nInstruction: {context}\nText: {question}",
}


def worded(record: ContextRecord, wording: Wording, *, suffix: str = ENDING, official: bool = False) -> ContextRecord:
    """The record with its prompts in other words; its context and answers stay.

    Args:
        suffix: what stands in place of ``Answer:`` at the end of a question with options, plainly worded. Blanks at its
            end belong to the answer and are dropped.
        official: the released typo of ``attr``, and the suffix as it is.
    """
    context, question = record.context.strip(), record.question.strip()
    quoted = context.replace('"', "")
    if not record.options:
        if wording == "plain":
            return record
        parts = {"context": context, "question": question, "quoted": quoted.removesuffix(":")}
        return replace(record, prompt=COMPLETIONS[wording].format(**parts))
    end = suffix if official else suffix.rstrip(" ")
    plain = replace(record, prompt=_ending(record.prompt, end), without_context=_ending(record.without_context, end))
    if wording == "plain":
        return plain
    options = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, record.options, strict=False))
    parts = {
        "context": context, "question": question, "plain": question.removesuffix("?").rstrip(), "quoted": quoted,
        "options": options, "end": f"Choices: {options}\nA:", "text": "tex" if official else "text",
    }  # fmt: skip
    prompt = QUESTIONS[wording].format(**parts)
    if wording in OWN:  # their template is the plain one's
        return replace(plain, prompt=prompt)
    return replace(record, prompt=prompt, without_context=f"Q:{question}\n{parts['end']}")


def _ending(prompt: str, suffix: str) -> str:
    return f"{prompt.removesuffix(ENDING)}{suffix}" if prompt.endswith(ENDING) else prompt
