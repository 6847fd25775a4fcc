"""One file that training goes on from: tensors, and a head of words that says whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import BadInput, LmpatchError
from ..files import replacing, sync


def write(path: Path, stamp: str, head: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write the file at once or not at all.

    Args:
        stamp: what identifies the run.
    Raises:
        LmpatchError: the disk is full or cannot be written; the file before is whole.
    """
    whole = {name: t.contiguous() for name, t in tensors.items()}
    try:
        with replacing(path) as work:
            safetensors.torch.save_file(whole, work, {**head, "stamp": stamp})
            sync(work)
    except (OSError, safetensors.SafetensorError) as error:
        raise LmpatchError(
            f"{path} cannot be written ({error}). The one before is whole: free some space, and the same call goes on "
            "from it."
        ) from error


def read(path: Path, stamp: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Head and tensors of the file.

    Raises:
        BadInput: it is of another run.
    """
    with safetensors.safe_open(path, "pt") as file:
        head: dict[str, str] = file.metadata()
        if head["stamp"] != stamp:
            raise BadInput(f"{path} is of another run: other settings, data or model. Give another folder.")
        return head, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
