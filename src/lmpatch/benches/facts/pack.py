"""The probe pack: questions made of any fact by template, which a fact that is used passes and one that is recited does
not. Each has one answer that a person would call right; where the form of a fact allows no such question, it has none.

Source: negation and reversal after arXiv:2510.00625, long answers after arXiv:2402.09394.
Differs: the templates and the rules of success are this project's own; docs/benches.md defines each.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...data.edits import Edit
from ...data.matching import Match, find, first, match, normalise, whole
from ...inference.tokens import statement
from ..core.contract import Measure
from ..core.stats import PAIRS, distinct
from .questions import PACK, PASSAGE, Question

ASKING = {"who", "whom", "whose", "what", "which", "where", "when", "why", "how"}
SMALL = {"The", "A", "An", "In", "At", "On", "To", "It", "This", "These", "You", "Your", "One", "People", "There"}
"""First words that begin with a capital only because a sentence begins with them."""
BE = {"is", "are", "was", "were"}
VERB = re.compile(r"(?:is|are|was|were|has|had|have|\w+(?:[^\Ws]s|ed))$")
END = re.compile(r"(?<=\w\w\w[.!?;])\s|\n")
"""Behind a sentence; "St. Louis" and "U.S. " go on."""


def drawn(places: Sequence[tuple[int, int]], count: int, seed: int) -> set[tuple[int, int]]:
    """The (chunk, case) that are asked the pack: ``count`` at most of all, chosen by the seed."""
    return set(random.Random(f"{seed} pack").sample(places, min(count, len(places))))


def contrast(edit: Edit, others: Sequence[Edit]) -> str:
    """An object that is not the fact's: the old one, or another fact's, of the same relation first; "" without any."""
    if edit.old:
        return edit.old[0]
    own = {normalise(answer) for answer in edit.answers}
    near = sorted(others, key=lambda other: not edit.relation or other.relation != edit.relation)
    return next((other.target for other in near if normalise(other.target) not in own), "")


def questions(case: int, edit: Edit, other: str) -> Iterator[Question]:
    """What the pack asks about an edit.

    Args:
        other: an object that is not the fact's, for statements that are false; "": there is none.
    """
    new, old, prompt = edit.answers, edit.old, edit.prompt
    yield Question(case, f"{PACK}negation", negated(prompt), new, old)
    if old:
        before = f"In the past people said: {statement(prompt, old[0])} Today they say: {prompt}"
        yield Question(case, f"{PACK}old_mentioned", before, new, old)
    if other:
        for kind, obj, answer, wrong in (("true", new[0], "True", "False"), ("false", other, "False", "True")):
            text = f"True or false: {statement(prompt, obj)} Answer:"
            yield Question(case, f"{PACK}{kind}", text, (answer,), (wrong,), form="scored")
    if other and (turned := reversed_fact(edit)):
        ask, subject = turned
        yield Question(case, f"{PACK}reversal", ask(new[0]), (subject,), form="scored", against=ask(other))
    yield Question(case, f"{PACK}long", prompt, new, old, form="passage")


def negated(prompt: str) -> str:
    """The prompt as one that the fact's object does not complete: ``It is not true that the Eiffel Tower is in``."""
    if is_question(prompt):
        return f"{prompt} A wrong answer is:"
    word, blank, rest = prompt.partition(" ")
    return f"It is not true that {word.lower() if word in SMALL else word}{blank}{rest}"


def is_question(prompt: str) -> bool:
    """It asks, in place of leaving a sentence open."""
    return prompt.endswith("?") or prompt.partition(" ")[0].casefold() in ASKING


def reversed_fact(edit: Edit) -> tuple[Callable[[str], str], str] | None:
    """From an object to a text that the subject answers, and the subject as it is named there.

    ``The Eiffel Tower is in`` becomes ``Who or what is in Rome? Answer:``, ``The capital of Italy is`` becomes ``Rome
    is the capital of``. None where the prompt is of neither form.
    """
    prompt, at = edit.prompt, find(edit.prompt, edit.subject)
    if at < 0 or is_question(prompt):
        return None
    before, after = prompt[:at].strip(), prompt[at + len(edit.subject) :].strip()
    words = after.split() or [""]
    if before.casefold() in ("", "the") and VERB.match(words[0]) and not (BE & {*words[1:2]}):
        return lambda obj: f"Who or what {after} {obj}? Answer:", f"{before} {edit.subject}".strip()
    if after in BE and re.match(r"the .+ of(?: the)?$", before, re.IGNORECASE):
        return lambda obj: f"{obj[:1].upper()}{obj[1:]} {after} t{before[1:]}", edit.subject
    return None


