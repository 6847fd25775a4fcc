"""Every run of the bench ``facts``, one line a run and moment; and what follows from a fact."""

from __future__ import annotations

from pathlib import Path

from .facts_rows import METRICS, metric
from .rows import RESULTS, of, runs
from .stats import Mean, number, table

MAIN = {
    "efficacy": "stated", "states it once": "once", "paraphrase": "reworded", "suggested": "suggested",
    "same relation unchanged": "kept near", "unrelated unchanged": "kept far", "says it twice or more": "twice",
    "efficacy (t-f)": "tf stated", "paraphrase (t-f)": "tf reworded", "suggested (t-f)": "tf suggested",
    "same relation (t-f)": "tf near", "unrelated (t-f)": "tf far",
}  # fmt: skip
AXES = {  # of RIPE, Cohen et al. 2024 (arXiv:2307.12976), as KnowEdit groups them
    "subject aliasing": "alias", "logical generalization": "logic", "composition": "composition",
    "relation specificity": "kept subject", "forgetfulness": "kept objects",
}  # fmt: skip


def folders() -> list[str]:
    """Every committed run of the bench."""
    found = sorted(path.parent for path in RESULTS.glob("*/rows.jsonl.gz"))
    return [folder.name for folder in found if _is_facts(folder)]


def _is_facts(folder: Path) -> bool:
    return bool(next(iter(runs(folder.name).values()))["bench"] == "facts")


def moments() -> list[tuple[str, str, str]]:
    """(folder, run, when). ``immediate`` only where a run has several commits; never mixed with ``final``."""
    made = []
    for folder in folders():
        for run in runs(folder):
            rows = [row for row in of(folder, run)] if _has_rows(folder, run) else []
            for when in ("final", "immediate"):
                if any(row["when"] == when and row["kind"] == "edit" for row in rows):
                    made.append((folder, run, when))
    return made


def _has_rows(folder: str, run: str) -> bool:
    try:
        return bool(of(folder, run))
    except KeyError:  # stopped before its first chunk was done
        return False


def facts_summary() -> str:
    """In %, distinct-2 as a share."""
    lines = []
    for folder, run, when in moments():
        found = {name: metric(folder, run, name, when) for name in METRICS}
        n = found["stated"].n if found["stated"] else 0
        shares = [_share(found[name]) for name in MAIN.values()]
        lines.append([folder, run, when, str(n), *shares, number(found["distinct"])])
    return table(("folder", "run", "when", "n", *MAIN, "distinct-2"), lines)


def facts_axes() -> str:
    """In %, over the runs that were asked such questions."""
    lines = []
    for folder, run, when in moments():
        found = {title: metric(folder, run, name, when) for title, name in AXES.items()}
        if found["composition"]:
            lines.append([folder, run, *(_share(one) for one in found.values())])
    return table(("folder", "run", *AXES), lines)


def _share(found: Mean | None) -> str:
    return f"{100 * found.value:.1f}" if found else ""
