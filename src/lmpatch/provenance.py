"""How a number or a patch was made: hashes, versions, clock; how its file is written. Imports without torch."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("lmpatch", "torch", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Name → version of Python and of every package that can move a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """The machine a time was taken on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "gpu": gpu}


def now() -> str:
    """UTC time stamp, seconds, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def made_now(seconds: float | None = None) -> dict[str, Any]:
    """``Patch.made`` of what is finished at this moment; ``seconds``: how long it took, if that was measured."""
    found = {"finished": now(), "versions": versions(), "hardware": hardware()}
    return found if seconds is None else found | {"seconds": round(seconds, 3)}


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def hash_tensors(named: Iterable[tuple[str, Tensor]], *, exact: bool = False) -> str:
    """SHA-256 over names, shapes and values.

    Args:
        named: (name, tensor) in a fixed order.
        exact: hash the stored bytes and dtype; otherwise floating tensors are rounded to bf16 first, so copies
            of one model in fp32 and bf16 hash alike.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in named:
        value = tensor.detach()
        if not exact and value.is_floating_point():
            value = value.to(torch.bfloat16)
        digest.update(f"{name}|{tuple(value.shape)}|{value.dtype if exact else ''}|".encode())
        digest.update(value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_tensor(tensor: Tensor, *, exact: bool = False) -> str:
    """SHA-256 of one tensor, see ``hash_tensors``."""
    return hash_tensors([("", tensor)], exact=exact)
