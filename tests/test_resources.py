"""What is free, and the error before a run that would not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmpatch.errors import NotEnoughMemory
from lmpatch.resources import format_bytes, free_bytes, require_memory

CPU = torch.device("cpu")


def test_some_memory_is_free_and_less_than_a_pebibyte() -> None:
    assert 2**20 < free_bytes(CPU) < 2**50


def test_what_fits_passes_and_what_does_not_is_said_in_one_line() -> None:
    require_memory(1, CPU, "a byte")
    with pytest.raises(NotEnoughMemory, match=r"^a lot needs about .* GiB on cpu; .* is free\. .*$") as caught:
        require_memory(2**60, CPU, "a lot")
    assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 20, "5.0 MiB"), (3 << 31, "6.0 GiB")]
)
def test_sizes_read_as_a_person_writes_them(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 2**50))
def test_a_size_is_within_a_twentieth_of_the_count(count: int) -> None:
    number, unit = format_bytes(count).split()
    assert float(number) * {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit] == pytest.approx(count, rel=0.05)
