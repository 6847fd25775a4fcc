"""``Patch``: a value that changes a model's answers. It holds no model, no device and no file handle."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from torch import Tensor

from ..provenance import hash_json, hash_tensors
from ..resources import format_bytes

if TYPE_CHECKING:
    from ..inference.interventions import Intervention
    from ..models.lm import LM

Mount = Literal["bake", "side", "run"]
P = TypeVar("P", bound="Patch")


@dataclass(frozen=True)
class Base:
    """The model a patch was made for, without any patches on it."""

    fingerprint: str
    """``LM.fingerprint()``: SHA-256 over all weights rounded to bf16."""
    name: str
    touched: dict[str, str] = field(default_factory=dict)
    """Parameter name -> SHA-256 of that tensor rounded to bf16, for every parameter the patch changes."""


@dataclass(eq=False)
class Patch(ABC):
    """What every kind of patch has. ``config``, ``edits``, ``made`` and ``notes`` hold plain JSON values."""

    method: str
    config: dict[str, Any]
    base: Base
    edits: tuple[dict[str, Any], ...] = ()
    made: dict[str, Any] = field(default_factory=dict)
    """How it was made: seconds, versions, hardware, when."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What the method has to say about the run."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Tensors a later fit may want, one row per item along the first axis. They do not act on the model."""
    kind: ClassVar[str]
    mounts: ClassVar[tuple[Mount, ...]]
    """How it can be put on, the default first."""

    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """What its tensors are, as JSON: enough to build it again from ``tensors()``."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that act on the model, by their name in the file."""

    @classmethod
    @abstractmethod
    def from_parts(cls: type[P], parts: Mapping[str, Any], tensors: Mapping[str, Tensor], **common: Any) -> P:
        """The inverse of ``parts()`` and ``tensors()``; ``common`` are the fields of ``Patch``.

        Raises:
            BadPatch: they do not belong together.
        """

    @abstractmethod
    def describe(self) -> list[str]:
        """One line per part, for ``summary``."""

    def all_tensors(self) -> dict[str, Tensor]:
        """``tensors()`` and the extras, the latter under ``extra/``."""
        return {**self.tensors(), **{f"extra/{name}": t for name, t in self.extras.items()}}

    @property
    def nbytes(self) -> int:
        """Bytes all its tensors take."""
        return sum(t.numel() * t.element_size() for t in self.all_tensors().values())

    def hash(self) -> str:
        """SHA-256 of the content: tensors, kind, method, config and edits; not when or how fast it was made."""
        tensors = hash_tensors(sorted(self.all_tensors().items()), exact=True)
        edits = list(self.edits)
        return hash_json([self.kind, self.method, self.config, edits, self.parts(), tensors])

    def save(self, path: str | Path) -> None:
        """Write the patch as a folder; all of it or nothing. A patch that is there already is replaced.

        Raises:
            BadInput: something else is there.
        """
        from .file import save_patch

        save_patch(self, Path(path))

    def summary(self) -> str:
        """A few lines for a person."""
        count = f"{len(self.edits)} edit{'' if len(self.edits) == 1 else 's'}"
        lines = [f"{self.method}: {count} for {self.base.name} ({self.base.fingerprint[:12]})"]
        lines += [f"  {_short(edit)}" for edit in self.edits[:3]]
        if len(self.edits) > 3:
            lines.append(f"  and {len(self.edits) - 3} more")
        lines += self.describe()
        seconds = f", made in {self.made['seconds']:.1f} s" if "seconds" in self.made else ""
        return "\n".join([*lines, f"{format_bytes(self.nbytes)}{seconds}"])


@dataclass(eq=False)
class RunPatch(Patch):
    """A patch that acts in lmpatch's own calls (``score``, ``generate``, ``hidden``) and touches no weight.

    A plain call of the model does not see it: there is nothing in a forward that could look a question up.
    """

    mounts: ClassVar[tuple[Mount, ...]] = ("run",)

    @abstractmethod
    def attach(self, lm: LM) -> Intervention:
        """What ``models.run`` calls while the patch is on this model.

        Raises:
            WrongModel: it cannot act on a model of these shapes.
        """


def plain(value: Any) -> Any:
    """The value as JSON would give it back: records become dicts, tuples lists, numbers that JSON lacks text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)  # tensors and numpy numbers


def plain_edits(edits: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """Each edit as a dict of what it says; empty fields are left out."""
    return tuple({k: v for k, v in plain(edit).items() if v not in ("", [], {}, None)} for edit in edits)


def _short(edit: Mapping[str, Any]) -> str:
    if "prompt" in edit and "target" in edit:
        return f"{edit['prompt']} -> {edit['target']}"
    text = json.dumps(edit, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."
