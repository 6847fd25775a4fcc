"""What methods and probes learn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Record:
    """One record of a file. A method names the class it takes, and files are read by that class."""

    @classmethod
    def read(cls, path: str | Path, *, limit: int | None = None, check: bool = False) -> list[Any]:
        """The records of a file, at most ``limit``; with ``check``, those that cannot stand together are refused.

        Raises:
            BadInput: no such file, or none of these records in it.
        """
        raise NotImplementedError

    @staticmethod
    def check(records: Sequence[Any]) -> None:
        """Raise ``BadInput`` where records cannot stand together."""
