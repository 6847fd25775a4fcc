"""Numbers of the bench ``facts``, of its rows: a mean inside each case first, then over cases."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise

from .rows import Row, of
from .stats import Mean, mean

Value = Callable[[Row], float | None]
ARTICLES = ("a ", "an ", "the ")


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
    return float(any(said.count(normalise(alias)) >= 2 for alias in row["aliases"]))


def distinct(row: Row) -> float | None:
    """Distinct-2: different pairs of neighbouring words over all pairs; 1 for an answer of at most one word."""
    if row.get("text") is None:
        return None
    words = row["text"].casefold().split()
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def unchanged(row: Row) -> float | None:
    """The normalised text is the unpatched model's."""
    if row.get("text") is None or row.get("base_text") is None:
        return None
    return float(normalise(row["text"]) == normalise(row["base_text"]))


METRICS: dict[str, tuple[str, Value]] = {
    "stated": ("edit", field("em")),
    "twice": ("edit", twice),
    "distinct": ("edit", distinct),
    "reworded": ("rephrase", field("em")),
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
    "tf reworded": ("rephrase", field("tf_acc")),
    "tf near": ("loc/same_relation", field("tf_same")),
    "tf far": ("loc/unrelated", field("tf_same")),
}
"""Name -> kind of prompt, value of its rows. ``near`` is the same relation of another subject, ``far`` is unrelated."""
ANSWERED = ("tf near", "tf far")
"""Over prompts with a gold answer only."""


def metric(folder: str, run: str, name: str, when: str = "final") -> Mean | None:
    """One number of one run; None where no prompt was asked."""
    kind, value = METRICS[name]
    cases: defaultdict[str, list[float]] = defaultdict(list)
    for row in of(folder, run):
        if row["kind"] == kind and row["when"] == when and (name not in ANSWERED or row.get("aliases")):
            found = value(row)
            if found is not None:
                cases[row["case_id"]].append(found)
    return mean([sum(values) / len(values) for values in cases.values()]) if cases else None


def final(folder: str, run: str) -> dict[str, Mean | None]:
    """Every number with all edits in place."""
    return {name: metric(folder, run, name) for name in METRICS}
