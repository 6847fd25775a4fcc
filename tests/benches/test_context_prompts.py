"""Wordings word for word, and contexts that stand in for others."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from lmpatch.benches.context.prompts import Wording, worded
from lmpatch.data.context import ContextRecord, others, swapped

ASKED = ContextRecord(
    'They say "food" is kept on a shelf. ', " Where is food kept? ", "A", "B", options=("shelf", "fridge")
)
HEAD, LISTED = "Choose the correct option to answer the following question: \n", "A. shelf B. fridge"
C = 'They say "food" is kept on a shelf.'
READ = "Instruction: read the given information and answer the corresponding question.\n\n"
END = f"Choices: {LISTED}\nA:"
GOLDEN: dict[Wording, str] = {
    "plain": f"{HEAD}{C}\nWhere is food kept?\n{LISTED}\nAnswer:",
    "base": f"{C}\nQ:Where is food kept?\n{END}",
    "attr": f"{C}\nQ:Where is food kept based on the given text?\n{END}",
    "instr": f"{READ}{C}\nQ:Where is food kept?\n{END}",
    "opin": f'Bob said "They say food is kept on a shelf."\nQ: Where is food kept in Bob\'s opinion?\n{END}',
    "instr+opin": READ
    + f'Bob said "They say food is kept on a shelf."\nQ: Where is food kept in Bob\'s opinion?\n{END}',
    "based_on": "Based on the context, choose the correct option to answer the following question: \n"
    f"{C}\nWhere is food kept?\n{LISTED}\nAnswer:",
    "based_on_formatted": "Based on the context, choose the correct option to answer the following question: \n"
    f"Context: {C}\nQuestion: Where is food kept?\n{LISTED}\nAnswer:",
    "utilizing_formatted": "Utilizing the context, choose the correct option to answer the following question: \n"
    f"Context: {C}\nQuestion: Where is food kept?\n{LISTED}\nAnswer:",
}
TRAP = ContextRecord(
    'Write a quote that ends in the word "early": ', "Better late than", "early", "never",
    prompt='Write a quote that ends in the word "early": Better late than', without_context="Better late than",
)  # fmt: skip
GO_ON = "Instruction: read the given instruction and continue the text accordingly.\n\n"
TOLD = 'Write a quote that ends in the word "early":'
COMPLETIONS: dict[Wording, str] = {
    "plain": f"{TOLD} Better late than",
    "base": f"{TOLD} Better late than",
    "attr": f"{TOLD}\nBased on the given instruction: Better late than",
    "instr": f"{GO_ON}{TOLD} Better late than",
    "opin": 'Bob said "Write a quote that ends in the word early"\nIn Bob\'s opinion: Better late than',
    "instr+opin": f'{GO_ON}Bob said "Write a quote that ends in the word early"\nIn Bob\'s opinion: Better late than',
    "based_on": f"Based on the instruction, continue the text.\n{TOLD} Better late than",
    "based_on_formatted": f"Based on the instruction, continue the text.\nInstruction: {TOLD}\nText: Better late than",
    "utilizing_formatted": "Utilizing the instruction, continue the text.\n"
    f"Instruction: {TOLD}\nText: Better late than",
}


@pytest.mark.parametrize("wording", get_args(Wording))
def test_a_question_with_options_reads_word_for_word(wording: Wording) -> None:
    assert worded(ASKED, wording).prompt == GOLDEN[wording]


@pytest.mark.parametrize("wording", get_args(Wording))
def test_a_completion_ends_in_the_phrase_to_go_on_with(wording: Wording) -> None:
    found = worded(TRAP, wording)
    assert (found.prompt, found.without_context) == (COMPLETIONS[wording], "Better late than")


def test_the_released_typo_is_a_switch_and_only_a_question_mark_is_dropped() -> None:
    assert "based on the given tex?" in worded(ASKED, "attr", official=True).prompt
    stated = replace(ASKED, question="Food is kept in")
    assert "Q: Food is kept in in Bob's opinion?" in worded(stated, "opin").prompt


def test_the_ending_of_the_plain_prompt_can_be_chosen() -> None:
    found = worded(ASKED, "plain", suffix="The correct answer is ")
    assert found.prompt == GOLDEN["plain"].removesuffix("Answer:") + "The correct answer is"
    assert found.without_context == f"{HEAD}Where is food kept?\n{LISTED}\nThe correct answer is"
    kept = worded(ASKED, "plain", suffix="Answer: ", official=True)
    assert (kept.prompt, kept.without_context) == (
        f"{GOLDEN['plain']} ",
        f"{HEAD}Where is food kept?\n{LISTED}\nAnswer: ",
    )
    own = replace(ASKED, prompt="Which one?", without_context="Which?")
    assert worded(own, "plain", suffix="The correct answer is") == own


def test_without_its_context_a_question_is_base_without_it() -> None:
    assert worded(ASKED, "opin").without_context == GOLDEN["base"].removeprefix(f"{C}\n")


@pytest.mark.parametrize("wording", ["based_on", "based_on_formatted", "utilizing_formatted"])
def test_both_streams_of_a_wording_after_the_plain_one_have_its_template(wording: Wording) -> None:
    assert worded(ASKED, wording).without_context == f"{HEAD}Where is food kept?\n{LISTED}\nAnswer:"


def asked(context: str, answer: str, memory: str) -> ContextRecord:
    return ContextRecord(context, "Where?", answer, memory)


def test_another_context_is_chosen_alike_each_time_and_says_nothing_about_the_answers() -> None:
    records = [
        asked(f"The {thing} is {place}.", place, "gone") for thing, place in zip("abcdefgh", "stuvwxyz", strict=True)
    ]
    records += [asked("All is gone.", "there", "never")]  # holds the memory of the first eight
    found = others(records, 0)
    assert found == others(records, 0) != others(records, 1)
    assert all(j is not None and j != i and j != 8 for i, j in enumerate(found[:8]))
    assert len(set(found)) > 4


def test_a_record_that_no_other_context_suits_gets_none() -> None:
    pair = [asked("It is in Rome.", "Rome", "Paris"), asked("Some say Paris.", "Paris", "Rome")]
    assert others(pair, 0) == [None, None]
    assert others([pair[0], pair[0]], 0) == [None, None]


def test_options_count_by_their_texts() -> None:
    one, two = ASKED, replace(ASKED, context="It is in the fridge.", prompt="", without_context="")
    assert others([one, two], 0) == [None, None]
    assert others([one, replace(two, context="It rains.")], 0)[0] == 1


def test_a_context_is_swapped_where_it_stands_and_nowhere_else() -> None:
    found = swapped(TRAP, 'Write a quote that ends in the word "king": ')
    assert found and found.prompt == 'Write a quote that ends in the word "king": Better late than'
    assert found.without_context == TRAP.without_context
    assert swapped(replace(TRAP, prompt="Better late than"), "x") is None
