"""Rows of the facts bench, one per prompt and moment, and the numbers made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

from ...data.matching import same
from ..core import contract
from ..core.contract import Curve, Example, Json, Measure, Scatter
from ..core.stats import PAIRS, TWICE, distinct, said_twice
from . import pack
from .questions import PACK

BINS = {"0": 0, "1-9": 9, "10-99": 99, "100-999": 999, "1000+": math.inf}
"""Ages of the retention curve: edits written since → the last of them."""


@dataclass(frozen=True, kw_only=True)
class Row(contract.Row):
    """One prompt of one case at one moment."""

    when: str = ""
    """``final``: all edits of the chunk in place; ``immediate``: after the commit that holds it; ``retention``."""
    case_id: str = ""
    kind: str
    """``edit``, ``rephrase``, ``loc/<kind>``, ``port/<axis>``, ``pack/<probe>``."""
    prompt: str
    aliases: tuple[str, ...] = ()
    old_aliases: tuple[str, ...] = ()
    base_text: str | None = None
    text: str | None = None
    """The generation, unchanged; None: not asked."""
    was_right: bool | None = None
    """The base model answers this prompt as wanted."""
    em: bool | None = None
    """The answer is right; to a negated prompt it is if the new one is not stated."""
    contains: bool | None = None
    old_first: bool | None = None
    tf_acc: float | None = None
    """Share of the answer's tokens that are the first choice, teacher-forced."""
    tf_same: float | None = None
    """Share of the answer's tokens where the first choice is the base model's."""
    tf_new: float | None = None
    """Mean log probability per token of the answer, nats."""
    tf_old: float | None = None
    """The same of the old answer."""
    kl: float | None = None
    """KL(p_base || p_now) of the next token, nats."""
    edit_index: int = 0
    age: int = 0
    """Edits written after the commit that holds this one."""
    n_edits: int = 0
    """Edits in the model."""
    probe: bool = False
    """The case belongs to the retention curve."""

    def key(self) -> Hashable:
        """Chunk, case, kind and prompt, and the moment where it is not the last."""
        return self.chunk, self.case_id, self.kind, self.prompt, self.when

    def unit(self) -> Hashable:
        """The case."""
        return self.case_id

    def where(self) -> str:
        """The kind."""
        return self.kind

    def generation(self) -> tuple[str, Sequence[str]] | None:
        """The answer once all edits are in place; something is wanted of edits and rephrases. The probe pack has
        numbers of its own."""
        if self.text is None or self.when != "final" or self.kind.startswith(PACK):
            return None
        return self.text, self.aliases if self.kind in ("edit", "rephrase") else ()

    def example(self) -> Example | None:
        """The answer once all edits are in place."""
        if self.text is None or self.when != "final":
            return None
        near = self.kind.startswith("loc/")
        wanted = "no change" if near else " / ".join(self.aliases[:1]) + (f" [{self.flag}]" if self.flag else "")
        wanted = f"not {wanted}" if self.kind == f"{PACK}negation" else wanted
        right = same(self.text, self.base_text or "") if near else self.em
        return Example(self.prompt, wanted, self.text, right, (self.kl or 0.0) if near else None)


def _of(kinds: str, when: str, split: str, only: Callable[[Row], bool]) -> Callable[[Row], str | None]:
    """Rows of the kinds at a moment; of ``loc/`` and ``port/`` each member is a number of its own."""
    families = {tuple(kind.partition("/")[:2]) for kind in kinds.split("|")}

    def member(row: Row) -> str | None:
        first, mark, rest = row.kind.partition("/")
        belongs = row.when == when and (first, mark) in families and only(row)
        return rest if belongs and (split == "all" or row.was_right is (split == "was_right")) else None

    return member


def protocol(measure: str, when: str, suffix: str = "") -> str:
    """Id of how a number was taken: ``gen-final-v1``, ``tf-recipe-chunk-v1``, ... with the bench's suffix.

    Args:
        suffix: what in the settings makes another protocol. The rule and the length of an answer decide no tf_ number.
    """
    if measure == "tf":
        name = {"final": "tf-recipe-chunk-v1", "immediate": "tf-immediate-v1"}[when]
        return name + "".join(f"-{part}" for part in suffix.split("-") if part in ("raw", "chat"))
    return f"gen-{when}-v1{suffix}"


def _unchanged(row: Row) -> bool | None:
    return None if row.text is None or row.base_text is None else same(row.text, row.base_text)


def _success(row: Row) -> bool | None:
    return None if row.tf_new is None or row.tf_old is None else row.tf_new > row.tf_old


def _margin(row: Row) -> float | None:
    return None if row.tf_new is None or row.tf_old is None else math.exp(row.tf_new) - math.exp(row.tf_old)


