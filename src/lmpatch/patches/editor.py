"""``Editor``: what a method learns once and uses for every later edit, as one safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import BadPatch
from ..files import replacing
from ..provenance import hash_json, hash_tensors
from .patch import Base

SCHEMA = 1
KEY = "lmpatch_editor"


@dataclass(eq=False)
class Editor:
    """A value: tensors and plain JSON. ``config``, ``parts`` and ``made`` as in ``Patch``."""

    method: str
    config: dict[str, Any]
    """How it was trained."""
    base: Base
    """The language model it was trained for."""
    parts: dict[str, Any]
    """What its tensors are: enough to build the network again."""
    tensors: dict[str, Tensor]
    made: dict[str, Any] = field(default_factory=dict)

    def hash(self) -> str:
        """SHA-256 of what it does: method, parts and tensors."""
        return hash_json([self.method, self.parts, hash_tensors(sorted(self.tensors.items()), exact=True)])

    def save(self, path: str | Path) -> None:
        """Write the file; a file that is there is replaced, at once or not at all."""
        head = {"schema": SCHEMA, "method": self.method, "config": self.config, "parts": self.parts, "made": self.made}
        head |= {"base": {"fingerprint": self.base.fingerprint, "name": self.base.name}, "sha256": self.hash()}
        with replacing(Path(path)) as work:
            safetensors.torch.save_file(dict(self.tensors), work, {KEY: json.dumps(head, ensure_ascii=False)})

    def summary(self) -> str:
        """A few lines for a person."""
        size = sum(t.nbytes for t in self.tensors.values()) / 2**20
        steps = f", {self.made['steps']} steps" if "steps" in self.made else ""
        return f"{self.method} editor for {self.base.name} ({self.base.fingerprint[:12]}): {size:.1f} MiB{steps}"


def load_editor(path: str | Path) -> Editor:
    """Read an editor file.

    Raises:
        BadPatch: it is none, truncated or altered.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            head = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise BadPatch(f"there is no editor {path}.") from None
    except KeyError:
        raise BadPatch(f"{path} is a safetensors file but no editor of lmpatch.") from None
    except Exception as error:  # the reader raises classes of its own
        raise BadPatch(f"{path} is no editor: it is truncated, altered or something else ({error}).") from None
    if head.get("schema") != SCHEMA:
        raise BadPatch(f"{path} has schema {head.get('schema')!r}, this lmpatch reads {SCHEMA}. Update lmpatch.")
    made = Editor(head["method"], head["config"], Base(**head["base"]), head["parts"], tensors, head["made"])
    if made.hash() != head["sha256"]:
        raise BadPatch(f"{path} was altered: it does not match its own hash. Take a fresh copy.")
    return made
