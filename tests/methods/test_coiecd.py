"""COIECD has the released numbers; what it does is tested in tests/patches."""

from __future__ import annotations

import pytest
from tiny import tiny_lm

from lmpatch.errors import BadInput
from lmpatch.methods import coiecd
from lmpatch.patches.decode.rules import Coiecd


def test_the_tail_is_off_unless_asked_for() -> None:
    lm = tiny_lm("llama")
    records, _ = coiecd.example(lm)
    assert coiecd.fit(lm, records, coiecd.Config()).rules == (Coiecd(1.0, 4.0),)
    assert coiecd.fit(lm, records, coiecd.Config(ratio=2.0, tail=True)).rules == (Coiecd(1.0, 2.0, tail=True),)


def test_a_setting_out_of_range_is_refused() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(BadInput, match="ratio is 0.0"):
        coiecd.fit(lm, coiecd.example(lm)[0], coiecd.Config(ratio=0.0))
