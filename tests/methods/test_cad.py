"""CAD is the power family with exponent 1 + alpha; what it does is tested in tests/patches."""

from __future__ import annotations

import pytest
from tiny import tiny_lm

from lmpatch.errors import BadInput
from lmpatch.methods import cad
from lmpatch.patches.decode.rules import Power


def test_the_exponent_is_one_plus_alpha() -> None:
    lm = tiny_lm("llama")
    records, _ = cad.example(lm)
    assert cad.fit(lm, records, cad.Config()).rules == (Power(1.5),)
    assert cad.fit(lm, records, cad.Config(alpha=0.0)).rules == (Power(1.0),)


def test_a_setting_out_of_range_is_refused() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(BadInput, match="tau is inf"):
        cad.fit(lm, cad.example(lm)[0], cad.Config(alpha=float("inf")))
