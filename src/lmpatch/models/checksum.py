"""A number that tells whether a weight was written, several times faster than a hash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PIECE = 2**20
"""Words that are summed at once."""
Run = Callable[[Callable[[Tensor], Tensor], Iterable[Tensor]], Iterable[Tensor]]
"""Calls a function for each piece: ``map``, or one on several threads."""


def checksum(stored: Tensor, run: Run = map) -> int:
    """The sum of a tensor's bits, each word times an odd number of its place, modulo 2^64.

    One changed number always shows. Of other writes, also those that keep every row's and column's sum, one in about
    2^64 does not.
    """
    rows = stored.detach().reshape(len(stored) if stored.ndim else 1, -1).contiguous()  # a vector is a column
    if not rows.numel():
        return 0
    size, width = rows.element_size(), rows.shape[1]
    whole = width * size % 8 == 0 and rows.storage_offset() * size % 8 == 0
    bits = rows.view(torch.int64 if whole else BITS[size])
    keys = _keys(bits.shape[1], 0).to(bits.device)
    sums = run(partial(_sums, keys=keys), bits.split(max(1, PIECE // bits.shape[1])))
    return int((torch.cat([*sums]) * _keys(len(rows), 1).to(bits.device)).sum())


def checksums(stored: Mapping[Any, Tensor]) -> dict[Any, int]:
    """The checksum of each tensor. PyTorch multiplies integers on one thread, so here the pieces share several."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return {name: checksum(tensor, pool.map) for name, tensor in stored.items()}


def _sums(bits: Tensor, keys: Tensor) -> Tensor:
    """The sum of each row [n] of words [n, width] times keys."""
    words = bits.long()  # no copy of words of eight bytes
    return words @ keys if words.device.type == "cpu" else (words * keys).sum(1)


@lru_cache(maxsize=64)
def _keys(count: int, seed: int) -> Tensor:
    """Odd numbers, [count] int64."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed)) | 1
