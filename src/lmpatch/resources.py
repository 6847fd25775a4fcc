"""How much memory is free, and an error before a run that would not fit."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .errors import NotEnoughMemory


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device, within the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, min([_available(), *_container()]))


def require_memory(need: int, device: torch.device, what: str) -> None:
    """Raise ``NotEnoughMemory`` when ``need`` bytes are more than is free.

    Args:
        what: who needs it, the subject of the message: ``"memit with 1000 edits"``.
    """
    free = free_bytes(device)
    if need > free:
        raise NotEnoughMemory(
            f"{what} needs about {format_bytes(need)} on {device}; {format_bytes(free)} is free. "
            "Give fewer facts at a time, load the model with dtype bfloat16, or use a larger machine."
        )


def format_bytes(count: int) -> str:
    """Bytes as a person reads them, in powers of 1024."""
    if count < 1024:
        return f"{count} B"
    power = 1 if count < 2**20 else 2 if count < 2**30 else 3
    return f"{count / 1024**power:.1f} {' KMG'[power]}iB"


def _available() -> int:
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kib[0] * 1024 if kib else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container() -> list[int]:
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not (limit.is_file() and used.is_file() and limit.read_text().strip().isdigit()):
        return []
    return [int(limit.read_text()) - int(used.read_text())]
