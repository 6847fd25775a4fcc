"""Solves with second moments, from a factor that serves every commit (Cholesky, then Woodbury). All in fp64.

Shapes: moments C [f, f] symmetric; ``lower`` [f, f], a Cholesky factor; ``keys`` [f, u] of new facts and ``earlier``
[f, n] of commits before.
"""

from __future__ import annotations

import torch
from torch import Tensor

JITTER = 1e-4  # of the mean eigenvalue, added before factoring


def factor(moments: Tensor, *, jitter: float = JITTER) -> Tensor:
    """Cholesky factor [f, f] of C + jitter * tr(C)/f * I, lower triangular."""
    c = moments.double()
    c = c + jitter * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
    out: Tensor = torch.linalg.cholesky(c)
    return out


def eigenvectors(moments: Tensor) -> Tensor:
    """Columns [f, f], those of the lowest eigenvalues first."""
    out: Tensor = torch.linalg.eigh(moments.double())[1]
    return out


def solve(lower: Tensor, keys: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ K, [f, u]."""
    return torch.cholesky_solve(keys.double(), lower)


def woodbury(lower: Tensor, keys: Tensor, earlier: Tensor | None = None) -> Tensor:
    """(A + K_all K_allᵀ)⁻¹ K, [f, u], with A = L Lᵀ and K_all = [earlier, K], in u×u instead of f×f.

    With U = L⁻¹K_all the result is the last columns of L⁻ᵀ U (I + UᵀU)⁻¹. When the earlier keys number more than
    half of f they are folded into the factor first, which is then the cheaper way.
    """
    keys = keys.double()
    if earlier is not None and earlier.shape[1] > len(lower) // 2:
        earlier = earlier.double()
        lower, earlier = torch.linalg.cholesky(lower @ lower.T + earlier @ earlier.T), None
    every = keys if earlier is None else torch.cat([earlier.double(), keys], 1)
    u = torch.linalg.solve_triangular(lower, every, upper=False)  # [f, n+u]
    out: Tensor = torch.linalg.solve_triangular(lower.T, u @ _inverse(u, 1.0)[:, -keys.shape[1] :], upper=True)
    return out


def projected(basis: Tensor, keys: Tensor, ridge: float, earlier: Tensor | None = None) -> Tensor:
    """AlphaEdit's (P(KKᵀ + K_pK_pᵀ) + ridge I)⁻¹ P K, [f, u], with P = Q Qᵀ, solved in the size of the keys.

    Args:
        basis: [f, r] Q; the result is in its span.
        ridge: in units of key².
    Source: Fang et al. 2024 (arXiv:2410.02355) eq. 14, in its dual form Q G (ridge I + GᵀG)⁻¹ with G = Qᵀ[K_p, K].
    """
    every = keys.double() if earlier is None else torch.cat([earlier.double(), keys.double()], 1)
    g = basis.T @ every  # [r, n+u]
    return basis @ (g @ _inverse(g, ridge)[:, -keys.shape[1] :])


def dual(keys: Tensor, ridge: float) -> Tensor:
    """(K Kᵀ + ridge I)⁻¹ K, [f, u], for keys [f, u], in whichever of u×u and f×f is smaller.

    Args:
        ridge: in units of key², above 0.
    Source: Tan et al. 2023 (arXiv:2311.04661), the normal equation of MALMEN, and its dual K (KᵀK + ridge I)⁻¹.
    """
    k = keys.double()
    return k @ _inverse(k, ridge) if k.shape[1] <= len(k) else _inverse(k.T, ridge) @ k


def _inverse(u: Tensor, ridge: float) -> Tensor:
    """(UᵀU + ridge I)⁻¹."""
    eye = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    return torch.cholesky_solve(eye, torch.linalg.cholesky(u.T @ u + ridge * eye))
