"""The bytes of a patch: ``patch.safetensors`` holds the tensors, ``patch.json`` everything else and the hash of both.

Nothing is ever unpickled, and everything is checked before anything is returned. Nothing here knows a kind of patch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..errors import BadInput, BadPatch
from ..files import new_folder, outside, read_bytes
from ..provenance import hash_json
from ..resources import free_bytes

SCHEMA = 1
FIELDS = {
    "schema": int, "kind": str, "method": str, "config": dict, "base": dict, "edits": list, "made": dict,
    "notes": dict, "parts": dict, "tensors_sha256": str, "sha256": str,
}  # fmt: skip
CONTENT = ("kind", "method", "config", "edits", "parts", "tensors_sha256")  # as in ``Patch.hash``
DEPTH = 100  # levels of the header
TENSORS, HEADER = "patch.safetensors", "patch.json"
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def write(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], overwrite: bool = False) -> None:
    """Write a patch folder; all of it or nothing. A patch of other ``CONTENT`` is replaced with ``overwrite`` alone.

    Args:
        header: ``FIELDS`` but for the schema and the hashes.
    Raises:
        BadInput: something else is there.
    """
    data = safetensors.torch.save({n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()})
    whole = {"schema": SCHEMA, **header, "tensors_sha256": hashlib.sha256(data).hexdigest()}
    if not overwrite and (path / HEADER).exists() and not _holds(path, whole):
        raise BadInput(f"{path} holds another patch. Give another path, or replace it: save(path, overwrite=True).")
    with new_folder(path, replace=(TENSORS, HEADER)) as folder:
        (folder / TENSORS).write_bytes(data)
        (folder / HEADER).write_bytes(sealed(whole))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a patch folder.

    Raises:
        BadPatch: there is none, or it is truncated, altered or of an unknown schema.
    """
    files = [path] if path.is_file() else list(path.glob("*")) if path.is_dir() else []
    if pickles := [file.name for file in files if file.suffix.lower() in PICKLES]:
        raise BadPatch(f"{path} holds {', '.join(pickles)}: pickles, which could run code. lmpatch never unpickles.")
    if files == [path]:
        _bytes(path)
        raise BadPatch(f"{path} is a file. A patch is a folder with {HEADER} and {TENSORS}.")
    where, raw, data = path / HEADER, _bytes(path / HEADER), _bytes(path / TENSORS)
    with outside(f"{where} is truncated or was altered: it", BadPatch):
        header = json.loads(raw.decode())
        level = [header]
        for _ in range(DEPTH):  # json itself fails at about a thousand, sooner in some calls than in others
            lists = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
            level = [value for values in lists for value in values]
        if level:
            raise BadPatch(f"{where} is nested deeper than the {DEPTH} levels lmpatch writes. Take a fresh copy.")
        if not isinstance(header, dict) or "schema" not in header:
            raise BadPatch(f"{where} is no patch: it names no schema.")
        if header["schema"] != SCHEMA:
            raise BadPatch(f"{where} has schema {header['schema']!r}, this lmpatch reads {SCHEMA}. Update lmpatch.")
        if sealed(header) != raw:
            raise BadPatch(f"{where} was altered: it does not match its own hash. Take a fresh copy.")
    wrong = [name for name, form in FIELDS.items() if not isinstance(header.get(name), form)]
    if wrong or set(header) != set(FIELDS):
        raise BadPatch(f"{where} is not as lmpatch writes it: {wrong or sorted(set(header) - set(FIELDS))}.")
    made, notes = header["made"], header["notes"]
    norms, on = made.get("weight_norms", {}), made.get("on", {})
    values = norms.values() if isinstance(norms, dict) and isinstance(on, dict) else [""]
    numbers = [made.get("seconds", 0), notes.get("strength", 1), *values]
    if not all(type(n) is float or (type(n) is int and abs(n) < 2**63) for n in numbers):
        raise BadPatch(f"{where} is not as lmpatch writes it: seconds, norms, strength are no numbers, or on no names.")
    if hashlib.sha256(data).hexdigest() != header["tensors_sha256"]:
        raise BadPatch(f"{path / TENSORS} is truncated or was altered. Take a fresh copy.")
    with outside(f"{path / TENSORS} is no safetensors file: it", BadPatch):
        return header, safetensors.torch.load(data)


def sealed(header: Mapping[str, Any]) -> bytes:
    """The bytes of ``patch.json``: the header and its hash, always spaced the same, so that a changed blank shows."""
    content = {key: value for key, value in header.items() if key != "sha256"}
    whole = {**content, "sha256": hash_json(content)}
    return (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode()


def _holds(path: Path, header: Mapping[str, Any]) -> bool:
    """A whole patch of the same content is there."""
    with suppress(BadPatch):
        old, new = (hash_json([one[name] for name in CONTENT]) for one in (read(path)[0], header))
        return old == new
    return False


def _bytes(path: Path) -> bytes:
    data = read_bytes(path, f"no patch in {path.parent}:", BadPatch, limit=free_bytes(torch.device("cpu")))
    pickled = data[:4] == b"PK\x03\x04" or (data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))
    if pickled and data[8:9] != b"{":  # safetensors begins with a length, which may look like a pickle, and then {
        raise BadPatch(f"{path} is a pickle, which could run code. lmpatch never unpickles.")
    return data
