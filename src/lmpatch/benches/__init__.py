"""Benches: each measures a model, patched or not, on data.

A bench is a module: its items, its questions and its metrics. ``core`` runs it, resumes it, puts the model back, sets
it beside the unpatched model and reports. What else a module may say stands in ``core.adapter``, which alone reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # listing what there is stays without torch
    from ..models.lm import LM

shared = ("context", "core")
"""Folders that several benches use and that are none."""


class Bench(Protocol):
    """What the module of a bench has."""

    Config: type
    """A frozen dataclass, derived from ``core.contract.Settings``."""
    METRICS: Mapping[str, Any]
    """Name → ``core.contract.Measure``: which rows a number is made of, and what a row is worth."""

    def load(self, path: str | Path, *, limit: int | None = None, seed: int | None = None) -> Any:
        """What a file or folder holds: items, or what ``plan`` makes items of."""

    def ask(self, lm: LM, items: Sequence[Any], cfg: Any) -> Sequence[Any]:
        """The items' rows (``core.contract.Row``), from the model as it is now."""
