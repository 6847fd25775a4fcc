"""The number format is measured once per machine, in bounded time, and bf16 is taken only where it clearly wins."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from time import perf_counter

import pytest
import torch
from torch import Tensor

from lmpatch.models import number_format as nf


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path))
    return tmp_path / "rates"


class Machine:
    """A clock and a product that takes the time it would at this speed, in FLOP/s."""

    def __init__(self, speed: float) -> None:
        self.speed, self.now, self.sizes = speed, 0.0, []

    def clock(self) -> float:
        return self.now

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        self.sizes.append(len(a))
        self.now += 2 * len(a) ** 3 / self.speed
        return a


def measured(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float) -> None:
    monkeypatch.setattr(nf, "rate", lambda dtype: bf16 if dtype is torch.bfloat16 else fp32)


@pytest.mark.parametrize("gflops", [0.02, 1.0, 80.0, 3000.0])
def test_a_rate_is_what_the_clock_says_and_takes_bounded_time(gflops: float) -> None:
    machine = Machine(gflops * 1e9)
    assert nf.rate(torch.float32, machine.clock, machine.product) == pytest.approx(gflops, rel=1e-6)
    # a size costs its first call, and calls for SPAN of which the last may be as long as the first
    assert machine.now <= len(nf.SIZES) * (2 * nf.WAIT + nf.SPAN)


def test_a_format_that_crawls_is_measured_at_small_sizes_only() -> None:
    slow, fast = Machine(1e9), Machine(80e9)
    for machine in (slow, fast):
        nf.rate(torch.bfloat16, machine.clock, machine.product)
    assert max(slow.sizes) == 256 and max(fast.sizes) == 512  # 512 would take 0.27 s a product


@pytest.mark.parametrize(
    ("bf16", "wanted"), [(80.0, "float32"), (119.0, "float32"), (121.0, "bfloat16"), (3.0, "float32")]
)
def test_bf16_is_taken_only_where_it_clearly_wins(monkeypatch: pytest.MonkeyPatch, bf16: float, wanted: str) -> None:
    measured(monkeypatch, 80.0, bf16)
    assert nf.fastest_dtype("cpu") == nf.FORMATS[wanted]


@pytest.mark.parametrize("able", [True, False])
def test_a_card_has_bf16_if_it_computes_in_it_and_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    def refuse(_: torch.dtype) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(nf, "rate", refuse)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    assert nf.fastest_dtype("cuda") == (torch.bfloat16 if able else torch.float32)
    assert nf.fastest_dtype("mps") == torch.float32


@pytest.mark.parametrize(("cuda", "mps", "wanted"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_is_a_card_then_mps(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert nf.best_device() == torch.device(wanted)


def test_it_is_measured_once_per_processor_version_and_threads(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    measured(monkeypatch, 80.0, 3.0)
    assert nf.rates() == {"float32": 80.0, "bfloat16": 3.0}
    measured(monkeypatch, 1.0, 1.0)
    assert nf.rates() == {"float32": 80.0, "bfloat16": 3.0}  # kept
    for key in ("processor", "torch", "threads"):
        with monkeypatch.context() as other:
            there = nf.machine()
            other.setattr(nf, "machine", lambda there=there, key=key: there | {key: "another"})
            assert nf.rates() == {"float32": 1.0, "bfloat16": 1.0}
    assert len(list(own_cache.iterdir())) == 4


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"gflops": {"float32": 0, "bfloat16": 1}}', '{"gflops": {"float32": 1}}']
)
def test_a_file_that_cannot_be_read_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path, text: str
) -> None:
    measured(monkeypatch, 80.0, 3.0)
    nf.rates()
    (path,) = own_cache.iterdir()
    path.write_text(text)
    assert nf.rates()["float32"] == 80.0
    assert json.loads(path.read_text())["gflops"]["bfloat16"] == 3.0


def test_without_a_cache_folder_it_is_measured_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path / "file"))
    measured(monkeypatch, 80.0, 3.0)
    assert nf.rates()["float32"] == 80.0


def test_who_asks_for_bf16_where_it_is_slow_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 81.0, 2.6)
    with pytest.warns(UserWarning, match="bf16 products run 31 times slower than fp32.*--dtype float32 is faster"):
        nf.warn_if_slow(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nf.warn_if_slow(torch.float32)
        nf.warn_if_slow(torch.bfloat16, "cuda")


def test_nothing_is_said_where_bf16_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 81.0, 200.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nf.warn_if_slow(torch.bfloat16)


def test_a_real_measurement_ends_in_time_and_gives_a_format() -> None:
    begun = perf_counter()
    found = nf.rates()
    assert perf_counter() - begun < 5 and all(value > 0.01 for value in found.values())
    assert nf.fastest_dtype() in nf.FORMATS.values()
    assert nf.processor()
