"""Retrieval keys in memory as one growing block, searched exactly by inner product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BadInput

FIRST = 64  # rows of the first block
CHUNK = 4096  # rows whose scores are computed again at a time
MARGIN = 2.0**-8
"""Twice what rounding can move a rough score against another, as a share of |query| |key|: the query and the score are
each rounded to 11 bits, 2^-10 for one score, 2^-9 for two."""


class KeyBlock:
    """Vectors by label, in float16. A search reads the block once and computes the scores of all that might win again
    in float64: on one thread a third of the time of a float32 product, with the same result."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._keys = torch.empty(0, width, dtype=torch.float16)  # [capacity, width]
        self._labels = torch.empty(0, dtype=torch.int64)  # [capacity]
        self._empty = torch.empty(0, dtype=torch.bool)  # [capacity], True where no vector is
        self._used = 0  # rows above were never filled
        self._free: list[int] = []
        self._row: dict[int, int] = {}  # label -> row
        self._norm = 0.0  # of the longest vector there ever was

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, label: int) -> bool:
        return label in self._row

    @property
    def nbytes(self) -> int:
        """Bytes of the block, room to grow included."""
        return self._keys.nbytes + self._labels.nbytes + self._empty.nbytes

    def add(self, vectors: Tensor, labels: Sequence[int]) -> None:
        """Add vectors [n, width] of any floating dtype, rounded to float16, under n labels.

        Raises:
            BadInput: the shapes do not fit, a label is there already, or a number is not finite in float16. Nothing
                was added.
        """
        if tuple(vectors.shape) != (len(labels), self.width):
            raise BadInput(f"{len(labels)} keys of width {self.width} were expected, not {tuple(vectors.shape)}.")
        if len({*labels}) < len(labels) or any(label in self._row for label in labels):
            raise BadInput("a key with this label is in the block already. Drop it first.")
        vectors = vectors.detach().to("cpu", torch.float16)
        if not vectors.isfinite().all():
            raise BadInput("a key holds a number that is no finite float16. Look at the encoder that made it.")
        if not labels:
            return
        again = [self._free.pop() for _ in range(min(len(labels), len(self._free)))]
        rows = [*again, *range(self._used, self._used + len(labels) - len(again))]
        self._used += len(labels) - len(again)
        if self._used > len(self._keys):
            more = max(self._used, FIRST, 2 * len(self._keys)) - len(self._keys)
            self._keys = torch.cat([self._keys, self._keys.new_zeros(more, self.width)])
            self._labels = torch.cat([self._labels, self._labels.new_zeros(more)])
            self._empty = torch.cat([self._empty, self._empty.new_ones(more)])
        self._keys[rows] = vectors
        self._labels[rows] = torch.tensor(labels)
        self._empty[rows] = False
        self._row.update(zip(labels, rows, strict=True))
        self._norm = max(self._norm, float(vectors.float().norm(dim=1).max()))

    def drop(self, label: int) -> None:
        """Forget a vector, at a cost that does not grow with the block. ``BadInput``: none has this label."""
        if label not in self._row:
            raise BadInput(f"no key in the block has the label {label}.")
        row = self._row.pop(label)
        self._empty[row] = True
        self._free.append(row)

    def search(self, queries: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The ``k`` vectors with the largest inner product with each of the queries [m, width].

        Returns:
            scores [m, k'] float64 and labels [m, k'] int64, best first, k' = min(k, len(self)). Of equal scores the
            lower label comes first, so the order in which vectors were added does not show.
        Raises:
            BadInput: the width differs, or a number is not finite.
        """
        queries = queries.detach().to("cpu", torch.float32)
        if queries.ndim != 2 or queries.shape[1] != self.width or not queries.isfinite().all():
            raise BadInput(f"queries must be [m, {self.width}] finite numbers, found {tuple(queries.shape)}.")
        k = min(k, len(self))
        scores = torch.empty(len(queries), k, dtype=torch.float64)
        labels = torch.empty(len(queries), k, dtype=torch.int64)
        for i, query in enumerate(queries if k else ()):
            scores[i], labels[i] = self._best(query, k)
        return scores, labels

    def _best(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        unit = query / query.norm().clamp(min=1e-30)  # within float16, however long the query is
        rough = torch.mv(self._keys[: self._used], unit.half()).float()  # [used]
        rough.masked_fill_(self._empty[: self._used], -torch.inf)
        worst = rough.topk(k).values[-1] - MARGIN * self._norm
        near = ((rough >= worst) & ~self._empty[: self._used]).nonzero()[:, 0]  # [c]
        scores = torch.cat([inner(query, self._keys[rows]) for rows in near.split(CHUNK)])  # [c]
        labels, order = self._labels[near].sort()
        best = scores[order].sort(descending=True, stable=True).indices[:k]  # [k]
        return scores[order][best], labels[best]


def inner(query: Tensor, keys: Tensor) -> Tensor:
    """Inner products of a query [w] with keys [n, w], in float64: [n].

    Each row is summed alike, so equal keys score equally wherever they stand; a matrix product does not promise that.
    """
    return (keys.double() * query.double()).sum(-1)
