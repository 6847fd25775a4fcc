"""Single edits and their harm, and the settings that sweeps found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .memory import ASKED_MODELS
from .rows import RESULTS, read_lines, summary
from .stats import mean, percent, table

METHODS = {
    "rome": "`rome`", "memit": "`memit`", "finetune": "`finetune`",
    "rome-bare": "`rome`, `key=bare` (the released form)",
}  # fmt: skip
SWEPT = {
    "ft": "`finetune`, one module", "lora": "`finetune`, LoRA", "rome": "`rome`", "memit 10": "`memit`, commits of 10",
    "memit 40": "`memit`, commits of 40", "memit 100": "`memit`, commits of 100", "cad": "`cad`", "adacad": "`adacad`",
    "coiecd": "`coiecd`",
}  # fmt: skip


def _found(name: str) -> dict[str, Any]:
    return summary(name) if (RESULTS / name).exists() else {}


def _share(hits: Sequence[float]) -> str:
    return percent(mean(hits)) if hits else ""


def harm_table() -> str:
    """Single edits: what each does to the perplexity of plain text, and whether it states its fact."""
    lines = []
    for model, title in ASKED_MODELS.items():
        whole = read_lines(RESULTS / f"harm-{model}.jsonl.gz")
        for name, label in METHODS.items():
            rows = [row for row in whole if row["method"] == name]
            if rows:
                kept = sorted(row["ratio"] for row in rows if not row["refused"])
                middle, largest = (f"{kept[len(kept) // 2]:.3f}", f"{kept[-1]:.2f}") if kept else ("", "")
                all_ = [row["ratio"] or float("inf") for row in rows]
                cells = [str(len(rows)), _share([row["stated"] for row in rows if row["stated"] is not None])]
                cells += [_share([row["reworded"] for row in rows if row["reworded"] is not None]), middle, largest]
                lines.append([title, label, *cells, str(sum(bool(row["refused"]) for row in rows)), f"{max(all_):.2f}"])
    if not lines:
        return "Not measured yet: `benchmarks/harm.py` makes the rows."
    head = (
        "model", "method", "edits", "states the fact", "in other words", "perplexity ratio: median", "largest kept",
        "refused", "largest, the refused ones too",
    )  # fmt: skip
    return table(head, lines)


def sweep_table(what: str) -> str:
    """The best settings of each method, or that there are none inside the grid."""
    scores = {"weights": ("efficacy", "paraphrase", "kl"), "decoding": ("acc", "robustness", "bcu")}[what]
    lines = []
    for model, title in ASKED_MODELS.items():
        found = _found(f"sweep-{what}-{model}.json")
        for name, label in SWEPT.items():
            best, rows = found.get("best", {}).get(name), found.get("rows", {}).get(name, [])
            if best:
                settings = best["settings"] or best["at_edge"]
                row = next(row for row in rows if row["settings"] == settings)
                shown = ", ".join(f"`{key}={_plain(value)}`" for key, value in settings.items() if value is not None)
                where = f"no: {', '.join(best['edge'])}" if best["edge"] else "yes"
                lines.append([title, label, str(best["tried"]), shown, where, *(f"{row[key]:.3f}" for key in scores)])
    if not lines:
        return f"Not measured yet: `benchmarks/sweeps.py {what}` makes the rows."
    names = {"kl": "KL, nats", "acc": "ACC", "bcu": "BCU"}
    head = ("model", "method", "settings tried", "best", "inside the grid", *(names.get(key, key) for key in scores))
    return table(head, lines)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace(" ", "")
