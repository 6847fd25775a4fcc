"""Fixed texts put before a prompt, so that a value is right in more than one context.

Released code samples such prefixes from the model without a seed and keeps them in a module global; two runs
differ, and a second model in the process reuses the first one's. Fixed texts make a run repeat.
"""

from __future__ import annotations

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
