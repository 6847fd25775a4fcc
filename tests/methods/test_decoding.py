"""A decoding method packs its rule; what the rules do is tested in tests/patches."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_lm

from lmpatch import BadInput, fit, registry
from lmpatch.methods.decoding import ENTRIES
from lmpatch.patches.decode.rules import AdaCAD, Arr, Coiecd, Grd, Power, Rule


@pytest.mark.parametrize(
    ("name", "settings", "rule"),
    [
        ("adacad", {}, AdaCAD(0.0)),
        ("adacad", {"floor": 0.3}, AdaCAD(0.3)),
        ("arr", {}, Arr()),
        ("cad", {}, Power(1.5)),
        ("cad", {"alpha": 0.0}, Power(1.0)),
        ("coiecd", {}, Coiecd(1.0, 4.0)),
        ("coiecd", {"ratio": 2.0, "tail": True}, Coiecd(1.0, 2.0, tail=True)),
        ("grd", {}, Grd(0.75)),
        ("grd", {"lam": 0.5, "gate": "confidence"}, Grd(0.5, "confidence")),
        ("power", {}, Power(0.5)),
        ("power", {"tau": 0.25}, Power(0.25)),
    ],
)
def test_the_patch_is_the_rule(name: str, settings: dict[str, Any], rule: Rule) -> None:
    patch = fit(tiny_lm("llama"), name, [], **settings)
    assert patch.rules == (rule,)
    assert (patch.method, set(settings) <= set(patch.config)) == (name, True)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("adacad", {"floor": -1.0}, "floor is -1.0"),
        ("cad", {"alpha": float("inf")}, "tau is inf"),
        ("coiecd", {"ratio": 0.0}, "ratio is 0.0"),
        ("grd", {"lam": 1.5}, "lam is 1.5"),
        ("power", {"tau": float("nan")}, "tau is nan"),
    ],
)
def test_a_number_out_of_range_is_refused(name: str, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        fit(tiny_lm("llama"), name, [], **setting)


def test_every_entry_is_a_method_with_its_source() -> None:
    for name, what in ENTRIES.items():
        assert registry.method(name).doc.startswith(what)
        assert "Source:" in registry.method(name).doc
