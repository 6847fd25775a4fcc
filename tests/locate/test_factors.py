"""What is computed from second moments is computed once, and is what it would be if it were computed again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_lm
from torch import Tensor

from lmpatch.data.edits import Edit
from lmpatch.locate import covariance
from lmpatch.locate.covariance import Covariance, cholesky, estimate_covariance, null_space
from lmpatch.locate.solve import eigenvectors, factor
from lmpatch.methods import memit, rome

F, CPU = 24, torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was computed, in order."""
    calls: list[str] = []

    def counted(name: str) -> None:
        real = getattr(covariance, name)

        def call(c: Tensor) -> Tensor:
            calls.append(name)
            result: Tensor = real(c)
            return result

        monkeypatch.setattr(covariance, name, call)

    counted("factor")
    counted("eigenvectors")
    return calls


def moments(seed: int = 0) -> Covariance:
    x = torch.randn(200, F, generator=torch.Generator().manual_seed(seed))
    return Covariance({3: x.T @ x / 200}, 200, 1.0, "source")


def test_a_factor_is_computed_once_and_read_again_to_the_bit(computed: list[str]) -> None:
    m = moments()
    first, second = (cholesky(m, 3, CPU, weight=7.0, ridge=0.1) for _ in range(2))
    weighted = 7.0 * m.c[3].double()
    weighted = weighted + 0.1 * weighted.diagonal().mean() * torch.eye(F)
    assert torch.equal(first, second) and torch.equal(first, factor(weighted))
    assert computed == ["factor"]


def test_other_numbers_and_other_moments_have_a_factor_of_their_own(computed: list[str]) -> None:
    m = moments()
    a, b, c = cholesky(m, 3, CPU), cholesky(m, 3, CPU, weight=2.0), cholesky(moments(1), 3, CPU)
    assert not torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a, factor(m.c[3])) and computed == ["factor"] * 3


def test_eigenvectors_serve_every_share(computed: list[str]) -> None:
    m = moments()
    half, all_but_one = null_space(m, 3, CPU, 0.5), null_space(m, 3, CPU, 1 - 1 / F)
    whole = eigenvectors(m.c[3])
    assert torch.equal(half, whole[:, : F // 2]) and torch.equal(all_but_one, whole[:, : F - 1])
    assert computed == ["eigenvectors"]


def test_a_truncated_file_is_computed_again(own_cache: Path, computed: list[str]) -> None:
    m = moments()
    first = cholesky(m, 3, CPU)
    (file,) = own_cache.rglob("3-cholesky-*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(cholesky(m, 3, CPU), first) and torch.equal(cholesky(m, 3, CPU), first)
    assert computed == ["factor"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["memit", "alphaedit"])
def test_a_second_commit_factors_nothing_and_a_commit_from_the_cache_is_the_same(
    solver: str, computed: list[str]
) -> None:
    lm = tiny_lm("llama")
    edits, cfg = memit.example(lm)
    cfg = replace(cfg, solver=solver)
    estimate_covariance(lm, [1, 2], tokens=2048)
    computed.clear()
    first = memit.fit(lm, edits, cfg)
    assert len(computed) == 2  # layers
    assert memit.fit(lm, edits, cfg).hash() == first.hash()
    other = [Edit("Steve Jobs founded", subject="Steve Jobs", target="Tokyo")]
    memit.fit(lm, other, cfg)
    assert len(computed) == 2


@pytest.mark.slow
def test_rome_shares_its_factor_with_later_edits(computed: list[str]) -> None:
    lm = tiny_lm("llama")
    edits, cfg = rome.example(lm)
    estimate_covariance(lm, [1], tokens=2048)
    computed.clear()
    first = rome.fit(lm, edits, cfg)
    assert rome.fit(lm, edits, cfg).hash() == first.hash() and computed == ["factor"]
