"""The device a model goes to, the number format it is read in, and how fast this processor is in each.

Products in bf16 are several times faster than in fp32 on processors with instructions for them and tens of times slower
on those without, and no flag of a processor says which of its paths a build of torch takes. So both are timed.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = (64, 128, 256, 512)
"""Edges of the square products, the small ones first, so that a format that crawls is known before it costs time."""
SPAN = 0.01  # seconds of each measurement
WAIT = 0.1  # seconds: the next size is left out if it would take longer


def best_device() -> torch.device:
    """``cuda`` if there is one, else ``mps``, else ``cpu``."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a card that computes in it, else fp32; on ``cpu`` always, so that a result depends on no processor."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if able else torch.float32


@cache
def rates() -> dict[str, float]:
    """GFLOP/s of the processor by number format, ``float32`` and ``bfloat16``, measured once in a fifth of a second."""
    return {name: rate(dtype) for name, dtype in FORMATS.items()}


def warn_if_slow(dtype: torch.dtype, device: torch.device) -> None:
    """Say so, by a ``UserWarning``, when bf16 was asked for on a processor that is slower in it than in fp32."""
    if dtype is not torch.bfloat16 or device.type != "cpu":
        return
    slower = rates()["float32"] / rates()["bfloat16"]
    if slower > 1.0:
        times = f"{slower:.0f}" if slower >= 10 else f"{slower:.1f}"
        warnings.warn(
            f"bf16 products run {times} times slower than fp32 on this processor; --dtype float32 is faster.",
            stacklevel=2,
        )


def processor_name() -> str:
    """The model's name as people know it, or the architecture where the system does not say."""
    listed = Path("/proc/cpuinfo")
    text = listed.read_text(encoding="utf-8", errors="replace") if listed.is_file() else ""
    named = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def rate(
    dtype: torch.dtype,
    clock: Callable[[], float] = perf_counter,
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm,
) -> float:
    """GFLOP/s of square products, at the largest of ``SIZES`` that fits into ``WAIT``; ``clock`` gives seconds.

    The fastest call counts, of as many as fit into ``SPAN``: what else runs can only make one slower.
    """
    speed = 0.0
    for size in SIZES:
        work = 2 * size**3  # multiplications and additions
        if speed and work > speed * WAIT:
            break
        a = torch.full((size, size), 0.5, dtype=dtype)
        product(a, a)  # the first call chooses a kernel
        begun = start = clock()
        best = float("inf")
        while start - begun < SPAN:
            product(a, a)
            end = clock()
            best, start = min(best, end - start), end
        speed = work / max(best, 1e-9)
    return speed / 1e9
