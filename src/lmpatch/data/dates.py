"""From when to when something holds: ISO dates and times, all of them in UTC. A date is its first moment."""

from __future__ import annotations

import math
import time
from datetime import date, datetime, timezone
from typing import Any

from ..errors import BadInput

When = str | date
Span = tuple[str, str]
"""From and to, as ``iso`` gives them; the end is exclusive, and a side that is empty is open."""
ALWAYS: Span = ("", "")


def iso(name: str, value: Any) -> str:
    """A date as ``2024-05-31``, a date and time with its offset, in UTC; none is "".

    Args:
        name: what messages call it.
    Raises:
        BadInput: it is neither.
    """
    text = value.isoformat() if isinstance(value, date) else "" if value is None else value
    if not isinstance(text, str):
        raise BadInput(f"{name} is a date like 2024-05-31, found {value!r}.")
    text = text.strip()
    try:
        if len(text) <= 10:
            return text and date.fromisoformat(text).isoformat()
        moment = datetime.fromisoformat(text[:-1] + "+00:00" if text[-1] in "zZ" else text)
        utc = moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)
    except (ValueError, OverflowError):
        why = f"{name} is {text!r}, which is no date."
        raise BadInput(f"{why} Write 2024-05-31 or 2024-05-31T12:00+02:00.") from None
    return utc.isoformat()


def seconds(text: str, open: float = math.nan) -> float:
    """What ``iso`` gave as seconds since 1970; ``open`` where it is empty."""
    if not text:
        return open
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def moment(as_of: When | None) -> float:
    """Seconds since 1970 of a date; None: of now. Raises ``BadInput`` for what is none."""
    return time.time() if as_of is None else seconds(iso("as_of", as_of), time.time())


def bounds(span: Span) -> tuple[float, float]:
    """A span in seconds since 1970, open sides infinite."""
    return seconds(span[0], -math.inf), seconds(span[1], math.inf)


def outside(span: Span, other: Span) -> list[Span]:
    """What is left of a span without another: itself if they do not overlap, nothing, or up to two pieces."""
    (start, end), (first, last) = bounds(span), bounds(other)
    if end <= first or last <= start:
        return [span]
    return [(span[0], other[0])] * (start < first) + [(other[1], span[1])] * (last < end)


def overlap(span: Span, other: Span) -> bool:
    """Whether two spans share a moment."""
    return outside(span, other) != [span]
