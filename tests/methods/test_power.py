"""One exponent for every token; what it does is tested in tests/patches."""

from __future__ import annotations

import pytest
from tiny import tiny_lm

from lmpatch.errors import BadInput
from lmpatch.methods import power
from lmpatch.patches.decode.rules import Power


def test_the_patch_is_the_exponent() -> None:
    lm = tiny_lm("llama")
    records, _ = power.example(lm)
    assert power.fit(lm, records, power.Config()).rules == (Power(0.5),)
    assert power.fit(lm, records, power.Config(tau=0.25)).rules == (Power(0.25),)


def test_a_setting_out_of_range_is_refused() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(BadInput, match="tau is nan"):
        power.fit(lm, power.example(lm)[0], power.Config(tau=float("nan")))
