"""GRD has one number and a gate; what it does is tested in tests/patches."""

from __future__ import annotations

import pytest
from tiny import tiny_lm

from lmpatch.errors import BadInput
from lmpatch.methods import grd
from lmpatch.patches.decode.rules import Grd


def test_the_patch_is_number_and_gate() -> None:
    lm = tiny_lm("llama")
    records, _ = grd.example(lm)
    assert grd.fit(lm, records, grd.Config()).rules == (Grd(0.75),)
    assert grd.fit(lm, records, grd.Config(lam=0.5, gate="confidence")).rules == (Grd(0.5, "confidence"),)


def test_a_setting_out_of_range_is_refused() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(BadInput, match="lam is 1.5"):
        grd.fit(lm, grd.example(lm)[0], grd.Config(lam=1.5))
