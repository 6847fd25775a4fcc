"""``Patch``: a value that changes a model's answers. It holds no model, no device and no file handle."""

from __future__ import annotations

import html
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor

from ..errors import BadInput
from ..inference.interventions import Intervention
from ..models.lm import LM
from ..provenance import hash_json, hash_tensors, made_now
from ..resources import format_bytes
from . import format
from .base import Base as Base
from .base import fingerprint
from .handle import Handle
from .lora import Lora

Mount = Literal["bake", "side", "run"]
P = TypeVar("P", bound="Patch")
ONLY = "acts only where one carries a context. Fit it again with when='always' (--set when=always)."


class Law(Enum):
    """What merging patches of a kind means."""

    STACK = "a merge does what its patches do when they are put on one after the other"
    UNION = "a merge holds what its patches hold, each thing once: with itself, a patch is what it was"
    NONE = "patches of this kind cannot be merged"


@dataclass(eq=False)
class Patch(ABC):
    """What every kind of patch has. ``config``, ``edits``, ``made`` and ``notes`` hold plain JSON values."""

    method: str
    config: dict[str, Any]
    base: Base
    edits: tuple[dict[str, Any], ...] = ()
    made: dict[str, Any] = field(default_factory=dict)
    """How it was made: seconds, versions, hardware, when; ``on``: the patches that were on (hash -> method)."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What the method has to say about the run."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Tensors a later fit may want, one row per item along the first axis. They do not act on the model."""
    kind: ClassVar[str]
    mounts: ClassVar[tuple[Mount, ...]]
    """How it can be put on, the default first. None for a kind that makes a new model: see ``rebuild``."""
    needs_context: ClassVar[bool] = False
    """It compares a prompt with the prompt without its context, so it must be asked with ``InContext``."""

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "__repr__" not in vars(cls):
            cls.__repr__ = Patch.__repr__  # type: ignore[method-assign]  # a dataclass would write out every tensor

    @property
    def only_in_context(self) -> bool:
        """It acts only where a prompt carries a context (``InContext``), and leaves every other one to the bit."""
        return False

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

    def change_norms(self) -> dict[str, float]:
        """Weight -> norm of its change over its own, where the patch changes weights and that is known."""
        return {}

    def fits(self, lm: LM) -> None:  # noqa: B027 - a kind may take every model
        """Raise ``WrongModel`` unless it can act on a model of these shapes."""

    def attach(self, lm: LM, mount: Mount, others: Sequence[Handle]) -> Handle:
        """What putting it on this model will do. It only looks: the ledger calls ``Handle.enable``.

        Args:
            mount: one of ``mounts``.
            others: the handles of the patches that are on, in order.
        Raises:
            CannotMount: this mount cannot work here; the message names the other.
            ForeignWrite: a weight that another patch changed was written by someone else.
        """
        raise NotImplementedError(f"{type(self).__name__} has mounts and no attach.")

    def rebuild(self, lm: LM) -> LM:
        """A new model, for kinds without mounts; ``lm`` is left as it was. BadInput: this kind is put on a model."""
        raise BadInput(f"a {self.method} patch of kind {self.kind} acts on the model itself. Call apply(lm, patch).")

    @abstractmethod
    def merged(self, others: Sequence[Any]) -> Patch:
        """One patch that does what all do, patches of this kind for one model; see ``merged_fields``.

        Raises:
            CannotMerge: they have no common algebra.
        """

    def law(self) -> Law:
        """What ``merged`` promises."""
        return Law.STACK

    def lora(self, lm: LM, rank: int | None) -> Lora:
        """The patch as an adapter of ``lm``, for ``export``.

        Args:
            rank: cut every change to this rank at most. None: exact.
        Raises:
            BadInput: this kind is no change of projections, or an exact adapter would outgrow the weight.
            CannotMount: one of its changes cannot be an adapter.
        """
        raise BadInput(f"a {self.method} patch of kind {self.kind} cannot be a LoRA adapter.")

    @classmethod
    def trial(cls, lm: LM, layer: int, strength: float) -> Patch | None:
        """A patch of this kind at one layer that a plain forward sees, for proofs on a user's model.

        Args:
            strength: about the share of what it changes; 0: it acts and changes nothing.
        Returns:
            None: no such patch can be made up.
        """
        return None

    def all_tensors(self) -> dict[str, Tensor]:
        """``tensors()`` and the extras, the latter under ``extra/``."""
        return self.tensors() | {f"extra/{name}": t for name, t in self.extras.items()}

    @property
    def nbytes(self) -> int:
        """Bytes all its tensors take."""
        return sum(t.nbytes for t in self.all_tensors().values())

    def hash(self) -> str:
        """SHA-256 of the content: tensors, kind, method, config and edits; not when or how fast it was made."""
        tensors = hash_tensors(sorted(self.all_tensors().items()), exact=True)
        return hash_json([self.kind, self.method, self.config, list(self.edits), self.parts(), tensors])

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the patch as a folder; all of it or nothing. The same patch, made again, replaces what is there.

        Raises:
            BadInput: another patch is there, and ``overwrite`` is not set; or something else, which stays.
        """
        header = {name: getattr(self, name) for name in ("kind", "method", "config", "made", "notes")}
        header |= {"base": asdict(self.base), "edits": list(self.edits), "parts": self.parts()}
        format.write(Path(path).expanduser(), header, self.all_tensors(), overwrite)

    def summary(self) -> str:
        """A few lines for a person."""
        edits = [f"  {_short(edit)}" for edit in self.edits[:3]]
        edits += [f"  and {len(self.edits) - 3} more"] if len(self.edits) > 3 else []
        seconds = f", made in {self.made['seconds']:.1f} s" if "seconds" in self.made else ""
        size = f"{format_bytes(self.nbytes)}{seconds}"
        size += "".join(f"\nfitted with {name} ({key[:12]}) on" for key, name in self.made.get("on", {}).items())
        return printable("\n".join([f"{self.method}: {self._size()}", *edits, *self.describe(), size]))

    def _size(self) -> str:
        count = f"{len(self.edits)} edit{'' if len(self.edits) == 1 else 's'}"
        return f"{count} for {self.base.name} ({self.base.fingerprint[:12]})"

    def __repr__(self) -> str:
        return printable(f"<{type(self).__name__} {self.method}: {self._size()}, {format_bytes(self.nbytes)}>")

    def _repr_html_(self) -> str:
        """The summary as a table, for notebooks."""
        rows = {
            "method": f"{self.method} ({self.kind})",
            "made for": f"{self.base.name} ({self.base.fingerprint[:12]})",
            f"{len(self.edits)} edits": "\n".join(map(_short, self.edits[:3])) + ("\n…" if len(self.edits) > 3 else ""),
            "changes": "\n".join(line.strip() for line in self.describe()),
            "size": format_bytes(self.nbytes),
        }
        cells = [[html.escape(text).replace("\n", "<br>") for text in row] for row in rows.items()]
        return f"<table>{''.join(f'<tr><th>{name}</th><td>{text}</td></tr>' for name, text in cells)}</table>"


@dataclass(eq=False)
class RunPatch(Patch):
    """A patch that acts in lmpatch's own calls (``score``, ``generate``, ``hidden``); a plain forward misses it."""

    mounts: ClassVar[tuple[Mount, ...]] = ("run",)

    @abstractmethod
    def intervention(self, lm: LM) -> Intervention:
        """What lmpatch's calls ask while it is on this model. WrongModel: it cannot act with what is installed."""

    def attach(self, lm: LM, mount: Mount, others: Sequence[Handle]) -> Handle:
        return Handle([self.intervention(lm)])


def printable(text: str) -> str:
    """Without what would steer a terminal: a file from outside may hold it in any name."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


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


def fields_for(
    lm: LM, method: str, config: Any, edits: Sequence[Any], seconds: float | None, notes: Any = None
) -> dict[str, Any]:
    """The fields of ``Patch`` for one made for ``lm`` just now.

    Args:
        config: the method's ``Config``, or a dict.
        edits: records or dicts.
        seconds: how long the fit took.
    """
    return {
        "method": method,
        "config": plain(config or {}),
        "base": Base(fingerprint(lm), lm.name),
        "edits": plain_edits(edits),
        "made": made_now(seconds),
        "notes": plain(notes or {}),
    }


def plain_edits(edits: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """Each edit as a dict of what it says; empty fields are left out."""
    return tuple({k: v for k, v in plain(edit).items() if v not in ("", [], {}, None)} for edit in edits)


def _short(edit: Mapping[str, Any]) -> str:
    if "prompt" in edit and "target" in edit:
        return f"{edit['prompt']} -> {edit['target']}"
    text = json.dumps(edit, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."
