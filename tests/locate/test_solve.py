"""Woodbury, AlphaEdit's dual form and the factorisation, each against the dense formula in fp64."""

from __future__ import annotations

import pytest
import torch

from lmpatch.locate.solve import dual, eigenvectors, factor, projected, solve, woodbury

F, U, N = 40, 5, 7


@pytest.fixture
def setup() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, F, generator=g, dtype=torch.double)
    keys = torch.randn(F, U, generator=g, dtype=torch.double)
    earlier = torch.randn(F, N, generator=g, dtype=torch.double)
    return x.T @ x / 200, keys, earlier


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-8)


def test_solve_is_the_inverse_of_the_jittered_matrix(setup: tuple[torch.Tensor, ...]) -> None:
    c, keys, _ = setup
    dense = c + 1e-4 * c.diagonal().mean() * torch.eye(F, dtype=torch.double)
    close(solve(factor(c), keys), torch.linalg.inv(dense) @ keys)


@pytest.mark.parametrize("earlier_count", [0, N, 30])  # 30 > F/2: the earlier keys are folded into the factor
def test_woodbury_equals_the_dense_solve(setup: tuple[torch.Tensor, ...], earlier_count: int) -> None:
    c, keys, _ = setup
    earlier = torch.randn(F, earlier_count, dtype=torch.double) if earlier_count else None
    a = factor(c) @ factor(c).T
    every = keys if earlier is None else torch.cat([earlier, keys], 1)
    want = torch.linalg.inv(a + every @ every.T) @ keys
    close(woodbury(factor(c), keys, earlier), want)


def test_a_vanishing_weight_inserts_exactly_and_a_large_one_not_at_all(setup: tuple[torch.Tensor, ...]) -> None:
    c, keys, _ = setup
    residual = torch.randn(3, U, dtype=torch.double)
    exact = residual @ woodbury(factor(1e-9 * c), keys).T @ keys
    torch.testing.assert_close(exact, residual, atol=1e-5, rtol=1e-5)
    assert (residual @ woodbury(factor(1e9 * c), keys).T @ keys).abs().max() < 1e-6


def test_scaling_keys_and_moments_together_leaves_the_written_values(setup: tuple[torch.Tensor, ...]) -> None:
    c, keys, earlier = setup
    once = woodbury(factor(c), keys, earlier).T @ keys
    scaled = woodbury(factor(9 * c), 3 * keys, 3 * earlier).T @ (3 * keys)
    close(once, scaled)


@pytest.mark.parametrize("with_earlier", [False, True])
def test_alphaedits_reduced_form_equals_the_full_formula(setup: tuple[torch.Tensor, ...], with_earlier: bool) -> None:
    c, keys, earlier = setup
    basis, ridge = eigenvectors(c)[:, : round(0.7 * F)], 0.3
    p = basis @ basis.T
    every = torch.cat([earlier, keys], 1) if with_earlier else keys
    full = torch.linalg.solve(p @ every @ every.T + ridge * torch.eye(F, dtype=torch.double), p @ keys)
    close(projected(basis, keys, ridge, earlier if with_earlier else None), full)


def test_alphaedit_writes_nothing_along_the_directions_it_dropped(setup: tuple[torch.Tensor, ...]) -> None:
    c, keys, _ = setup
    basis = eigenvectors(c)[:, : round(0.7 * F)]
    _, vectors = torch.linalg.eigh(c)
    dropped = vectors[:, basis.shape[1] :]  # the corpus's strongest directions
    assert (projected(basis, keys, 0.1).T @ dropped).abs().max() < 1e-12


@pytest.mark.parametrize("tokens", [U, 3 * F])
def test_the_dual_solve_equals_the_primal_whichever_is_smaller(tokens: int) -> None:
    keys = torch.randn(F, tokens, dtype=torch.double, generator=torch.Generator().manual_seed(tokens))
    primal = torch.linalg.solve(keys @ keys.T + 0.3 * torch.eye(F, dtype=torch.double), keys)
    torch.testing.assert_close(dual(keys, 0.3), primal, atol=1e-9, rtol=1e-9)
