"""What RECIPE learns from: a fact in two wordings, and a question that it must leave alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.edit import Ask, Edit, prompt_key
from ..errors import BadInput


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
    found = [e for e in edits if unrelated or any(ask.answers for _, asks in e.locality for ask in asks)]
    if len(found) < 2:
        raise BadInput(
            f"{len(found)} of {len(edits)} facts can be trained on. Each needs a locality prompt with an answer, "
            "or give unrelated questions (unrelated=)."
        )
    return found


def without(edits: Sequence[Edit], held_out: Sequence[Edit]) -> list[Edit]:
    """The edits whose prompt is not asked anywhere in ``held_out``."""
    asked = {prompt_key(p) for e in held_out for p in (e.prompt, *e.rephrases)}
    return [e for e in edits if prompt_key(e.prompt) not in asked]


def sample(edit: Edit, unrelated: Sequence[Ask], draw: random.Random) -> Sample:
    """One wording and one question of each kind, drawn anew."""
    wordings = [(text, edit.target) for text in edit.rephrases]
    wordings += [(ask.prompt, ask.answers[0]) for _, asks in edit.portability for ask in asks if ask.answers]
    again, answer = draw.choice(wordings) if wordings else (edit.prompt, edit.target)
    near = [ask for _, asks in edit.locality for ask in asks if ask.answers]
    pool = unrelated if unrelated and (not near or draw.random() < 0.5) else near
    other = draw.choice(pool)
    return Sample(edit.prompt, edit.target, again, answer, other.prompt, other.answers[0])


def drawable(edits: Sequence[Edit], unrelated: Sequence[Ask]) -> list[tuple[str, str]]:
    """Every fact and every question ("" as target) that ``sample`` may give, each once, in a fixed order."""
    asks = [ask for e in edits for kind in (e.portability, e.locality) for _, group in kind for ask in group]
    found = {(e.prompt, e.target): None for e in edits}
    found |= {(text, ""): None for e in edits for text in (e.prompt, *e.rephrases)}
    found |= {(ask.prompt, ""): None for ask in (*asks, *unrelated)}
    return list(found)


def words(tokenizer: Any) -> list[str]:
    """Tokens of the model that are whole words in Latin script, a blank before them: stand-ins for targets."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [t.strip() for t in texts if t[:1] == " " and len(t) > 3 and t.strip().isalpha() and t.isascii()]


def batches(edits: Sequence[Edit], size: int, seed: int, start: int = 0) -> Iterator[tuple[int, list[int]]]:
    """(step, places of the batch) without end, from ``start`` on; the order depends on the seed alone."""
    per_epoch = max(1, len(edits) // size)
    step = start
    while True:
        epoch, within = divmod(step, per_epoch)
        order = list(range(len(edits)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for k in range(within, per_epoch):
            yield step, order[k * size : (k + 1) * size]
            step += 1
