"""What RECIPE learns from: a fact in two wordings, and a question that it must leave alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...data.edits import Ask, Edit, prompt_key
from ...errors import BadInput
from ...inference.tokens import join

Groups = tuple[tuple[str, tuple[Ask, ...]], ...]


@dataclass(frozen=True)
class TrainingData:
    """What an editor is trained on."""

    edits: Sequence[Edit]
    """Facts to learn editing from, with rephrases and locality prompts."""
    unrelated: Sequence[Ask] = ()
    """Questions with answers that no fact touches."""
    encoder: str = "all-MiniLM-L6-v2"
    """A sentence encoder: the packaged one, a folder or a hub id."""
    download: bool = False
    """An encoder named by a hub id may be fetched."""


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
    whole = [e for e in edits if unrelated or any(ask.answers for _, asks in e.locality for ask in asks)]
    if len(whole) < 2:
        raise BadInput(
            f"{len(whole)} of {len(edits)} facts can be trained on. Each needs a locality prompt with an answer, "
            "or give unrelated questions (unrelated=)."
        )
    return whole


def without(edits: Sequence[Edit], held_out: Sequence[Edit]) -> list[Edit]:
    """The edits, each prompt once, as far as ``held_out`` asks nothing of them in any place.

    Edits whose prompt is asked there are left out; of the others, every question that is. So are questions that a fact
    of the edits answers: they would be taught both to find it and to find nothing.
    """
    evaluation = {prompt_key(text) for e in held_out for text in _questions(e)}
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


def _questions(edit: Edit) -> list[str]:
    """Every prompt of an edit."""
    asks = [ask.prompt for groups in (edit.portability, edit.locality) for _, group in groups for ask in group]
    return [edit.prompt, *edit.rephrases, *asks]


def exchanged(
    samples: Sequence[Sample], pools: Sequence[Sequence[str]], share: float, draw: random.Random
) -> list[Sample]:
    """The samples, a share of them with another target from one of the pools: the answer must be read from
    the target.

    A sample whose two wordings have different answers stays as it is.
    """
    result = []
    for s in samples:
        new = draw.choice(draw.choice(pools)) if draw.random() < share else s.target
        result.append(replace(s, target=new, answer=new) if s.answer == s.target else s)
    return result


def sample(edit: Edit, unrelated: Sequence[Ask], draw: random.Random) -> Sample:
    """One wording and one question of each kind, drawn anew."""
    wordings = [(text, edit.target) for text in edit.rephrases]
    wordings += [(ask.prompt, ask.answers[0]) for _, asks in edit.portability for ask in asks if ask.answers]
    again, answer = draw.choice(wordings) if wordings else (edit.prompt, edit.target)
    near = [ask for _, asks in edit.locality for ask in asks if ask.answers]
    pool = unrelated if unrelated and (not near or draw.random() < 0.5) else near
    other = draw.choice(pool)
    return Sample(edit.prompt, edit.target, again, answer, other.prompt, other.answers[0])


def drawable(edits: Sequence[Edit], unrelated: Sequence[Ask]) -> list[str]:
    """Every statement of a fact and every question that ``sample`` may give, each once, in a fixed order."""
    asks = [ask for e in edits for kind in (e.portability, e.locality) for _, group in kind for ask in group]
    texts = [join(e.prompt, e.target) for e in edits]
    texts += [text for e in edits for text in (e.prompt, *e.rephrases)]
    return list(dict.fromkeys([*texts, *(ask.prompt for ask in (*asks, *unrelated))]))


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