def judged(kind: str, text: str, answers: Sequence[str], old: Sequence[str], rule: str) -> Match:
    """How a generated answer does. Of ``negation`` ``em`` says that the new object is not stated."""
    found = match(text, answers, old, rule)
    return Match(not states(text, answers), found.contains, found.old_first) if kind == f"{PACK}negation" else found


def states(text: str, answers: Sequence[str]) -> bool:
    """The answer begins with one of them, or its first sentence holds one."""
    sentence = END.split(text.strip(), maxsplit=1)[0]
    return match(text, answers).em or first(normalise(sentence), map(normalise, answers)) is not None


def again(text: str, answers: Sequence[str]) -> bool:
    """One of them is said twice or more, as whole words."""
    said = normalise(text)
    return any(len(re.findall(whole(name), said)) > 1 for name in map(normalise, answers) if name)


def _of(kinds: str, only: Callable[[Any], bool] = lambda row: True) -> Callable[[Any], str | None]:
    names = {PACK + kind for kind in kinds.split("|")}
    return lambda row: "" if row.kind in names and row.when == "final" and only(row) else None


def _short(row: Any) -> str | None:
    """Each probe with a short answer is a number of its own."""
    probe = row.kind.removeprefix(PACK)
    return probe if row.when == "final" and probe in ("negation", "old_mentioned") else None


def _follows(row: Any) -> str | None:
    axis = row.kind.removeprefix("port/")
    return "" if row.when == "final" and axis != row.kind and re.search("reason|compos|hop", axis) else None


def _likelier(row: Any) -> bool | None:
    return None if row.tf_new is None or row.tf_old is None else bool(row.tf_new > row.tf_old)


def _said(
    test: Callable[[str, Sequence[str]], float | bool], old: bool = False
) -> Callable[[Any], float | bool | None]:
    return lambda row: None if row.text is None else test(row.text, row.old_aliases if old else row.aliases)


def _right(row: Any) -> bool | None:
    return None if row.em is None else bool(row.em)


GROUP = "Probe pack: is the fact used, or only recited?"
NOT = "where the negated prompt asks what is not so, the new answer is not stated"
OLD = "behind the old fact, named as that of the past, the answer begins with the new one"
TRUE = "the new fact is called true and another object false, by likelihood; always one word scores 50 %"
TURNED = "the subject is likelier behind the new object than behind another one; a coin scores 50 %"
FOLLOWS = "the facts' own questions that take a further step: the answer occurs"
AGAIN = "the new answer is said twice or more, as whole words"
LONG = f"in {PASSAGE} new tokens the new answer occurs, the old one not before it"
METRICS = {
    "negation": Measure(NOT, _right, _of("negation"), GROUP, headline=True),
    "negation_old": Measure(
        "the same prompt: the old answer is stated; of the unpatched model, how often it overlooks the negation",
        _said(states, old=True), _of("negation", lambda row: bool(row.old_aliases)), GROUP, better="",
    ),
    "old_mentioned": Measure(OLD, _right, _of("old_mentioned"), GROUP, headline=True),
    "true_false": Measure(TRUE, _likelier, _of("true|false"), GROUP, headline=True),
    "reversal": Measure(TURNED, _likelier, _of("reversal"), GROUP, headline=True),
    "composition": Measure(FOLLOWS, lambda row: row.contains, _follows, GROUP),
    "long_states": Measure(LONG, lambda row: row.contains, _of("long"), GROUP, headline=True),
    "long_repeats": Measure(AGAIN, _said(again), _of("long"), GROUP, better="less", beside=True),
    "long_repeats_old": Measure(
        "the old answer is; of the unpatched model, what is natural in an answer of that length",
        _said(again, old=True), _of("long", lambda row: bool(row.old_aliases)), GROUP, better="",
    ),
    "long_distinct_2": Measure(PAIRS, _said(distinct), _of("long"), GROUP, beside=True),
    "pack_repeats": Measure(AGAIN, _said(again), _short, GROUP, better="less"),
    "pack_distinct_2": Measure(PAIRS, _said(distinct), _short, GROUP),
}  # fmt: skip
