"""The number format is measured once, in bounded time, and no default depends on the processor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from time import perf_counter

import pytest
import torch
from torch import Tensor

from lmpatch.models import number_format as nf

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unmeasured() -> Iterator[None]:
    nf.rates.cache_clear()
    yield
    nf.rates.cache_clear()


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


@pytest.mark.parametrize("able", [True, False])
def test_a_card_has_bf16_if_it_computes_in_it_and_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    def refuse(_: torch.dtype) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(nf, "rate", refuse)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    assert nf.default_dtype(torch.device("cuda")) == (torch.bfloat16 if able else torch.float32)
    assert nf.default_dtype(torch.device("mps")) == nf.default_dtype(CPU) == torch.float32


@pytest.mark.parametrize(("cuda", "mps", "wanted"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_is_a_card_then_mps(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert nf.best_device() == torch.device(wanted)


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 80.0, 3.0)
    assert nf.rates() == {"float32": 80.0, "bfloat16": 3.0}
    monkeypatch.setattr(nf, "rate", lambda dtype: pytest.fail("measured again"))
    assert nf.rates() == {"float32": 80.0, "bfloat16": 3.0}


def test_who_asks_for_bf16_where_it_is_slow_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 81.0, 2.6)
    with pytest.warns(UserWarning, match="bf16 products run 31 times slower than fp32.*--dtype float32 is faster"):
        nf.warn_if_slow(torch.bfloat16, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nf.warn_if_slow(torch.float32, CPU)
        nf.warn_if_slow(torch.bfloat16, torch.device("cuda"))


def test_nothing_is_said_where_bf16_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 81.0, 200.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nf.warn_if_slow(torch.bfloat16, CPU)


@pytest.mark.slow
def test_a_real_measurement_ends_in_time() -> None:
    begun = perf_counter()
    found = nf.rates()
    assert perf_counter() - begun < 5 and all(value > 0.01 for value in found.values())
    assert nf.processor_name()
