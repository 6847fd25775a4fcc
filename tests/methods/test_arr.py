"""ARR has no settings; what it does is tested in tests/patches."""

from __future__ import annotations

from tiny import tiny_lm

from lmpatch.methods import arr
from lmpatch.patches.decode.rules import Arr


def test_the_patch_is_the_rule() -> None:
    lm = tiny_lm("llama")
    records, _ = arr.example(lm)
    assert arr.fit(lm, records, arr.Config()).rules == (Arr(),)
