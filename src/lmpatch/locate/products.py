"""Products in bf16 inside a model of fp32, where the processor is faster in them.

Some processors multiply bf16 several times as fast as fp32, others 30 times as slowly, so what pays is measured. The
weights of the blocks are rounded once for a whole search; sums, norms and everything else stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..models.lm import LM

log = logging.getLogger(__name__)

PAYS = 1.2  # fp32 seconds over bf16 seconds from which bf16 is chosen


@lru_cache
def bf16_gain(device: str, rows: int = 128, width: int = 768) -> float:
    """Seconds of a product in fp32 over those in bf16, measured once a process; a few milliseconds."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (torch.ones(n, width, dtype=dtype, device=device) for n in (rows, width))
        times = []
        for _ in range(4):  # the first call of a kind prepares it
            start = perf_counter()
            float(F.linear(x, w)[0, 0])  # waits for the device
            times.append(perf_counter() - start)
        seconds.append(min(times[1:]))
    return seconds[0] / seconds[1]


@contextmanager
def products(lm: LM, kind: Literal["model", "bf16", "auto"]) -> Iterator[None]:
    """The blocks' products inside are computed in bf16, gradients included: if asked, or with ``auto`` if it pays.

    Nothing changes for a model that is not fp32.
    """
    gain = 0.0 if kind == "model" or lm.dtype != torch.float32 else bf16_gain(str(lm.device))
    if kind == "bf16" and 0 < gain < 1:
        log.warning("products in bf16 are %.1f times slower than in fp32 here. products='auto' measures.", 1 / gain)
    if not gain or (kind == "auto" and gain < PAYS):
        yield
        return
    names = lm.layout.blocks
    with _Rounded([p for name in names for p in lm.module(name).parameters() if p.ndim == 2]):
        yield


class _Rounded(TorchFunctionMode):
    """Linear layers with one of these weights multiply in bf16."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.weights = {id(w): w for w in weights}
        self.rounded: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and func is F.linear and id(args[1]) in self.weights:
            x, w, *bias = args
            out = F.linear(x.bfloat16(), self._weight(w)).to(x.dtype)
            return out if not bias or bias[0] is None else out + bias[0]
        if not kwargs and func is torch.addmm and id(args[2]) in self.weights:  # GPT-2's
            bias, x, w = args
            return (x.bfloat16() @ self._weight(w)).to(x.dtype) + bias
        return func(*args, **(kwargs or {}))

    def _weight(self, w: Tensor) -> Tensor:
        if id(w) not in self.rounded:
            self.rounded[id(w)] = w.detach().bfloat16()
        return self.rounded[id(w)]
