"""Facts that an editor learns editing from: a fact in two wordings, and a question that it must leave alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ..data.edits import Ask, Edit, prompt_key
from ..errors import BadInput

Groups = tuple[tuple[str, tuple[Ask, ...]], ...]


@dataclass(frozen=True)
class TrainingData:
    """What an editor is trained on."""

    edits: Sequence[Edit]
    """Facts to learn editing from, with rephrases and locality prompts. None of them is remembered."""
    unrelated: Sequence[Ask] = ()
    """Questions with answers that no fact touches."""


@dataclass(frozen=True)
class Sample:
    """One fact of a training batch."""

    prompt: str
    target: str
    again: str
    """The question in other words, or one that the fact answers in another way."""
    answer: str
    """What ``again`` is answered by."""
    other: str
    """A question the fact does not touch."""
    other_answer: str


def usable(edits: Sequence[Edit], unrelated: Sequence[Ask]) -> list[Edit]:
    """Edits that can be samples.

    Raises:
        BadInput: no question that must be left alone can be found for some of them, or there are too few.
    """
    whole = [e for e in edits if unrelated or any(ask.answers for ask in asks_of(e.locality))]
    if len(whole) < 2:
        raise BadInput(
            f"{len(whole)} of {len(edits)} facts can be trained on. Each needs a locality prompt with an answer, "
            "or give unrelated questions (unrelated=)."
        )
    return whole


def asks_of(groups: Groups) -> list[Ask]:
    """The questions of all kinds."""
    return [ask for _, asks in groups for ask in asks]


def without(edits: Sequence[Edit], held_out: Sequence[Edit]) -> list[Edit]:
    """The edits, each prompt once, as far as ``held_out`` asks nothing of them in any place.

    Edits whose prompt is asked there are left out; of the others, every question that is. So are questions that a fact
    of the edits answers: they would be taught both to find it and to find nothing.
    """
    asked = [[e.prompt, *e.rephrases, *(ask.prompt for ask in asks_of(e.portability + e.locality))] for e in held_out]
    evaluation = {prompt_key(text) for texts in asked for text in texts}
    by_prompt = {prompt_key(e.prompt): e for e in edits if prompt_key(e.prompt) not in evaluation}
    taken = evaluation | set(by_prompt)

    def free(groups: Groups) -> Groups:
        return tuple((kind, tuple(ask for ask in asks if prompt_key(ask.prompt) not in taken)) for kind, asks in groups)

    return [
        replace(
            e,
            rephrases=tuple(text for text in e.rephrases if prompt_key(text) not in evaluation),
            portability=free(e.portability),
            locality=free(e.locality),
        )
        for e in by_prompt.values()
    ]


def sample(edit: Edit, unrelated: Sequence[Ask], draw: random.Random) -> Sample:
    """One wording and one question of each kind, drawn anew."""
    wordings = [(text, edit.target) for text in edit.rephrases]
    wordings += [(ask.prompt, ask.answers[0]) for ask in asks_of(edit.portability) if ask.answers]
    again, answer = draw.choice(wordings) if wordings else (edit.prompt, edit.target)
    near = [ask for ask in asks_of(edit.locality) if ask.answers]
    other = draw.choice(unrelated if unrelated and (not near or draw.random() < 0.5) else near)
    return Sample(edit.prompt, edit.target, again, answer, other.prompt, other.answers[0])


def batch(facts: int, size: int, seed: int, step: int) -> list[int]:
    """Places of the facts of one step; the order depends on the seed alone."""
    epoch, within = divmod(step, max(1, facts // size))
    return _order(facts, seed, epoch)[within * size : (within + 1) * size]


@lru_cache(maxsize=1)
def _order(facts: int, seed: int, epoch: int) -> list[int]:
    order = list(range(facts))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


@dataclass(frozen=True)
class Split:
    """Facts to train on and facts held out."""

    edits: Sequence[Edit]
    held: Sequence[Edit]
    unrelated: Sequence[Ask]

    @classmethod
    def of(cls, edits: Sequence[Edit], unrelated: Sequence[Ask], held_out: int, seed: int, least: int) -> Split:
        """A quarter held out at most; ``BadInput``: fewer than ``least`` facts are left, which a batch needs."""
        order = list(range(len(edits)))
        random.Random(f"{seed}/held out").shuffle(order)
        held = min(held_out, len(edits) // 4)
        rest = [edits[i] for i in order[held:]]
        if len(rest) < least:
            raise BadInput(
                f"a batch has {least} facts, {len(rest)} are left to train on. Lower key_batch and prompt_batch."
            )
        return cls(rest, [edits[i] for i in order[:held]], unrelated)

    def sample(self, edit: Edit, draw: random.Random) -> Sample:
        """``sample`` with these unrelated questions."""
        return sample(edit, self.unrelated, draw)

    def batch(self, step: int, size: int, seed: int) -> tuple[list[int], list[Sample], random.Random]:
        """Places and samples of the facts of one step, and where its other draws come from."""
        draw, places = random.Random(f"{seed}/{step}"), batch(len(self.edits), size, seed, step)
        return places, [self.sample(self.edits[i], draw) for i in places], draw
