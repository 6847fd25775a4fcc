"""What RECIPE learns from, beside facts in two wordings and questions to leave alone (``training.facts``)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...data.edits import Ask, Edit
from ...inference.tokens import join
from ...training import facts
from ...training.facts import Sample, asks_of

BLANK = "\0"  # where the subject of a question was


@dataclass(frozen=True)
class TrainingData(facts.TrainingData):
    """What an editor is trained on that has a sentence encoder."""

    encoder: str = "all-MiniLM-L6-v2"
    """A sentence encoder: the packaged one, a folder or a hub id."""
    download: bool = False
    """An encoder named by a hub id may be fetched."""


def exchanged(
    samples: Sequence[Sample], pools: Sequence[Sequence[str]], share: float, draw: random.Random
) -> list[Sample]:
    """The samples, a share of them with another target from one of the pools, so the answer must be read from the
    target. A sample whose two wordings have different answers stays as it is."""
    result = []
    for s in samples:
        new = draw.choice(draw.choice(pools)) if draw.random() < share else s.target
        result.append(replace(s, target=new, answer=new) if s.answer == s.target else s)
    return result


def mentions(text: str, edit: Edit) -> bool:
    """The text names the subject of a fact."""
    return bool(edit.subject) and str(edit.subject).casefold() in text.casefold()


@dataclass(frozen=True)
class Beside:
    """A question about the subject of a fact that the fact's target does not answer."""

    prompt: str
    target: str
    question: str
    answer: str
    follows: bool
    """The answer follows from the fact and from what the model knows; else the fact has nothing to do with it."""


class Neighbourhood:
    """Questions beside facts: those that come with the facts, and those of other facts asked about another subject."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self.edits = [edit for edit in edits if edit.subject and edit.subject in edit.prompt]
        self.forms = [edit.prompt.replace(edit.subject or "", BLANK) for edit in self.edits]
        self.range: dict[str, set[str]] = {}  # what questions of a form are answered by
        for form, edit in zip(self.forms, self.edits, strict=True):
            self.range.setdefault(form, set()).add(edit.target)
        pairs = [(edit, ask) for edit in edits for ask in asks_of(edit.portability) if ask.answers]
        self.following = [(edit, ask) for edit, ask in pairs if ask.answers[0] != edit.target]

    def draw(self, count: int, draw: random.Random) -> list[Beside]:
        """``count`` questions, by halves such as follow from a fact and such as ask for another relation of its
        subject; fewer where there are none."""
        found = []
        for i in range(count):
            if i % 2 and self.following:
                edit, ask = draw.choice(self.following)
                found.append(Beside(edit.prompt, edit.target, ask.prompt, ask.answers[0], follows=True))
            elif not i % 2 and self.edits:
                place, other = draw.randrange(len(self.edits)), draw.randrange(len(self.edits))
                edit, form, answer = self.edits[place], self.forms[other], self.edits[other].target
                if edit.target in self.range[form] or answer in self.range[self.forms[place]]:
                    continue  # it may ask for the same relation in other words
                found.append(Beside(edit.prompt, edit.target, form.replace(BLANK, edit.subject or ""), answer, False))
        return found


def drawable(edits: Sequence[Edit], unrelated: Sequence[Ask]) -> list[str]:
    """Every statement of a fact and every question that ``sample`` may give, each once, in a fixed order."""
    texts = [join(e.prompt, e.target) for e in edits] + [text for e in edits for text in (e.prompt, *e.rephrases)]
    asks = [ask for e in edits for ask in asks_of(e.portability + e.locality)]
    return list(dict.fromkeys([*texts, *(ask.prompt for ask in (*asks, *unrelated))]))


def words(tokenizer: Any) -> list[str]:
    """Tokens of the model that are whole words in Latin script, a blank before them: stand-ins for targets."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [t.strip() for t in texts if t[:1] == " " and len(t) > 3 and t.strip().isalpha() and t.isascii()]
