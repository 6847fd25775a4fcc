"""Factorisations of second moments, computed once: the Cholesky factor and the eigenvectors lie beside them in the
cache, under the hash of the matrix they are of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import replacing
from ..provenance import hash_json, hash_tensor
from .covariance import Covariance, cache_folder
from .solve import JITTER, eigenvectors, factor


def cholesky(
    moments: Covariance, layer: int, device: torch.device, *, weight: float = 1.0, ridge: float = 0.0
) -> Tensor:
    """Cholesky factor of weight · C + (ridge + jitter) · weight · tr(C)/f · I, see ``solve.factor``.

    Args:
        ridge: share of the mean eigenvalue that is added to all.
    Returns:
        [f, f] lower triangular, fp64, on ``device``.
    """

    def compute(c: Tensor) -> Tensor:
        weighted = c.double() if weight == 1.0 else weight * c.double()
        if ridge:
            weighted = weighted + ridge * weighted.diagonal().mean() * torch.eye(len(c), device=c.device)
        return factor(weighted)

    return _once(moments, layer, device, ["cholesky", weight, ridge, JITTER], compute)


def null_space(moments: Covariance, layer: int, device: torch.device, share: float) -> Tensor:
    """The directions a corpus uses least.

    Args:
        share: the share of directions kept, lowest eigenvalues first.
    Returns:
        [f, r] orthonormal columns, fp64, on ``device``.
    """
    vectors = _once(moments, layer, device, ["eigenvectors"], eigenvectors)
    return vectors[:, : round(share * len(vectors))]


def _once(
    moments: Covariance, layer: int, device: torch.device, what: list[object], compute: Callable[[Tensor], Tensor]
) -> Tensor:
    """Read it from the cache, or compute it and write it there."""
    c = moments.c[layer]
    name = f"{layer}-{what[0]}-{hash_json([hash_tensor(c, exact=True), *what])[:16]}.safetensors"
    path = cache_folder(moments.source) / name
    try:
        return load_file(path)["value"].to(device)
    except (OSError, SafetensorError):
        value = compute(c.to(device))
        _write(path, value)
        return value


def _write(path: Path, value: Tensor) -> None:
    with replacing(path) as work:
        save_file({"value": value.cpu().contiguous()}, work)
