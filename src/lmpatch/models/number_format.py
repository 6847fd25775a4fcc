"""The device and the number format a model is fastest in, measured once on each machine.

Products in bf16 are several times faster than in fp32 on processors with instructions for them and tens of times slower
on those without, and no flag of a processor says which of its paths a build of torch takes. So both are timed.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from ..files import cache_dir, replacing
from ..provenance import hash_json, versions

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = (64, 128, 256, 512)
"""Edges of the square products, the small ones first, so that a format that crawls is known before it costs time."""
SPAN = 0.01  # seconds of each measurement
WAIT = 0.1  # seconds: the next size is left out if it would take longer
CLEAR = 1.5  # times as fast as fp32: below, half the digits are no good bargain

Clock = Callable[[], float]


def best_device() -> torch.device:
    """``cuda`` if there is one, else ``mps``, else ``cpu``."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def fastest_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """The format to load a model in when none was asked for.

    Args:
        device: on ``cuda`` bf16 if the card computes in it; on ``cpu`` bf16 if it was measured to be more than
            ``CLEAR`` times as fast; elsewhere fp32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if kind != "cpu":
        return torch.float32
    speed = rates()
    return torch.bfloat16 if speed["bfloat16"] > CLEAR * speed["float32"] else torch.float32


def rates() -> dict[str, float]:
    """GFLOP/s of the processor by number format, ``float32`` and ``bfloat16``.

    Measured at the first call, in a fifth of a second, and kept in the cache folder by processor, version of torch and
    number of threads.
    """
    path = cache_dir() / "rates" / f"{hash_json(machine())[:16]}.json"
    if (kept := _kept(path)) is not None:
        return kept
    found = {name: rate(dtype) for name, dtype in FORMATS.items()}
    try:
        with replacing(path) as work:
            work.write_text(json.dumps(machine() | {"gflops": found}, indent=1), encoding="utf-8")
    except OSError:  # a cache folder that cannot be written costs the next process its measurement, no more
        pass
    return found


def warn_if_slow(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Say so when bf16 was asked for on a processor that is slower in it than in fp32.

    A ``UserWarning``, not a line of a log: it is about what the caller just wrote, is shown without any set-up, once
    per place, and can be silenced or made an error by its text.
    """
    if dtype is not torch.bfloat16 or torch.device(device).type != "cpu":
        return
    speed = rates()
    slower = speed["float32"] / speed["bfloat16"]
    if slower > 1.0:
        times = f"{slower:.0f}" if slower >= 10 else f"{slower:.1f}"
        warnings.warn(
            f"bf16 products run {times} times slower than fp32 on this processor; --dtype float32 is faster.",
            stacklevel=2,
        )


def machine() -> dict[str, str | int]:
    """What a measurement holds for."""
    return {"processor": processor(), "torch": versions()["torch"], "threads": torch.get_num_threads()}


def processor() -> str:
    """The model's name and instructions as the system gives them, or at least the architecture.

    The instructions count: behind one name, a virtual machine may hide some.
    """
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines() if listed.is_file() else []
    first: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    named = [first[key] for key in ("model name", "flags", "Features") if first.get(key)]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *(named or [platform.machine(), platform.processor()])])


def processor_name() -> str:
    """The model's name as people know it, or the architecture where the system does not say."""
    listed = Path("/proc/cpuinfo")
    text = listed.read_text(encoding="utf-8", errors="replace") if listed.is_file() else ""
    named = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def rate(
    dtype: torch.dtype, clock: Clock = perf_counter, product: Callable[[Tensor, Tensor], Tensor] = torch.mm
) -> float:
    """GFLOP/s of square products, at the largest of ``SIZES`` that fits into ``WAIT``.

    Args:
        clock: gives seconds.
        product: what is timed.
    """
    speed = 0.0
    for size in SIZES:
        work = 2 * size**3  # multiplications and additions
        if speed and work > speed * WAIT:
            break
        a = torch.full((size, size), 0.5, dtype=dtype)
        product(a, a)  # the first call chooses a kernel
        speed = work / _seconds(lambda: product(a, a), clock)  # noqa: B023
    return speed / 1e9


def _seconds(call: Callable[[], object], clock: Clock) -> float:
    """Shortest time of one call, of as many as fit into ``SPAN``: what else runs can only make it longer."""
    begun, best = clock(), float("inf")
    while True:
        start = clock()
        call()
        end = clock()
        best = min(best, end - start)
        if end - begun >= SPAN:
            return max(best, 1e-9)


def _kept(path: Path) -> dict[str, float] | None:
    """An earlier measurement; None if there is none or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["gflops"]
        kept = {name: float(found[name]) for name in FORMATS}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if all(0 < value < float("inf") for value in kept.values()) else None
