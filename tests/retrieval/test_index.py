"""The block of keys: exact, whatever went in and out of it before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmpatch.errors import BadInput
from lmpatch.retrieval.index import KeyBlock, inner

WIDTH = 24


def random(n: int, seed: int = 0, width: int = WIDTH, scale: float = 1.0) -> Tensor:
    """[n, width] float16 vectors of different lengths."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, width, generator=g) * torch.rand(n, 1, generator=g) * scale).half()


def plain(keys: dict[int, Tensor], query: Tensor, k: int) -> list[int]:
    """The labels of the best keys by a sort in float64, the lower of equals first."""
    scores = {label: float(inner(query, key[None])[0]) for label, key in keys.items()}
    return sorted(scores, key=lambda label: (-scores[label], label))[:k]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=12),
    k=st.integers(1, 9),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 999),
)
def test_a_search_finds_what_a_sort_finds_after_any_adding_and_dropping(
    steps: list[tuple[bool, int]], k: int, scale: float, seed: int
) -> None:
    block, kept, vectors, used = KeyBlock(WIDTH), {}, random(500, seed, scale=scale), 0
    for add, n in steps:
        if add:
            labels = list(range(used, used + n))
            block.add(vectors[labels], labels)
            kept |= {label: vectors[label] for label in labels}
            used += n
        else:
            for label in list(kept)[:n]:
                block.drop(label)
                del kept[label]
    queries = torch.cat([random(3, seed + 1).float(), vectors[:2].float()])
    scores, labels = block.search(queries, k)
    assert len(block) == len(kept) and labels.shape == (5, min(k, len(kept)))
    assert labels.tolist() == [plain(kept, query, k) for query in queries]
    for query, line, found in zip(queries, scores, labels, strict=True):
        assert line.tolist() == [float(inner(query, vectors[label][None])[0]) for label in found]


def test_the_order_of_adding_does_not_show() -> None:
    vectors, queries = random(300), random(8, seed=1)
    vectors[200:] = vectors[:100]  # each of these keys has a twin
    block, shuffled = KeyBlock(WIDTH), KeyBlock(WIDTH)
    block.add(vectors, range(300))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2)).tolist()
    for label in order:
        shuffled.add(vectors[label : label + 1], [label])
    for a, b in zip(block.search(queries, 20), shuffled.search(queries, 20), strict=True):
        assert torch.equal(a, b)


def test_equal_keys_score_equally_wherever_they_stand_and_the_lowest_label_wins() -> None:
    vectors = random(1000)
    places = [3, 17, 512, 999]
    vectors[places] = 1 + random(1, seed=5)
    block = KeyBlock(WIDTH)
    block.add(vectors, range(1000))
    scores, labels = block.search(vectors[3:4], 4)
    assert labels.tolist() == [places]
    assert len({*scores[0].tolist()}) == 1


@pytest.mark.slow
def test_rounding_of_the_first_pass_misplaces_no_winner() -> None:
    for seed in range(20):
        query, crowd = random(1, seed, width=256).float()[0], random(500, seed + 1, width=256).float()
        crowd -= (crowd @ query - 1)[:, None] * query / query.norm() ** 2  # all score about 1, from everywhere
        block = KeyBlock(256)
        block.add(crowd.half(), range(500))
        assert block.search(query[None], 5)[1][0].tolist() == plain(dict(enumerate(crowd.half())), query, 5)


@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
def test_a_query_may_have_any_length_and_zero_finds_the_lowest_labels(length: float) -> None:
    block, vectors = KeyBlock(WIDTH), random(50)
    block.add(vectors, range(50))
    query = vectors[7:8].float() * length
    assert block.search(query)[1].item() == plain(dict(enumerate(vectors)), query[0], 1)[0]
    assert block.search(torch.zeros(1, WIDTH), 3)[1].tolist() == [[0, 1, 2]]


@pytest.mark.slow
def test_dropped_rows_are_used_again_so_a_busy_block_stays_small() -> None:
    block = KeyBlock(WIDTH)
    for label in range(2000):
        block.add(random(1, seed=label), [label])
        if label >= 20:
            block.drop(label - 20)
    assert len(block) == 20
    assert block.nbytes < 100 * (2 * WIDTH + 9)


@pytest.mark.slow
def test_the_block_doubles_so_adding_one_at_a_time_copies_each_key_twice_at_most() -> None:
    block, sizes = KeyBlock(WIDTH), set()
    for label in range(1000):
        block.add(random(1), [label])
        sizes.add(block.nbytes)
    assert len(sizes) <= 6
    assert block.nbytes <= 2 * 1000 * (2 * WIDTH + 9)


def test_what_cannot_be_added_changes_nothing() -> None:
    block = KeyBlock(WIDTH)
    block.add(random(4), range(4))
    for vectors, labels, says in [
        (random(1, width=8), [9], "width 24"),
        (random(2), [9], "expected"),
        (random(1), [2], "already"),
        (random(2), [9, 9], "already"),
        (torch.full((1, WIDTH), torch.nan), [9], "finite"),
        (torch.full((1, WIDTH), 1e6), [9], "finite float16"),
    ]:
        with pytest.raises(BadInput, match=says):
            block.add(vectors, labels)
    with pytest.raises(BadInput, match="label 9"):
        block.drop(9)
    assert len(block) == 4 and 9 not in block and 2 in block
    for queries in (random(1, width=8), torch.full((1, WIDTH), torch.inf), random(1)[0]):
        with pytest.raises(BadInput, match="queries"):
            block.search(queries)


def test_an_empty_block_finds_nothing() -> None:
    block = KeyBlock(WIDTH)
    block.add(random(0), [])
    scores, labels = block.search(random(3), 2)
    assert scores.shape == labels.shape == (3, 0)
