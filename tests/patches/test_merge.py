"""Merging follows the algebra: additions sum, scales multiply, and what has no common algebra is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_lm

from lmpatch.errors import CannotMerge, WrongModel
from lmpatch.patches.file import load_patch
from lmpatch.patches.ledger import apply
from lmpatch.patches.merge import merge
from lmpatch.patches.patch import Patch
from lmpatch.patches.weight.combine import combine
from lmpatch.patches.weight.delta import Addition, Delta, Dense, LowRank, Rows, Scale, Sparse
from lmpatch.patches.weight.patch import WeightPatch

SHAPE = (6, 10)


def effect(delta: Delta) -> torch.Tensor:
    """ΔW of an addition; the factors of a scale."""
    return delta.dense() if isinstance(delta, Addition) else delta.factors()  # type: ignore[attr-defined]


def test_a_merge_with_itself_follows_the_kind(kind, random_delta) -> None:
    delta = random_delta(kind, SHAPE)
    twice = combine("w", [delta, delta])
    assert type(twice) is type(delta) and twice.nbytes == delta.nbytes
    want = effect(delta) ** 2 if kind == "scale" else 2 * effect(delta)
    assert torch.equal(effect(twice), want)


def test_muting_twice_is_muting_once() -> None:
    mute = Scale(torch.tensor([2, 5]), torch.zeros(2), SHAPE)
    louder = Scale(torch.tensor([5, 7]), torch.tensor([4.0, 2.0]), SHAPE)
    assert torch.equal(combine("w", [mute, mute]).factors(), mute.factors())  # type: ignore[attr-defined]
    both = combine("w", [mute, louder])
    assert both.factors()[[2, 5, 7]].tolist() == [0.0, 0.0, 2.0]  # type: ignore[attr-defined]
    assert len(both.index) == 3  # type: ignore[attr-defined]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["low_rank", "dense", "sparse", "rows"]), min_size=1, max_size=5), st.integers(0, 99))
def test_additions_sum_whatever_their_form_and_order(kinds: list[str], seed: int) -> None:
    from_kind = {
        "low_rank": lambda g: LowRank(torch.randn(6, 2, generator=g), torch.randn(2, 10, generator=g)),
        "dense": lambda g: Dense(torch.randn(SHAPE, generator=g)),
        "sparse": lambda g: Sparse(torch.randperm(60, generator=g)[:7], torch.randn(7, generator=g), SHAPE),
        "rows": lambda g: Rows(torch.randperm(6, generator=g)[:3], torch.randn(3, 10, generator=g), 6),
    }
    g = torch.Generator().manual_seed(seed)
    deltas = [from_kind[kind](g) for kind in kinds]
    want = torch.stack([effect(d) for d in deltas]).sum(0)
    for order in (deltas, deltas[::-1]):
        torch.testing.assert_close(effect(combine("w", order)), want, atol=1e-5, rtol=1e-5)
    if len(deltas) > 2:
        nested = combine("w", [combine("w", deltas[:2]), *deltas[2:]])
        torch.testing.assert_close(effect(nested), want, atol=1e-5, rtol=1e-5)


def test_low_rank_stays_low_rank_while_that_is_smaller() -> None:
    def part(rank: int, seed: int) -> LowRank:
        g = torch.Generator().manual_seed(seed)
        return LowRank(torch.randn(32, rank, generator=g), torch.randn(rank, 32, generator=g))

    few = combine("w", [part(3, 1), part(4, 2)])
    assert isinstance(few, LowRank) and few.rank == 7
    again = LowRank(few.b * torch.linspace(1, 2, 7), few.a)  # other factors, same rows: compacts below 16
    shared = combine("w", [few, LowRank(again.b @ torch.randn(7, 7), torch.randn(7, 7) @ few.a), few, few.scaled(3.0)])
    assert isinstance(shared, LowRank) and shared.rank <= 14
    many = combine("w", [part(10, 3), part(10, 4)])
    assert isinstance(many, Dense) and many.nbytes < 20 * 64 * 4


def test_shared_keys_keep_the_rank() -> None:
    b, a = torch.randn(32, 2), torch.randn(2, 32)  # far below where merging would compact
    for other in (LowRank(torch.randn(32, 2), a.clone()), LowRank(b.clone(), torch.randn(2, 32))):
        both = combine("w", [LowRank(b, a), other])
        assert isinstance(both, LowRank) and both.rank == 2
        torch.testing.assert_close(both.dense(), b @ a + other.b @ other.a)


def test_a_scale_and_an_addition_on_one_weight_do_not_merge(random_patch) -> None:
    lm = tiny_lm("llama")
    scale = random_patch(lm, "scale")
    for kind in ("low_rank", "dense", "sparse", "rows"):
        with pytest.raises(CannotMerge, match=next(iter(scale.deltas))):
            merge(scale, random_patch(lm, kind))
    apart = merge(random_patch(lm, "scale", layers=(0,)), random_patch(lm, layers=(3,)))
    assert {d.kind for d in apart.deltas.values()} == {"scale", "low_rank"}


def test_patches_of_different_models_do_not_merge(random_patch) -> None:
    with pytest.raises(WrongModel, match=r"tiny-llama .* and tiny-gpt2"):
        merge(random_patch(tiny_lm("llama")), random_patch(tiny_lm("gpt2")))


class OtherPatch(Patch):
    kind = "other"
    parts = tensors = describe = from_parts = None  # type: ignore[assignment]


OtherPatch.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def test_patches_of_different_kinds_do_not_merge(random_patch) -> None:
    patch = random_patch(tiny_lm("llama"))
    with pytest.raises(CannotMerge, match="other and weight"):
        merge(patch, OtherPatch(method="m", config={}, base=patch.base))


def test_a_merged_patch_keeps_edits_hashes_names_and_extras(random_patch, tmp_path) -> None:
    lm = tiny_lm("llama")
    a, b = random_patch(lm, seed=1), random_patch(lm, "rows", seed=2, layers=(3,))
    a, b = replace(a, extras={"keys.1": torch.ones(2, 5)}), replace(b, extras={"keys.1": torch.zeros(3, 5)})
    both = merge(a, b)
    assert both.method == "random_low_rank+random_rows" and both.edits == a.edits + b.edits
    assert both.base.touched == a.base.touched | b.base.touched and both.made["seconds"] == 3.0
    assert [m["hash"] for m in both.config["merged"]] == [a.hash(), b.hash()]
    assert both.extras["keys.1"].shape == (5, 5)
    assert merge(both, a).method == both.method
    both.save(tmp_path / "both")
    assert load_patch(tmp_path / "both").hash() == both.hash()
    with apply(lm, both):
        pass
    with pytest.raises(CannotMerge, match="extras"):
        merge(a, replace(b, extras={"keys.1": torch.zeros(3, 4)}))


def test_a_merge_does_not_depend_on_the_order(kind, random_patch) -> None:
    lm = tiny_lm("llama")
    a, b = random_patch(lm, kind, 1), random_patch(lm, kind, 5, layers=(2, 3))
    left, right = merge(a, b), merge(b, a)
    assert left.deltas.keys() == right.deltas.keys()
    for name, delta in left.deltas.items():
        torch.testing.assert_close(effect(delta), effect(right.deltas[name]), atol=1e-5, rtol=1e-5)


def test_one_patch_merges_to_itself(random_patch) -> None:
    patch = random_patch(tiny_lm("llama"))
    alone = merge(patch)
    assert isinstance(alone, WeightPatch)
    assert all(alone.deltas[n] is d for n, d in patch.deltas.items())
