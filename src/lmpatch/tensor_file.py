"""A safetensors file with a head of words, and inside it the hash of both: what lmpatch keeps for itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from .errors import BadPatch, LmpatchError
from .files import outside, read_bytes, replacing, sync
from .provenance import hash_json, hash_tensors

SEAL = "sha256"


def write(path: Path, head: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write the file at once or not at all, and have it on the disk.

    Raises:
        CannotWrite: the disk is full, or refuses; the file before is whole.
    """
    whole = {name: t.detach().contiguous() for name, t in tensors.items()}
    with replacing(path) as work:
        safetensors.torch.save_file(whole, work, {**head, SEAL: _seal(head, whole)})
        sync(work)


def read(path: Path, error: type[LmpatchError] = BadPatch) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Head and tensors of a file that ``write`` wrote.

    Raises:
        error: there is none, or it is truncated, altered or something else.
    """
    data = read_bytes(path, error=error)
    with outside(str(path), error):
        head = dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"])
        tensors = safetensors.torch.load(data)
    if head.pop(SEAL, None) != _seal(head, tensors):
        raise error(f"{path} was altered: it does not match its own hash. Remove it, or take a fresh copy.")
    return head, tensors


def _seal(head: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    return hash_json([dict(head), hash_tensors(sorted(tensors.items()), exact=True)])
