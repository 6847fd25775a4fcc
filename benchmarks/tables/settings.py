"""With which settings the facts tables were made: what acted, with defaults as they were resolved."""

from __future__ import annotations

from typing import Any

from .facts import BASELINES, SETS
from .rows import runs
from .stats import table

COVARIANCE = "WikiText-2, training part"
"""facts.py gives it to every method that takes text."""
NAMES = {
    "rome": "rome", "r_rome": "rome", "memit": "memit", "memit_alphaedit": "memit", "ft_m": "finetune",
    "ft_l": "finetune", "recipe": "recipe", "recipe_text": "recipe",
}  # fmt: skip
LAYERS: dict[str, dict[str, Any]] = {
    "rome": {"layer": 1}, "memit": {"layers": "2 to 5", "spread": "joint"}, "finetune": {"layer": 12},
    "recipe": {},
}  # fmt: skip
"""What None stood for on Gemma-3-270M: 18 blocks, a norm behind the MLP."""
IDLE = ("editor",)
"""Named once, below the table."""
EARLIER = "prev_keys"
"""Acts from the second commit on; each row here has one."""


def _acts(key: str, given: dict[str, Any]) -> bool:
    """A setting that another one switches off did nothing."""
    gate, solver = given.get("gate"), given.get("solver")
    off = {
        "threshold": gate == "sentinel", "keep": solver == "memit", "ridge": solver == "memit",
        "weight": solver == "alphaedit", EARLIER: True,
    }  # fmt: skip
    return key not in IDLE and not off.get(key, False) and given[key] not in (None, False, "", 0, 0.0)


def active(method: str, given: dict[str, Any]) -> list[str]:
    """``key=value`` of each setting that acted."""
    resolved = given | {key: value for key, value in LAYERS[method].items() if given.get(key) is None}
    return [f"`{key}={value}`" for key, value in resolved.items() if _acts(key, resolved)]


def facts_settings() -> str:
    """Every setting that acted, once per run."""
    seen = []
    editors = set()
    for lines in SETS.values():
        for label, folder, run in lines:
            if run in BASELINES:
                continue
            method, record = NAMES[run], runs(folder)[run]
            given = record["settings"]["method"]
            editors.add(given.get("editor", ""))
            text = COVARIANCE if method in ("rome", "memit") else ""
            seen.append([label, f"`{folder}`", record["dtype"], text, ", ".join(active(method, given))])
    (editor,) = editors - {""}
    head = ("method", "run", "dtype", "text of the covariance", "settings that acted")
    return table(head, seen) + f"\n\nEvery `recipe` row has the editor of 0.1.0, `{editor[:8]}…`."
