"""Patches as folders: ``patch.safetensors`` holds the tensors, ``patch.json`` everything else and the hash of both.

Nothing is ever unpickled. Loading checks everything before it returns anything.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ..errors import BadPatch
from ..files import new_folder
from ..provenance import hash_json
from .decode.patch import DecodePatch
from .hook.patch import SteerPatch
from .memory.patch import MemoryPatch
from .patch import Base, Patch
from .weight.patch import WeightPatch

SCHEMA = 1
KINDS: dict[str, type[Patch]] = {cls.kind: cls for cls in (WeightPatch, MemoryPatch, DecodePatch, SteerPatch)}
FIELDS = {
    "schema": int, "kind": str, "method": str, "config": dict, "base": dict, "edits": list, "made": dict,
    "notes": dict, "parts": dict, "tensors_sha256": str, "sha256": str,
}  # fmt: skip
TENSORS, HEADER = "patch.safetensors", "patch.json"
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def save_patch(patch: Patch, path: Path) -> None:
    """Write a patch folder; all of it or nothing. See ``Patch.save``."""
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in patch.all_tensors().items()}
    data = safetensors.torch.save(tensors)
    header: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": patch.kind,
        "method": patch.method,
        "config": patch.config,
        "base": {"fingerprint": patch.base.fingerprint, "name": patch.base.name, "touched": patch.base.touched},
        "edits": list(patch.edits),
        "made": patch.made,
        "notes": patch.notes,
        "parts": patch.parts(),
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    with new_folder(path, replace=(TENSORS, HEADER)) as folder:
        (folder / TENSORS).write_bytes(data)
        (folder / HEADER).write_bytes(sealed(header))


def load_patch(path: str | Path) -> Patch:
    """Read a patch folder.

    Raises:
        BadPatch: there is none, or it is truncated, altered, of an unknown kind or schema, or holds numbers that are
            not finite.
    """
    path = Path(path)
    _refuse_pickles(path)
    raw, data = _read(path / HEADER), _read(path / TENSORS)
    header = _header(path, raw)
    if hashlib.sha256(data).hexdigest() != header["tensors_sha256"]:
        raise BadPatch(f"{path / TENSORS} is truncated or was altered. Take a fresh copy.")
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the reader raises classes of its own, and ValueError, TypeError, KeyError
        raise BadPatch(f"{path / TENSORS} is no safetensors file ({error}).") from None
    extras = {name.removeprefix("extra/"): t for name, t in tensors.items() if name.startswith("extra/")}
    own: dict[str, Tensor] = {name: t for name, t in tensors.items() if not name.startswith("extra/")}
    common = {name: header[name] for name in ("method", "config", "made", "notes")}
    try:
        return KINDS[header["kind"]].from_parts(
            header["parts"],
            own,
            **common,
            base=_base(header["base"]),
            edits=tuple(dict(edit) for edit in header["edits"]),
            extras=extras,
        )
    except BadPatch as error:
        raise BadPatch(f"{path} is no usable patch: {error}") from None
    except (TypeError, ValueError) as error:  # an edit that is no dict
        raise BadPatch(f"{path / HEADER} is not as lmpatch writes it ({error}).") from None


def sealed(header: dict[str, Any]) -> bytes:
    """The bytes of ``patch.json``: the header and its hash, always spaced the same, so that a changed blank shows."""
    content = {key: value for key, value in header.items() if key != "sha256"}
    whole = {**content, "sha256": hash_json(content)}
    return (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode()


def _header(path: Path, raw: bytes) -> dict[str, Any]:
    where = path / HEADER
    try:
        header = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise BadPatch(f"{where} is truncated or was altered: it is no JSON ({error}).") from None
    if not isinstance(header, dict) or "schema" not in header:
        raise BadPatch(f"{where} is no patch: it names no schema.")
    if header["schema"] != SCHEMA:
        raise BadPatch(f"{where} has schema {header['schema']!r}, this lmpatch reads {SCHEMA}. Update lmpatch.")
    if sealed(header) != raw:
        raise BadPatch(f"{where} was altered: it does not match its own hash. Take a fresh copy.")
    wrong = [name for name, form in FIELDS.items() if not isinstance(header.get(name), form)]
    if wrong or set(header) != set(FIELDS):
        raise BadPatch(f"{where} is not as lmpatch writes it: {wrong or sorted(set(header) - set(FIELDS))}.")
    if header["kind"] not in KINDS:
        raise BadPatch(f"{where} is of kind {header['kind']!r}, this lmpatch knows {sorted(KINDS)}. Update lmpatch.")
    return header


def _base(base: dict[str, Any]) -> Base:
    touched = base.get("touched")
    texts = [base.get("fingerprint"), base.get("name"), *(touched.values() if isinstance(touched, dict) else [None])]
    if set(base) != {"fingerprint", "name", "touched"} or not all(isinstance(t, str) for t in texts):
        raise BadPatch("it does not say which model it was made for.")
    return Base(**base)


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadPatch(f"no patch in {path.parent}: {path.name} cannot be read ({error.strerror}).") from None
    pickled = data[:4] == b"PK\x03\x04" or (data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))
    if pickled and data[8:9] != b"{":  # safetensors begins with a length, which may look like a pickle, and then {
        raise BadPatch(f"{path} is a pickle, which could run code. lmpatch never unpickles.")
    return data


def _refuse_pickles(path: Path) -> None:
    there = [path] if path.is_file() else list(path.glob("*")) if path.is_dir() else []
    pickles = [p.name for p in there if p.suffix.lower() in PICKLES]
    if pickles:
        raise BadPatch(f"{path} holds {', '.join(pickles)}: pickles, which could run code. lmpatch never unpickles.")
    if path.is_file():
        _read(path)
        raise BadPatch(f"{path} is a file. A patch is a folder with {HEADER} and {TENSORS}.")
