"""Statistics of commits join into those of all rows, and normalise as those do."""

from __future__ import annotations

import pytest
import torch

from lmpatch.locate.statistics import Statistics

ROWS = torch.randn(300, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double) * torch.tensor(
    [1.0, 1e-4, 10.0, 1.0, 1.0, 0.0]
) + torch.tensor([0.0, 1.0, -50.0, 0.0, 3.0, 7.0])
SIZES = [1, 1, 2, 96, 200]  # single rows, too


@pytest.mark.parametrize("full", [False, True])
def test_joined_they_are_those_of_all_rows_at_once(full: bool) -> None:
    parts = [Statistics.of(part, full=full) for part in ROWS.split(SIZES)]
    joined = Statistics.joined(parts)
    assert joined.count == 300
    torch.testing.assert_close(joined.mean, ROWS.mean(0), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(joined.variance, ROWS.var(0), atol=1e-12, rtol=1e-9)
    if full:
        torch.testing.assert_close(joined.scatter / 299, torch.cov(ROWS.T), atol=1e-12, rtol=1e-9)


def test_in_any_order_they_are_the_same() -> None:
    parts = [Statistics.of(part) for part in ROWS.split(SIZES)]
    once, other = Statistics.joined(parts), Statistics.joined([parts[0], Statistics.joined(parts[:0:-1])])
    torch.testing.assert_close(once.scatter, other.scatter, atol=1e-12, rtol=1e-10)


def test_rows_that_were_normalised_have_mean_zero_and_variance_one_where_they_vary() -> None:
    z = Statistics.of(ROWS).normalise(ROWS)
    torch.testing.assert_close(z.mean(0), torch.zeros(6).double(), atol=1e-9, rtol=0.0)
    torch.testing.assert_close(z.var(0)[[0, 2, 3, 4]], torch.ones(4).double(), atol=1e-9, rtol=0.0)
    assert torch.equal(z[:, 5], torch.zeros(300).double())


def test_whitened_rows_have_no_covariance_and_few_rows_are_scaled_instead() -> None:
    mixed = ROWS[:, [0, 3, 4]] @ torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 3.0]]).double()
    known = Statistics.of(mixed, full=True)
    torch.testing.assert_close(torch.cov(known.whiten(mixed).T), torch.eye(3).double() * (296 / 299), atol=1e-9, rtol=0)
    few = Statistics.of(mixed[:4], full=True)
    assert torch.equal(few.whiten(mixed), few.normalise(mixed))


@pytest.mark.parametrize("full", [False, True])
def test_a_row_of_a_patch_holds_them(full: bool) -> None:
    known = Statistics.of(ROWS[:, :4], full=full)
    (back,) = Statistics.from_rows(known.row(), 4)
    assert back.count == known.count
    torch.testing.assert_close(back.scatter, known.scatter, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(back.diagonal().mean, known.mean, atol=1e-6, rtol=1e-6)
