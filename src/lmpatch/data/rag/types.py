"""Answers: when two agree, when one says nothing, of what sort one is, and its replacement by another of that sort."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from ..matching import whole

MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"
WORDS = ("who", "where", "when", "how many", "how much", "which", "what")
SPAN = 1  # a substitute has this many words more or less at most
OCCURRENCES = 6  # an answer that stands in its document more often is not replaced

REFUSAL = re.compile(
    r"((i ?a?m )?sorry |but |unfortunately )*"
    r"(i (do not|dont|did not|didnt) know|(i ?a?m )?not sure|(i have )?no (idea|answer)"
    r"|i (can ?not|cant) (answer|say|tell)"
    r"|not (mentioned|given|stated|known)|it is (unknown|not (mentioned|known))|(answer is )?(unknown|none|na)$)\b"
)
"""An answer that begins so, normalised, says nothing."""

Type = tuple[str, str]
"""(shape of the answer, question word)."""


def normalise(text: str) -> str:
    """Lower case, without articles and punctuation, single blanks: SQuAD's comparison of answers.

    Where SQuAD joins, a number keeps its point, and words stay apart that a hyphen or an 's joined: 2.5 is not 25, and
    "Rome" is in "Rome's".
    """
    apart = re.sub(r"['\u2019]s\b|(?<=\w)[-\u2013\u2014](?=\w)", " ", text.casefold())
    bare = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]", "", apart)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def has_words(text: str, words: str) -> bool:
    """The words occur in the text as whole words, whatever their case."""
    if not words or words.casefold() not in text.casefold():  # most are ruled out here, at a tenth of the time
        return False
    return re.search(whole(words), text, re.IGNORECASE) is not None


def holds(text: str, answers: Iterable[str]) -> bool:
    """One of the answers occurs in the text as whole words, both normalised."""
    said = normalise(text)
    return any(has_words(said, normalise(answer)) for answer in answers)


def known(text: str, gold: Iterable[str]) -> bool:
    """A true answer occurs in the text, and no number beside it that is not its own."""
    return any(holds(text, [answer]) and _numbers(text) == _numbers(answer) for answer in gold)


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", normalise(text)))


def f1(a: str, b: str) -> float:
    """Token F1 of two answers, normalised."""
    x, y = normalise(a).split(), normalise(b).split()
    common = (Counter(x) & Counter(y)).total()
    return 2 * common / (len(x) + len(y)) if common else 0.0


def refused(answer: str) -> bool:
    """The answer is empty or says that there is none."""
    said = normalise(answer)
    return not said or REFUSAL.match(said) is not None


def answer_type(answer: str, question: str) -> Type:
    """Shape × question word."""
    asked = question.casefold()
    found = [(match.start(), word) for word in WORDS if (match := re.search(rf"\b{word}\b", asked))]
    return shape(answer), min(found)[1] if found else "other"


def shape(answer: str) -> str:
    """One of: year, date, percent, money, unit, number, name, word, phrase1, phrase2, phrase3."""
    text = answer.strip().strip(".,;:\"'")
    words = text.split()
    if re.fullmatch(r"(1\d|20)\d\d", text):
        return "year"
    if re.search(rf"\b({MONTHS})\b", text.casefold()) and re.search(r"\d", text):
        return "date"
    if re.search(r"\d\s*(%|percent)", text):
        return "percent"
    if re.search(r"[$€£¥]\s*\d|\d\s+(dollars|euros|pounds)", text):
        return "money"
    if re.match(r"\d", text):
        return "number" if len(words) == 1 else "unit"
    capitals = sum(word[0].isupper() for word in words)
    if capitals and len(words) == 1:
        return "word"
    if words and capitals >= len(words) / 2:
        return "name"
    return f"phrase{min(3, max(1, len(words)))}"


def replaced(text: str, old: str, new: str) -> str | None:
    """The text with every whole-word ``old`` turned into ``new``; where only the text has a capital, ``new`` gets one.

    Returns:
        None where ``old`` is shorter than two characters, does not occur, or occurs more than six times.
    """
    if len(old) < 2:
        return None
    spellings = {old[0].upper() + old[1:]: new[0].upper() + new[1:], old: new}  # the latter stands if both are one
    pattern = re.compile("|".join(map(whole, spellings)))
    made, count = pattern.subn(lambda match: spellings[match.group()], text)
    return made if 0 < count <= OCCURRENCES else None
