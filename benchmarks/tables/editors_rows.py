"""Rows of ``editors.py``, packed: a run is one line, with a row of signs for each kind of question.

A cell is a model, a set of facts, how many of them are in the model, a seed, and how many a commit holds. All runs of
a cell were asked the same questions in the same order, one of a kind and fact, so that no question need be written.

    "em", "contains", "twice", "same", "likelier"   1, 0, or - where it was not asked
    "tf", "tf_same", "distinct"                     two digits of a share in %, XX for all, -- for none
    "kl"                                            thousandths of a nat, null where there is none
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .facts_rows import distinct, field, twice, unchanged
from .rows import RESULTS, Row, read_lines

FOLDER = RESULTS / "editors"
Value = Callable[[Row], float | None]


def likelier(row: Row) -> float | None:
    """The wanted answer is likelier than the other."""
    new, old = row.get("tf_new"), row.get("tf_old")
    return None if new is None or old is None else float(new > old)


BITS: dict[str, Value] = {
    "em": field("em"), "contains": field("contains"), "twice": twice, "same": unchanged, "likelier": likelier,
}  # fmt: skip
SHARES: dict[str, Value] = {"tf": field("tf_acc"), "tf_same": field("tf_same"), "distinct": distinct}
OF: dict[str, tuple[str, ...]] = {
    "edit": ("em", "contains", "twice", "distinct", "tf"),
    "rephrase": ("em", "twice", "tf"),
    "loc": ("same", "tf_same", "kl"),
    "port": ("em", "contains", "tf"),
    "pack": ("em", "contains", "likelier"),
}
"""Kind of question, its family before the stroke -> what is kept of its rows."""


def packed(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Kind -> what is kept of one run's rows in the end, fact by fact."""
    kinds: dict[str, dict[tuple[int, str], Row]] = {}
    for row in rows:
        if row["when"] == "final" and row["kind"] != "loc/distractor":
            kinds.setdefault(row["kind"], {})[(row.get("chunk", 0), row["case_id"])] = row
    return {kind: _kept(kind, [found[key] for key in sorted(found)]) for kind, found in sorted(kinds.items())}


def _kept(kind: str, rows: Sequence[Row]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name in OF[kind.partition("/")[0]]:
        if name == "kl":
            kept[name] = [None if row.get("kl") is None else round(1000 * max(0.0, row["kl"])) for row in rows]
        elif name in BITS:
            kept[name] = "".join(_bit(BITS[name](row)) for row in rows)
        else:
            kept[name] = "".join(_share(SHARES[name](row)) for row in rows)
    return {name: value for name, value in kept.items() if set(value) - {"-", None}}


def _bit(value: float | None) -> str:
    return "-" if value is None else str(int(value))


def _share(value: float | None) -> str:
    if value is None:
        return "--"
    return "XX" if value >= 0.995 else f"{round(100 * value):02d}"


def packed_tasks(rows: Iterable[Row]) -> dict[str, Any]:
    """``task protocol`` -> what each record scored, in the order of their ids; of plain text nats and tokens, too."""
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("value") is not None:
            tasks.setdefault(f"{row['task']} {row['protocol']}", []).append(row)
    found: dict[str, Any] = {}
    for name, own in sorted(tasks.items()):
        own.sort(key=lambda row: str(row["id"]))
        if name.startswith("perplexity"):
            found[name] = {"nats": [[float(f"{row['value']:.5g}"), row.get("weight") or 1] for row in own]}
        elif all(row["value"] in (0, 1) for row in own):
            found[name] = {"bits": "".join(_bit(row["value"]) for row in own)}
        else:
            found[name] = {"shares": "".join(_share(row["value"]) for row in own)}
    return found


def task_values(kept: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """What each record scored, and what it weighs."""
    ((form, signs),) = kept.items()
    if form == "nats":
        return [value for value, _ in signs], [weight for _, weight in signs]
    found = values({"": {"em" if form == "bits" else "tf": signs}}, "", "em" if form == "bits" else "tf")
    scores = [value for value in found if value is not None]
    return scores, [1.0] * len(scores)


def values(kinds: Mapping[str, Mapping[str, Any]], kind: str, name: str) -> list[float | None]:
    """One number of each fact; none where the kind or the number was not kept."""
    found = kinds.get(kind, {}).get(name)
    if found is None:
        return []
    if name == "kl":
        return [None if value is None else value / 1000 for value in found]
    if name in BITS:
        return [None if sign == "-" else float(sign) for sign in found]
    pairs = (found[i : i + 2] for i in range(0, len(found), 2))
    return [None if pair == "--" else 1.0 if pair == "XX" else int(pair) / 100 for pair in pairs]


@lru_cache
def every(folder: Path = FOLDER) -> tuple[Row, ...]:
    """Every run that is committed, of all models and sets."""
    return tuple(line for path in sorted(folder.glob("*.jsonl.gz")) for line in read_lines(path))
