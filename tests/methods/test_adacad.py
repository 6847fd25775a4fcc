"""AdaCAD has a floor; what it does is tested in tests/patches."""

from __future__ import annotations

import pytest
from tiny import tiny_lm

from lmpatch.errors import BadInput
from lmpatch.methods import adacad
from lmpatch.patches.decode.rules import AdaCAD


def test_the_floor_is_zero_unless_given() -> None:
    lm = tiny_lm("llama")
    records, _ = adacad.example(lm)
    assert adacad.fit(lm, records, adacad.Config()).rules == (AdaCAD(0.0),)
    assert adacad.fit(lm, records, adacad.Config(floor=0.3)).rules == (AdaCAD(0.3),)


def test_a_setting_out_of_range_is_refused() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(BadInput, match="floor is -1.0"):
        adacad.fit(lm, adacad.example(lm)[0], adacad.Config(floor=-1.0))
