"""``Editor``: what a method learns once and uses for every later edit, as one safetensors file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import BadInput, BadPatch, WrongModel
from ..files import outside, replacing
from ..models.lm import LM
from ..provenance import hash_json, hash_tensors
from .base import ANY, Base, fingerprint

SCHEMA = 2  # of schema 1 the hash covers method, parts and tensors alone
KEY = "lmpatch_editor"
ON = "on"  # in a file: the hash of the editor that it is the rest of
PACKAGED = Path(__file__).parents[1] / "editors"
FIELDS = {"method": str, "config": dict, "base": dict, "parts": dict, "made": dict, "sha256": str}


@dataclass(eq=False, repr=False)
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
    on: Editor | None = None
    """An editor whose parts and tensors are among these and need not be written again: that of any model, of which a
    model's own one is the rest."""

    def hash(self) -> str:
        """SHA-256 of what it does: method, parts and tensors."""
        return hash_json([self.method, self.parts, hash_tensors(sorted(self.tensors.items()), exact=True)])

    def save(self, path: str | Path, *, whole: bool = False) -> None:
        """Write the file; a file that is there is replaced, at once or not at all.

        Args:
            whole: what ``on`` holds is written too, else its hash: the reader finds it beside the file or in lmpatch.
        """
        on = None if whole else self.on
        own = self if on is None else self._rest(on)
        head = {"schema": SCHEMA, **{name: getattr(own, name) for name in ("method", "config", "parts", "made")}}
        head |= {"base": {"fingerprint": self.base.fingerprint, "name": self.base.name}}
        head |= {} if on is None else {ON: on.hash()}
        head |= {"sha256": own._seal(head)}
        with replacing(Path(path)) as work:
            safetensors.torch.save_file(dict(own.tensors), work, {KEY: json.dumps(head, ensure_ascii=False)})

    def _rest(self, on: Editor) -> Editor:
        """Without the parts and tensors of the other."""
        parts = {name: part for name, part in self.parts.items() if name not in on.parts}
        return replace(self, parts=parts, tensors={k: t for k, t in self.tensors.items() if k not in on.tensors})

    def _seal(self, head: dict[str, Any]) -> str:
        """The hash in a file with this header: what the editor does, and every other field."""
        fields = {name: value for name, value in head.items() if name != "sha256"}
        return self.hash() if head["schema"] == 1 else hash_json([fields, self.hash()])

    def __repr__(self) -> str:
        return f"Editor({self.summary()})"

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
    head = _head(path)
    with outside(f"{path} is no editor: it is truncated, altered or something else, and", BadPatch):
        tensors = safetensors.torch.load_file(path)
    editor = Editor(head["method"], head["config"], Base(**head["base"]), head["parts"], tensors, head["made"])
    if head["sha256"] != editor._seal(head):
        raise BadPatch(f"{path} was altered: it does not match its own hash. Take a fresh copy.")
    return joined(editor, _by_hash(head[ON], path)) if ON in head else editor


def joined(editor: Editor, on: Editor) -> Editor:
    """The editor with the parts and tensors of the one it is the rest of."""
    return replace(editor, parts=on.parts | editor.parts, tensors=on.tensors | editor.tensors, on=on)


def _by_hash(wanted: Any, needed_by: Path) -> Editor:
    """The editor of any model with this hash, beside the file or in a package."""
    for path in [*sorted(needed_by.parent.glob("*.safetensors")), *_files()]:
        if path != needed_by and path.is_file() and _fits_all(path):
            found = load_editor(path)
            if found.hash() == wanted:
                return found
    raise BadPatch(
        f"{needed_by} is the rest of another editor ({str(wanted)[:12]}), which neither lies beside it nor comes with "
        "lmpatch. Put it there."
    )


def _fits_all(path: Path) -> bool:
    try:
        return bool(_head(path)["base"]["fingerprint"] == ANY.fingerprint)
    except BadPatch:
        return False


def find_editor(method: str, lm: LM | None, editor: Editor | str | Path | None = None) -> Editor:
    """The editor of a method for this very model, or else for any model.

    Args:
        lm: None: for any model.
        editor: one that is at hand, the path of its file, or of a folder of editor files. None: the package and
            installed packages are searched. A package offers a folder of editor files through the entry-point group
            ``lmpatch.editors``: ``mine = "my_package.editors"``.
    Raises:
        BadInput: there is none.
        BadPatch: the file is no editor, or of another method.
        WrongModel: it was trained for another model.
    """
    folder = Path(editor) if editor is not None and not isinstance(editor, Editor) else None
    if editor is not None and not (folder and folder.is_dir()):
        chosen = editor if isinstance(editor, Editor) else load_editor(editor)
        if chosen.method != method:
            raise BadPatch(f"this is an editor of {chosen.method}, {method} was asked for. Give one of {method}.")
        if lm is not None and not chosen.base.any_model and chosen.base.fingerprint != fingerprint(lm):
            raise WrongModel(
                f"the editor was trained for {chosen.base.name} ({chosen.base.fingerprint[:12]}), this is {lm.name} "
                f"({fingerprint(lm)[:12]}). Train one for this model."
            )
        return chosen
    heads = {path: _head(path) for path in (sorted(folder.glob("*.safetensors")) if folder else _files())}
    for base in (fingerprint(lm), ANY.fingerprint) if lm else (ANY.fingerprint,):
        for path, head in heads.items():
            if head["method"] == method and head["base"]["fingerprint"] == base:
                return load_editor(path)
    name = lm.name if lm else ANY.name
    where = f"is in {editor}" if editor is not None else "comes with lmpatch or an installed package"
    raise BadInput(
        f"no {method} editor for {name} {where}. Train one (lmpatch train MODEL {method} FACTS -o EDITOR) and pass it "
        "(--editor EDITOR, editor=)."
    )


def _files() -> Iterator[Path]:
    """The editor files of the package and of every package that offers some."""
    yield from sorted(PACKAGED.glob("*.safetensors"))
    for point in sorted(entry_points(group="lmpatch.editors"), key=lambda point: point.name):
        spec = importlib.util.find_spec(point.value)
        for place in (spec.submodule_search_locations or []) if spec else []:
            yield from sorted(Path(place).glob("*.safetensors"))


def _head(path: Path) -> dict[str, Any]:
    """The words of an editor file, once their form is right; the tensors are not read."""
    if path.exists() and not path.is_file():
        raise BadPatch(f"{path} is no editor: an editor is an ordinary file.")
    with (
        outside(f"{path} is no editor: it is truncated, altered or something else, and", BadPatch),
        safetensors.safe_open(path, "pt") as file,
    ):
        metadata = file.metadata() or {}
        if KEY not in metadata:
            raise BadPatch(f"{path} is a safetensors file but no editor of lmpatch.")
        head = json.loads(metadata[KEY])
        if not isinstance(head, dict) or head.get("schema") not in (1, SCHEMA):
            found = head.get("schema") if isinstance(head, dict) else None
            raise BadPatch(f"{path} has schema {found!r}, this lmpatch reads 1 and {SCHEMA}. Update lmpatch.")
        if any(not isinstance(head.get(name), form) for name, form in FIELDS.items()) or not {
            "fingerprint", "name"
        } <= set(head["base"]) <= {"fingerprint", "name", "touched"}:  # fmt: skip
            raise BadPatch(f"{path} was altered: its header is not as lmpatch writes it. Take a fresh copy.")
        return head
