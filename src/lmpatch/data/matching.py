"""When two answers are the same: normalisation and matching of generated text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

ARTICLES = ("a ", "an ", "the ")


def normalise(text: str) -> str:
    """NFKC, case-folded, punctuation off both edges of every token, single blanks, no leading article."""
    joined = " ".join(filter(None, map(_bare, unicodedata.normalize("NFKC", text).casefold().split())))
    return next((joined[len(a) :] for a in ARTICLES if joined.startswith(a) and len(joined) > len(a)), joined)


def _bare(token: str) -> str:
    start, end = 0, len(token)
    while start < end and unicodedata.category(token[start]).startswith("P"):
        start += 1
    while end > start and unicodedata.category(token[end - 1]).startswith("P"):
        end -= 1
    return token[start:end]


def first(text: str, aliases: Iterable[str]) -> int | None:
    """Where the first alias begins in ``text``, at word boundaries; both normalised. None: nowhere."""
    return min((at.start() for alias in aliases if alias and (at := re.search(whole(alias), text))), default=None)


def whole(words: str) -> str:
    """A pattern for these words and no part of others: "rome" is in "rome's", "2" is not in "2,000" or "2.5"."""
    return rf"(?<!\w)(?<!\d[.,]){re.escape(words)}(?!\w)(?![.,]\d)"


@dataclass(frozen=True)
class Match:
    """How one answer compares with the wanted and the old one."""

    em: bool
    """The answer is an alias (rule ``full``) or begins with one (rule ``prefix``)."""
    contains: bool
    """An alias occurs, and the old answer does not occur before it."""
    old_first: bool
    """The old answer occurs before any alias does."""


def match(text: str, aliases: Iterable[str], old: Iterable[str] = (), rule: str = "prefix") -> Match:
    """Compare a generated text with the accepted answers.

    Args:
        aliases: spellings of the wanted answer.
        old: spellings of the answer before the edit; those that are also aliases do not count.
        rule: ``prefix`` for models that run on after the answer, ``full`` for whole replies.
    """
    said = normalise(text)
    wanted = {normalise(alias) for alias in aliases}
    new_at, old_at = first(said, wanted), first(said, {normalise(o) for o in old} - wanted)
    return Match(
        em=(said in wanted and bool(said)) if rule == "full" else new_at == 0,
        contains=new_at is not None and (old_at is None or new_at <= old_at),
        old_first=old_at is not None and (new_at is None or old_at < new_at),
    )


def same(a: str, b: str) -> bool:
    """Whether two answers are equal once normalised."""
    return normalise(a) == normalise(b)
