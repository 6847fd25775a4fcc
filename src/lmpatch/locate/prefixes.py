"""Fixed texts put before a prompt, so that a value is right in more than one context.

Released code samples such prefixes from the model without a seed and keeps them in a module global; two runs
differ, and a second model in the process reuses the first one's. Fixed texts make a run repeat.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..data.edits import Edit
from ..inference.tokens import Row, encode_all
from ..models.lm import LM

SHORT = ("The weather was fine. ", "It is well known. ", "In other news, ", "As he said, ", "Last year, ")
LONG = (
    "We met at the station shortly before noon. ",
    "The report was published at the end of the month. ",
    "She closed the book and looked out of the window. ",
    "Most of the shops in the street were already open. ",
    "After a long discussion, the committee came to this result. ",
)


def prefixes(short: int, long: int) -> tuple[str, ...]:
    """The empty prefix, ``short`` texts of about five tokens and ``long`` ones of about ten."""
    return ("", *SHORT[:short], *LONG[:long])


def prefixed(lm: LM, edits: Sequence[Edit], heads: Sequence[str], *, targets: bool) -> list[Row]:
    """One row for each fact and prefix, fact after fact, with its subject's place and, if asked, its target."""
    pairs = [(edit, head) for edit in edits for head in heads]
    return encode_all(
        lm,
        [head + edit.prompt for edit, head in pairs],
        [edit.target for edit, _ in pairs] if targets else None,
        [edit.subject for edit, _ in pairs],
        [len(head) for _, head in pairs],
    )
