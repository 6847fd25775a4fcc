"""Numbers of the bench ``facts``, of its rows: a mean inside each case first, then over cases."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from .rows import Row, of
from .stats import Mean, mean

Value = Callable[[Row], float | None]
ARTICLES = ("a ", "an ", "the ")
MARKER = re.compile(r"<[a-z_]+>")
"""A special token that a base model writes into its answer."""


def normalise(text: str) -> str:
    """As the bench compares: NFKC, case-folded, punctuation off both edges of a word, no leading article."""
    words = (_bare(word) for word in unicodedata.normalize("NFKC", text).casefold().split())
    joined = " ".join(word for word in words if word)
    return next((joined[len(a) :] for a in ARTICLES if joined.startswith(a) and len(joined) > len(a)), joined)


def _bare(word: str) -> str:
    start, end = 0, len(word)
    while start < end and unicodedata.category(word[start]).startswith("P"):
        start += 1
    while end > start and unicodedata.category(word[end - 1]).startswith("P"):
        end -= 1
    return word[start:end]


def field(name: str) -> Value:
    return lambda row: None if row.get(name) is None else float(row[name])


def twice(row: Row) -> float | None:
    """The answer holds the target twice or more; both normalised, parts of words count."""
    if row.get("text") is None:
        return None
    said = normalise(row["text"])
    return float(any(said.count(word) >= 2 for alias in row["aliases"] if (word := normalise(alias))))


def distinct(row: Row) -> float | None:
    """Distinct-2: different pairs of neighbouring words over all pairs; 1 for an answer of at most one word."""
    if row.get("text") is None:
        return None
    words = row["text"].casefold().split()
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def once(row: Row) -> float | None:
    """The answer states the target, and does not say it again."""
    said = twice(row)
    return None if said is None else float(row["em"] and not said)


@lru_cache
def paraphrases() -> dict[str, frozenset[str]]:
    """CounterFact's reworded prompts in two parts, ``asks_the_same`` and ``suggests``; the file says by which rule."""
    found = json.loads((Path(__file__).parent / "paraphrases.json").read_text(encoding="utf-8"))
    return {part: frozenset(found[part]) for part in ("asks_the_same", "suggests")}


def part(name: str, same: bool) -> Value:
    """A field, over the reworded prompts that ask the same, or over those that only suggest the fact.

    Those of zsRE and wiki all ask the same and are not in the file.
    """
    return lambda row: None if (row["prompt"] in paraphrases()["suggests"]) == same else field(name)(row)


def unchanged(row: Row) -> float | None:
    """The normalised text is the unpatched model's."""
    if row.get("text") is None or row.get("base_text") is None:
        return None
    return float(normalise(row["text"]) == normalise(row["base_text"]))


METRICS: dict[str, tuple[str, Value]] = {
    "stated": ("edit", field("em")),
    "twice": ("edit", twice),
    "once": ("edit", once),
    "distinct": ("edit", distinct),
    "reworded": ("rephrase", part("em", same=True)),
    "suggested": ("rephrase", part("em", same=False)),
    "kept near": ("loc/same_relation", unchanged),
    "kept far": ("loc/unrelated", unchanged),
    "kept subject": ("loc/same_subject", unchanged),
    "kept objects": ("loc/other_objects", unchanged),
    "KL near": ("loc/same_relation", field("kl")),
    "KL far": ("loc/unrelated", field("kl")),
    "alias": ("port/subject_aliasing", field("contains")),
    "logic": ("port/logical_generalization", field("contains")),
    "composition": ("port/reasoning", field("contains")),
    "tf stated": ("edit", field("tf_acc")),
    "tf reworded": ("rephrase", part("tf_acc", same=True)),
    "tf suggested": ("rephrase", part("tf_acc", same=False)),
    "tf near": ("loc/same_relation", field("tf_same")),
    "tf far": ("loc/unrelated", field("tf_same")),
}
"""Name -> kind of prompt, value of its rows. ``near`` is the same relation of another subject, ``far`` is unrelated."""
ANSWERED = ("tf near", "tf far")
"""Over prompts with a gold answer only."""


def metric(folder: str, run: str, name: str, when: str = "final") -> Mean | None:
    """One number of one run; None where no prompt was asked."""
    found = by_case(folder, run, name, when)
    return mean(list(found.values())) if found else None


def by_case(folder: str, run: str, name: str, when: str = "final") -> dict[str, float]:
    """Case -> mean of its prompts."""
    kind, value = METRICS[name]
    cases: defaultdict[str, list[float]] = defaultdict(list)
    for row in of(folder, run):
        if row["kind"] == kind and row["when"] == when and (name not in ANSWERED or row.get("aliases")):
            found = value(row)
            if found is not None:
                cases[row["case_id"]].append(found)
    return {case: sum(values) / len(values) for case, values in cases.items()}


def still_right(folder: str, run: str, kind: str) -> tuple[int, int]:
    """How many prompts are answered rightly, of how many that the unpatched model answers rightly."""
    rows = [row for row in of(folder, run) if row["kind"] == kind and row["when"] == "final" and row.get("was_right")]
    return sum(bool(row["em"]) for row in rows), len(rows)


def empty(folder: str, run: str, kind: str) -> tuple[int, int]:
    """How many answers have no word, markers such as ``<start_of_image>`` apart, of how many."""
    rows = [row for row in of(folder, run) if row["kind"] == kind and row["when"] == "final"]
    texts = [row["text"] for row in rows if row.get("text") is not None]
    return sum(not normalise(MARKER.sub(" ", text)) for text in texts), len(texts)