EM, CONTAINS, OLD, KL = (attrgetter(name) for name in ("em", "contains", "old_first", "kl"))
TF, TF_SAME = attrgetter("tf_acc"), attrgetter("tf_same")
EDITS, NEAR, FOLLOWS = "Edited facts", "What should not move (locality)", "What follows (portability)"
FORCED = "Teacher-forced, as in older papers"
MEASURES: tuple[tuple[str, str, Callable[[Row], float | bool | None], str, str], ...] = (
    ("reliability", "edit", EM, EDITS, "the answer to the edit prompt begins with the new one (efficacy)"),
    ("reliability_contains", "edit", CONTAINS, EDITS, "the new answer occurs, the old one not before it"),
    ("generality", "rephrase", EM, EDITS, "the same in other words (paraphrases)"),
    ("generality_contains", "rephrase", CONTAINS, EDITS, "the new answer occurs, in other words"),
    ("old_answer_rate", "edit", OLD, EDITS, "the old answer comes first"),
    ("old_answer_rate_rephrase", "rephrase", OLD, EDITS, "the old answer comes first, in other words"),
    ("portability", "port/", EM, FOLLOWS, "the answer begins with what follows from the new fact"),
    ("portability_contains", "port/", CONTAINS, FOLLOWS, "what follows from the new fact occurs"),
    ("loc_unchanged", "loc/", _unchanged, NEAR, "the same text as the unpatched model's"),
    ("loc_correct", "loc/", EM, NEAR, "still right, of the prompts the unpatched model had right"),
    ("loc_kl", "loc/", KL, NEAR, "KL divergence from the unpatched model's next-token distribution, nats"),
    ("loc_kl_p95", "loc/", KL, NEAR, "its 95th percentile over prompts"),
    ("tf_reliability", "edit", TF, FORCED, "tokens that are the first choice, the ones before given"),
    ("tf_generality", "rephrase|port/", TF, FORCED, "the same in other words, and of what follows"),
    ("tf_locality", "loc/", TF_SAME, FORCED, "share of tokens whose first choice is the unpatched model's"),
    ("tf_success", "edit", _success, FORCED, "the new answer is more probable than the old"),
    ("tf_success_rephrase", "rephrase", _success, FORCED, "the same in other words"),
    ("tf_margin", "edit", _margin, FORCED, "probability of the new answer minus that of the old"),
    ("tf_margin_rephrase", "rephrase", _margin, FORCED, "the same in other words"),
)  # name, kinds of prompts, value of a row, heading, what it says
SPLITS = {"all": "", "was_wrong": "; where the unpatched model was wrong", "was_right": "; where it was right"}
HEADLINES = ("reliability", "generality", "portability", "loc_unchanged")
HOW: dict[str, dict[str, Any]] = {
    "old_answer_rate": {"better": "less"},
    "loc_kl": {"better": "less", "unit": "nats"},
    "loc_kl_p95": {"better": "less", "unit": "nats", "percentile": 95},
    "tf_margin": {"unit": ""},
}
ONLY: dict[str, Callable[[Row], bool]] = {
    **dict.fromkeys(("old_answer_rate", "tf_success", "tf_margin"), lambda row: bool(row.old_aliases)),
    "loc_correct": lambda row: row.was_right is True,
    "tf_locality": lambda row: bool(row.aliases),
}
"""Which rows of its kinds a number is made of, where not all."""


def _metrics() -> dict[str, Measure]:
    """Every number: of all rows, of those the unpatched model had wrong or right; and right after the commit."""
    every: dict[str, Measure] = {}
    for when in ("final", "immediate"):
        for name, kinds, value, group, means in MEASURES:
            stem = name.removesuffix("_rephrase")
            for split in ("all",) if name == "loc_correct" else SPLITS:
                key = "/".join(part for part in (when, split) if part not in ("final", "all"))
                every[name + (f"@{key}" if key else "")] = Measure(
                    means + SPLITS[split],
                    partial(_finite, value),
                    _of(kinds, when, split, ONLY.get(stem, lambda row: True)),
                    group if when == "final" else "Right after the commit",
                    headline=name in HEADLINES and not key,
                    shown=not key or (name in ("reliability", "generality") and key in ("was_wrong", "immediate")),
                    protocol=partial(_protocol, "tf" if name.startswith("tf_") else "gen", when),
                    **HOW.get(stem, {}),
                )
    every |= _repetition()
    every |= {key: replace(m, protocol=partial(_protocol, "gen", "final")) for key, m in pack.METRICS.items()}
    every["forgetting"] = Measure(
        "reliability right after the commit minus that at the end, of the same cases", group=EDITS, better="less",
        derived=("minus", "reliability@immediate", "reliability"), protocol=partial(_protocol, "gen", "retention"),
    )  # fmt: skip
    return every


def _repetition() -> dict[str, Measure]:
    """Beside the generated scores that ``core.stats.REPETITION``, of the answers in the end, does not stand for."""
    every: dict[str, Measure] = {}
    for key, kinds, when, group in (
        ("portability_{}", "port/", "final", FOLLOWS),
        ("{}@immediate", "edit|rephrase", "immediate", "Right after the commit"),
    ):
        how: dict[str, Any] = {"group": group, "protocol": partial(_protocol, "gen", when)}
        of = _of(kinds, when, "all", lambda row: row.text is not None)
        twice = Measure(TWICE, lambda row: said_twice(row.text, row.aliases), of, better="less", **how)
        every[key.format("repeats")] = twice
        every[key.format("distinct_2")] = Measure(PAIRS, lambda row: distinct(row.text), of, **how)
    return every


def _finite(value: Callable[[Row], float | bool | None], row: Row) -> float | bool | None:
    """A number that is none counts as missing."""
    number = value(row)
    return number if number is not None and math.isfinite(number) else None


def _protocol(measure: str, when: str, record: Json) -> str:
    return protocol(measure, when, record.get("suffix", ""))


METRICS = _metrics()


def retention(rows: Iterable[Row]) -> list[tuple[str, float, int]]:
    """(ages, share of edit prompts answered as edited, rows) of the probe cases, youngest first."""
    values: dict[str, list[float]] = {ages: [] for ages in BINS}
    for row in rows:
        if row.probe and row.kind == "edit" and row.em is not None:
            values[next(ages for ages, last in BINS.items() if row.age <= last)].append(float(row.em))
    return [(ages, sum(v) / len(v), len(v)) for ages, v in values.items() if v]


PLOTS = (
    Scatter("Locality against efficacy", "reliability", "loc_unchanged"),
    Curve(
        "Retention", "edits written since", "still answered as edited, %",
        lambda rows: [(ages, share) for ages, share, _ in retention(rows)], tuple(BINS),
    ),
)  # fmt: skip
