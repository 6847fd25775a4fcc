"""Putting questions with contexts to a model: a text to continue, or a letter to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..data.context import ContextRecord
from ..models.lm import LM
from ..models.run import generate, score
from ..models.tokens import encode_all
from ._asking import mark_logits

Wanted = Sequence[str] | None
"""The answers that are looked for in a text; None: all of it is wanted."""
WORD: Wanted = ()
"""Only its first word is."""
FIRST = 3  # tokens that most answers are judged by; those they do not settle are asked again, for all tokens
WHOLE = "options share a first token: each letter scored whole"


@dataclass(frozen=True)
class Said:
    """What a model answered."""

    text: str
    scores: tuple[float, ...] = ()
    flag: str = ""


def complete(
    lm: LM,
    asked: Sequence[ContextRecord],
    wanted: Sequence[Wanted],
    *,
    limit: int,
    batch_size: int,
    official: bool = False,
    first: int = FIRST,
) -> list[Said]:
    """Continue each prompt greedily, and cut the text at its first period.

    Most answers are wrong or done after a few tokens. Those that ``first`` tokens settle are not continued: no further
    token could make them another one of the wanted answers, nor another first word.

    Args:
        wanted: for each prompt what is looked for in its answer.
        limit: new tokens at most.
        first: tokens of the first round; with ``limit`` or more there is one round.
    """
    prompts = [record.asked for record in asked]
    texts: list[str] = generate(lm, prompts, max_new_tokens=min(first, limit), stop=(), batch_size=batch_size)
    left = [i for i, text in enumerate(texts) if first < limit and not settled(text, wanted[i])]
    again = (
        generate(lm, [prompts[i] for i in left], max_new_tokens=limit, stop=(), batch_size=batch_size) if left else []
    )
    for i, text in zip(left, again, strict=True):
        texts[i] = text
    return [Said(cut(text, official)) for text in texts]


def cut(text: str, official: bool = False) -> str:
    """The text up to its first period, without blanks around it; the released code leaves those before the period."""
    head = text.strip().partition(".")[0]
    return head if official else head.strip()


def word(text: str) -> str:
    """The first word of a text."""
    return next(iter(text.split()), "")


def settled(text: str, wanted: Wanted) -> bool:
    """Whatever follows, the text becomes none of the wanted answers; or the first word, if that is wanted, is whole."""
    begun = text.lstrip()
    if "." in begun:
        return True
    if wanted is None:
        return False
    if not wanted:
        return len(begun.split()) > 1 or begun[-1:].isspace()
    sure = begun.rstrip("\ufffd").rstrip()  # a character of several tokens shows once its last one is there
    return not any(answer.startswith(sure) for answer in wanted)


def choose(lm: LM, asked: Sequence[ContextRecord], *, batch_size: int, official: bool = False) -> list[Said]:
    """The option whose letter has the highest logit behind the prompt.

    Where letters begin with the same token there, each is scored as a whole, by its log probability.

    Args:
        official: as released: a blank stands at the prompt's end and the letter's token has none.
    """
    if official:
        asked = [_with_blank(record) for record in asked]
    marks = [_marks(lm, record, official) for record in asked]
    single = [i for i, ids in enumerate(marks) if ids]
    found = mark_logits(lm, [asked[i].asked for i in single], [marks[i] for i in single], batch_size)
    made = {i: _best(asked[i], scores, "") for i, scores in zip(single, found, strict=True)}
    for i in range(len(asked)):
        if i not in made:
            letters = asked[i].letters
            whole = score(lm, [asked[i].asked] * len(letters), letters, batch_size=batch_size)
            made[i] = _best(asked[i], [each.total for each in whole], WHOLE)
    return [made[i] for i in range(len(asked))]


def _best(record: ContextRecord, scores: Sequence[float], flag: str) -> Said:
    best = max(range(len(scores)), key=scores.__getitem__)
    return Said(record.letters[best], tuple(scores), flag)


def _with_blank(record: ContextRecord) -> ContextRecord:
    return replace(record, prompt=f"{record.prompt} ", bare=f"{record.bare} ")


def _marks(lm: LM, record: ContextRecord, official: bool) -> tuple[int, ...]:
    """The token of each letter behind the prompt; none where letters share it, or it takes in the prompt's end."""
    if official:
        rows = lm.tokenizer(list(record.letters), add_special_tokens=False)["input_ids"]
        ids = tuple(row[0] for row in rows)
    else:
        (alone,) = encode_all(lm, [record.prompt])
        told = encode_all(lm, [record.prompt] * len(record.options), record.letters)
        ids = tuple(row.ids[row.target] for row in told if row.ids[: row.target] == alone.ids)
    return ids if len(set(ids)) == len(record.options) else ()
