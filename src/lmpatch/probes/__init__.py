"""Probes: each observes a model on data and leaves it as it was, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # listing what there is stays without torch
    from ..models.lm import LM
from ..progress import Progress


class Result(Protocol):
    """What a probe gives back."""

    def table(self) -> tuple[list[str], list[tuple[object, ...]]]:
        """Column names, and one row a record."""

    def save(self, folder: Path) -> None:
        """Write numbers (JSON lines) and pictures into a folder that is there."""


class Probe(Protocol):
    """What the module of a probe has. A ``run`` that takes long also takes ``out``, a file it goes on from."""

    Config: type
    """A frozen dataclass of numbers, the source's as defaults."""

    def run(self, lm: LM, data: Sequence[Any], cfg: Any, *, progress: Progress | None = None) -> Result:
        """Observe the model on each record."""

    def example(self, lm: LM) -> tuple[list[Any], Any]:
        """Data and settings that run in milliseconds on a tiny model."""
