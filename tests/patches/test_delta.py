"""The five forms of a change, each held against its written-out matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpatch.errors import BadInput
from lmpatch.patches.weight.delta import KINDS, Addition, Dense, LowRank, Rows, Scale, Sparse

SHAPE = (6, 10)


def written_out(delta) -> torch.Tensor:
    """The matrix, made entry by entry."""
    whole = torch.zeros(delta.shape)
    if isinstance(delta, LowRank):
        return delta.b @ delta.a
    if isinstance(delta, Dense):
        return delta.value
    if isinstance(delta, Sparse):
        for i, v in zip(delta.index.tolist(), delta.value, strict=True):
            whole[divmod(i, delta.shape[1])] = v
    if isinstance(delta, Rows):
        for i, v in zip(delta.index.tolist(), delta.value, strict=True):
            whole[i] = v
    return whole


def additions(random_delta):
    return [random_delta(kind, SHAPE) for kind in KINDS if kind != "scale"]


def test_an_addition_adds_its_matrix(random_delta) -> None:
    for delta in additions(random_delta):
        weight = torch.ones(SHAPE)
        delta.add_to(weight)
        torch.testing.assert_close(weight, 1 + written_out(delta))
        torch.testing.assert_close(delta.dense(), written_out(delta))


def test_an_addition_can_be_added_to_a_transposed_view(random_delta) -> None:
    for delta in additions(random_delta):
        stored = torch.zeros(SHAPE[::-1])
        delta.add_to(stored.T)
        torch.testing.assert_close(stored.T, written_out(delta))


def test_times_is_the_matrix_times_the_input(random_delta) -> None:
    x = torch.randn(2, 3, SHAPE[1])
    for delta in additions(random_delta):
        torch.testing.assert_close(delta.times(x), x @ written_out(delta).T)


def test_norm_is_the_frobenius_norm(random_delta) -> None:
    for delta in additions(random_delta):
        assert delta.norm() == pytest.approx(float(written_out(delta).norm()), rel=1e-6)


def test_strength_zero_is_nothing_and_strength_one_keeps_every_bit(kind, random_delta) -> None:
    delta = random_delta(kind, SHAPE)
    for mine, same in zip(delta.tensors().values(), delta.scaled(1.0).tensors().values(), strict=True):
        assert torch.equal(mine, same)
    nothing = delta.scaled(0.0)
    assert torch.equal(nothing.factors(), torch.ones(10)) if isinstance(nothing, Scale) else nothing.norm() == 0


def test_strength_moves_the_weight_in_proportion(kind, random_delta) -> None:
    delta, weight = random_delta(kind, SHAPE), torch.randn(SHAPE)

    def change(d):
        return d.dense() if isinstance(d, Addition) else weight * d.factors() - weight

    torch.testing.assert_close(change(delta.scaled(0.25)), 0.25 * change(delta))


def test_tensors_and_shape_make_the_change_again(kind, random_delta) -> None:
    delta = random_delta(kind, SHAPE)
    again = KINDS[kind].from_tensors(delta.tensors(), SHAPE)
    assert type(again) is type(delta) and again.shape == SHAPE
    assert all(torch.equal(again.tensors()[name], t) for name, t in delta.tensors().items())


def test_bytes_are_those_of_the_tensors(random_delta) -> None:
    assert LowRank(torch.zeros(6, 2), torch.zeros(2, 10)).nbytes == (6 + 10) * 2 * 4
    assert Scale(torch.arange(3), torch.zeros(3, dtype=torch.bfloat16), SHAPE).nbytes == 3 * (8 + 2)


def test_a_shape_that_was_not_said_is_refused(kind, random_delta) -> None:
    delta = random_delta(kind, SHAPE)
    with pytest.raises(BadInput):
        KINDS[kind].from_tensors(delta.tensors(), (2, 3))
    with pytest.raises(BadInput, match="has tensors"):
        KINDS[kind].from_tensors({**delta.tensors(), "more": torch.zeros(1)}, SHAPE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LowRank(torch.zeros(6, 2), torch.zeros(3, 10)),
        lambda: LowRank(torch.zeros(6), torch.zeros(1, 10)),
        lambda: Dense(torch.zeros(6, 10, dtype=torch.int64)),
        lambda: Sparse(torch.tensor([60]), torch.zeros(1), SHAPE),
        lambda: Sparse(torch.tensor([-1]), torch.zeros(1), SHAPE),
        lambda: Sparse(torch.tensor([1, 1]), torch.zeros(2), SHAPE),
        lambda: Sparse(torch.tensor([1, 2]), torch.zeros(3), SHAPE),
        lambda: Rows(torch.tensor([6]), torch.zeros(1, 10), 6),
        lambda: Rows(torch.tensor([0], dtype=torch.int32), torch.zeros(1, 10), 6),
        lambda: Scale(torch.tensor([10]), torch.zeros(1), SHAPE),
        lambda: Scale(torch.tensor([3, 4, 3]), torch.zeros(3), SHAPE),
    ],
)
def test_what_is_no_change_of_a_weight_is_refused(make) -> None:
    with pytest.raises(BadInput, match="not a change of a weight"):
        make()


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 4), st.integers(0, 6), st.sampled_from([torch.float32, torch.float64]))
def test_compact_is_the_same_change_at_its_true_rank(seed: int, rank: int, copies: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    b, a = torch.randn(12, rank, generator=g, dtype=dtype), torch.randn(rank, 9, generator=g, dtype=dtype)
    pick = torch.randint(0, max(rank, 1), (copies if rank else 0,), generator=g)
    whole = LowRank(torch.cat([b, b[:, pick]], 1), torch.cat([a, a[pick]]))
    compact = whole.compact()
    assert compact.rank == rank
    torch.testing.assert_close(compact.dense(), whole.dense(), atol=1e-5, rtol=1e-5)


def test_a_change_and_its_opposite_have_no_norm_and_compact_to_rank_zero() -> None:
    b, a = torch.randn(6, 2), torch.randn(2, 10)
    nothing = LowRank(torch.cat([b, -b], 1), torch.cat([a, a]))
    assert nothing.norm() < 1e-7
    assert nothing.compact().rank == 0
