"""Running mean and variance of rows that come in commits, and rows normalised by them.

Each commit's own statistics are a value. Those of several commits join exactly, in any order, so a patch carries its
own and a later fit joins those of the patches that are on the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-6  # of the mean variance: below it a direction counts as unused


@dataclass(frozen=True)
class Statistics:
    """Of rows [n, k]: how many, their mean, and their scatter about it, in fp64."""

    count: float
    mean: Tensor
    """[k]"""
    scatter: Tensor
    """[k] sum of (x - mean)², or [k, k] sum of (x - mean)(x - mean)ᵀ."""

    @classmethod
    def of(cls, rows: Tensor, *, full: bool = False) -> Statistics:
        """Those of rows [n, k], n from 1. ``full``: with all products of two entries."""
        x = rows.double()
        mean = x.mean(0)
        centred = x - mean
        return cls(float(len(x)), mean, centred.T @ centred if full else centred.square().sum(0))

    @classmethod
    def joined(cls, parts: Sequence[Statistics]) -> Statistics:
        """Those of the rows of all parts together, as if they had come at once.

        Source: Chan, Golub and LeVeque 1979, the pairwise update of sums of squares.
        """
        counts = torch.tensor([part.count for part in parts], dtype=torch.float64, device=parts[0].mean.device)
        means = torch.stack([part.mean for part in parts])  # [c, k]
        total = float(counts.sum())
        mean = counts @ means / total
        off = (means - mean) * counts.sqrt()[:, None]
        between = off.T @ off if parts[0].scatter.ndim == 2 else off.square().sum(0)
        within = torch.zeros_like(between)
        for part in parts:
            within += part.scatter
        return cls(total, mean, within + between)

    def diagonal(self) -> Statistics:
        """The same without products of two entries."""
        whole = self.scatter.ndim == 2
        return Statistics(self.count, self.mean, self.scatter.diagonal()) if whole else self

    @property
    def variance(self) -> Tensor:
        """[k] with n - 1 below."""
        return self.diagonal().scatter / max(self.count - 1, 1)

    def normalise(self, rows: Tensor) -> Tensor:
        """(x - mean) over the spread, entry by entry, [n, k] fp64; entries that never vary are zero."""
        variance = self.variance
        floor = FLOOR * variance.mean().clamp(min=torch.finfo(torch.float64).tiny)
        return (rows.double() - self.mean) / variance.clamp(min=floor).sqrt()

    def whiten(self, rows: Tensor) -> Tensor:
        """(x - mean) Σ^(-1/2), [n, k] fp64, with Σ = scatter / (n - k - 1); entry by entry while n is not above k + 1.

        Source: StableEdit (arXiv:2605.11836).
        Differs: eigenvalues are held above a share of their mean, not above a number of their units.
        """
        free = self.count - len(self.mean) - 1
        if free <= 0 or self.scatter.ndim < 2:
            return self.normalise(rows)
        values, vectors = torch.linalg.eigh(self.scatter / free)
        root = values.clamp(min=FLOOR * float(values.mean())).rsqrt()
        out: Tensor = (rows.double() - self.mean) @ (vectors * root) @ vectors.T
        return out

    def row(self) -> Tensor:
        """As one row of a patch's extras, [1, 1 + k + k] or [1, 1 + k + k²] fp32."""
        return torch.cat([self.mean.new_tensor([self.count]), self.mean, self.scatter.reshape(-1)])[None].float()

    @classmethod
    def from_rows(cls, rows: Iterable[Tensor], width: int) -> list[Statistics]:
        """The inverse of ``row`` for each of the rows, of statistics of that many entries."""
        out = []
        for row in rows:
            count, mean, scatter = row.double().split([1, width, len(row) - 1 - width])
            out.append(cls(float(count), mean, scatter.reshape(width, width) if len(scatter) > width else scatter))
        return out
