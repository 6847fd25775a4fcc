"""A damaged file of the cache is made again: never other numbers, never a traceback, never a hang."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from damage import each
from tiny import tiny_lm

from lmpatch.errors import LmpatchError
from lmpatch.locate import covariance as _moments
from lmpatch.locate import samples as _samples
from lmpatch.locate.covariance import Covariance, accumulate, cholesky, estimate_covariance, null_space
from lmpatch.locate.samples import own_rows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(_samples, "LENGTH", 16)
    monkeypatch.setattr(_moments, "LENGTH", 16)
    return tmp_path


def stop(done: int, total: int, what: str) -> None:
    if done == 8:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_sample_texts(own_cache: Path) -> None:
    lm = tiny_lm("llama")
    rows = own_rows(lm, 300, 0)
    (file,) = own_cache.rglob("*.safetensors")
    each(file, lambda: torch.equal(own_rows(lm, 300, 0), rows))


@pytest.mark.slow
def test_sample_texts_half_written(own_cache: Path) -> None:
    lm = tiny_lm("llama")
    rows = own_rows(lm, 300, 0, keep=False)
    with pytest.raises(KeyboardInterrupt):
        own_rows(lm, 300, 0, progress=stop)
    (file,) = own_cache.rglob("*.partial")

    def same() -> bool:
        for done in own_cache.rglob("*.safetensors"):
            done.unlink()
        return torch.equal(own_rows(lm, 300, 0), rows)

    each(file, same)


@pytest.mark.slow
def test_second_moments_and_their_factors(own_cache: Path) -> None:
    lm = tiny_lm("llama")
    moments = estimate_covariance(lm, [1, 2], tokens=300)
    lower, basis = cholesky(moments, 1, CPU), null_space(moments, 1, CPU, 0.5)

    def same() -> bool:
        again = estimate_covariance(lm, [1, 2], tokens=300)
        facts = (again.tokens, again.agreement) == (moments.tokens, moments.agreement)
        return facts and all(torch.equal(again.c[i], moments.c[i]) for i in (1, 2))

    (file,) = own_cache.rglob("1.safetensors")
    each(file, same, flips=4)
    for name, again in (
        ("1-cholesky-*", lambda: torch.equal(cholesky(moments, 1, CPU), lower)),
        ("1-eigen*", lambda: torch.equal(null_space(moments, 1, CPU, 0.5), basis)),
    ):
        (file,) = own_cache.rglob(name)
        each(file, again)


@pytest.mark.slow
def test_second_moments_half_added(own_cache: Path) -> None:
    lm, folder = tiny_lm("llama"), own_cache / "moments"
    rows = own_rows(lm, 400, 0)
    c, *facts = accumulate(lm, rows, [0])
    with pytest.raises(KeyboardInterrupt):
        accumulate(lm, rows, [0], folder, stop)

    def same() -> bool:
        again, *told = accumulate(lm, rows, [0], folder)
        return told == facts and torch.equal(again[0], c[0])

    each(folder / _moments.PARTIAL, same)


@pytest.mark.slow
def test_files_of_another_layer_number_format_or_model_in_its_place(own_cache: Path) -> None:
    lm, other = tiny_lm("llama"), tiny_lm("llama", seed=1)
    moments, theirs = (estimate_covariance(one, [1, 2], tokens=300) for one in (lm, other))
    folder, foreign = (_moments._folder(m.source) for m in (moments, theirs))
    for source in (folder / "2.safetensors", foreign / "1.safetensors"):
        shutil.copy(source, folder / "1.safetensors")
        assert torch.equal(estimate_covariance(lm, [1], tokens=300).c[1], moments.c[1])
    lower = cholesky(moments, 1, CPU)
    (file,), scaled = folder.glob("1-cholesky-*"), cholesky(Covariance({1: 2 * moments.c[1]}, 1, 1.0, "x"), 1, CPU)
    shutil.copy(*own_cache.glob("moments/x/*"), file)
    assert torch.equal(cholesky(moments, 1, CPU), lower) and not torch.equal(lower, scaled)
    files = sorted(own_cache.glob("samples/*"))
    rows = own_rows(lm, 300, 0)
    shutil.copy(next(f for f in files if not f.name.startswith(lm.fingerprint()[:16])), files[0])
    assert torch.equal(own_rows(lm, 300, 0), rows)


def test_a_cache_that_cannot_be_written_gets_one_line(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_cache / "file").write_text("")
    monkeypatch.setenv("LMPATCH_CACHE", str(own_cache / "file"))
    with pytest.raises(LmpatchError, match="cannot be written"):
        estimate_covariance(tiny_lm("llama"), [1], tokens=300)
