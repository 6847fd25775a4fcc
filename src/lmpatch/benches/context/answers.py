"""Putting questions with contexts to a model: a text to continue, or a letter to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ...data.context import ContextRecord, one_line
from ...inference.generate import generate
from ...inference.multiple_choice import option_tokens
from ...inference.score import score
from ...inference.tokens import encode_all
from ...models.lm import LM
from ..core.asking import mark_logits

Letters = Literal["blank", "bare", "auto"]
"""Which token of a letter counts: the one it gets behind the prompt and a blank, that of the letter alone, or, for each
prompt, those of the two that hold more probability. Where the prompt ends in white space no blank is added."""
Wanted = Sequence[str] | None
"""The answers that are looked for in a text; None: all of it is wanted."""
WORD: Wanted = ()
"""Only its first word is."""
WHOLE = "options share a first token: each letter scored whole"


@dataclass(frozen=True)
class Reply:
    """What a model answered."""

    text: str
    scores: tuple[float, ...] = ()
    flag: str = ""


def complete(
    lm: LM,
    records: Sequence[ContextRecord],
    wanted: Sequence[Wanted],
    *,
    limit: int,
    batch_size: int,
    official: bool = False,
) -> list[Reply]:
    """Continue each prompt greedily, and cut the text at its first period, behind a question also at its first line.

    An answer is not continued once it is settled: no further token could make it another one of the wanted answers, nor
    another first word.

    Args:
        wanted: for each prompt what is looked for in its answer.
        limit: new tokens at most.
    """

    def enough(i: int, text: str) -> bool:
        return settled(text, wanted[i], lines[i])

    prompts, lines = [record.asked for record in records], [one_line(record.prompt) for record in records]
    texts = generate(lm, prompts, max_new_tokens=limit, stop=(), batch_size=batch_size, enough=enough)
    return [Reply(cut(text, official, line)) for text, line in zip(texts, lines, strict=True)]


def cut(text: str, official: bool = False, line: bool = False) -> str:
    """The text up to its first period, without blanks around it; the released code leaves those before the period.

    Args:
        line: it ends at a new line, too.
    """
    start = text.partition("\n")[0] if line else text
    head = start.strip().partition(".")[0]
    return head if official else head.strip()


def word(text: str) -> str:
    """The first word of a text."""
    return next(iter(text.split()), "")


def settled(text: str, wanted: Wanted, line: bool = False) -> bool:
    """Whatever follows, the text becomes none of the wanted answers; or the first word, if that is wanted, is whole."""
    start = text.lstrip()
    if "." in start or (line and "\n" in text):
        return True
    if wanted is None:
        return False
    if not wanted:
        return len(start.split()) > 1 or start[-1:].isspace()
    sure = start.rstrip("\ufffd").rstrip()  # a character of several tokens shows once its last one is there
    return not any(answer.startswith(sure) for answer in wanted)


def choose(lm: LM, records: Sequence[ContextRecord], *, batch_size: int, letters: Letters = "blank") -> list[Reply]:
    """The option whose letter has the highest logit behind the prompt.

    Where letters begin with the same token there, each is scored as a whole, by its log probability.
    """
    marks = [_marks(lm, record, letters) for record in records]  # for each record one token a letter, or both variants
    single = [i for i, variants in enumerate(marks) if variants]
    flat = [[token for ids in marks[i] for token in ids] for i in single]
    logits = mark_logits(lm, [records[i].asked for i in single], flat, batch_size)
    replies = {
        i: _best(records[i], _likelier(scores, len(marks[i])), "") for i, scores in zip(single, logits, strict=True)
    }
    for i in range(len(records)):
        if i not in replies:
            names = records[i].letters
            whole = score(lm, [records[i].asked] * len(names), names, batch_size=batch_size)
            replies[i] = _best(records[i], [each.total for each in whole], WHOLE)
    return [replies[i] for i in range(len(records))]


def _likelier(scores: Sequence[float], variants: int) -> Sequence[float]:
    """Those of the variant that holds more probability."""
    size = len(scores) // variants
    parts = [scores[start : start + size] for start in range(0, len(scores), size)]
    return max(parts, key=lambda part: float(torch.tensor(part).logsumexp(0)))


def _best(record: ContextRecord, scores: Sequence[float], flag: str) -> Reply:
    best = max(range(len(scores)), key=scores.__getitem__)
    return Reply(record.letters[best], tuple(scores), flag)


def _marks(lm: LM, record: ContextRecord, letters: Letters) -> list[tuple[int, ...]]:
    """The token of each letter, in one variant or both. None where letters share it or it holds the prompt's end."""
    variants = []
    if letters != "blank":
        rows = lm.tokenizer(list(record.letters), add_special_tokens=False)["input_ids"]
        variants.append(tuple(row[0] for row in rows))
    if letters != "bare":
        (alone,) = encode_all(lm, [record.prompt])
        before, ids = option_tokens(lm, record.prompt, record.letters)
        variants += [ids] if before.ids == alone.ids else []
    return [ids for ids in variants if len(set(ids)) == len(record.options)]
