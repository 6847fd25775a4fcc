"""What a user writes becomes a checked ``Config``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpatch.config import describe_fields, parse, resolve
from lmpatch.errors import BadInput


@dataclass(frozen=True)
class Config:
    """A method's numbers."""

    layer: int | None = None
    """Block that is written,
    0-based."""
    layers: tuple[int, ...] = (1, 2)
    lr: float = 0.5
    """Step size."""
    exact: bool = False
    loss: Literal["target", "prompt_last"] = "target"
    note: str | None = None


@dataclass(frozen=True)
class Child(Config):
    """Inherits, and adds one."""

    extra: int = 1
    """One more."""


@pytest.mark.parametrize(
    ("pair", "name", "value"),
    [
        ("layer=5", "layer", 5),
        ("layer=none", "layer", None),
        ("layers=4,5, 6", "layers", (4, 5, 6)),
        ("layers=[4]", "layers", (4,)),
        ("lr=1e-3", "lr", 1e-3),
        ("lr=1", "lr", 1.0),
        ("exact=TRUE", "exact", True),
        ("exact=off", "exact", False),
        ("loss=prompt_last", "loss", "prompt_last"),
        ("note=a=b", "note", "a=b"),
        ("note=5", "note", "5"),
    ],
)
def test_a_text_is_read_by_the_type_of_its_field(pair: str, name: str, value: Any) -> None:
    found = parse(Config, [pair])
    assert found == {name: value}
    assert type(found[name]) is type(value)
    assert getattr(resolve(Config, found), name) == value


@pytest.mark.parametrize("pair", ["layer=five", "layer=1.5", "lr=fast", "exact=maybe", "loss=both", "layers=1,x"])
def test_a_text_of_another_type_is_refused_with_the_type_it_must_have(pair: str) -> None:
    with pytest.raises(BadInput, match=r"setting \w+ is '.*'; it must be "):
        parse(Config, [pair])


@pytest.mark.parametrize(
    "given_",
    [{"layer": "5"}, {"layer": 5.0}, {"layer": True}, {"lr": "x"}, {"exact": 1}, {"loss": "both"}, {"layers": 4}],
)
def test_a_value_of_another_type_is_refused(given_: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="it must be"):
        resolve(Config, given_)


def test_a_whole_number_is_a_float_and_a_list_is_a_tuple() -> None:
    config = resolve(Config, {"lr": 1, "layers": [3]})
    assert (config.lr, config.layers) == (1.0, (3,))
    assert isinstance(config.lr, float)


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"no setting 'layerz'. Did you mean layer"):
        resolve(Config, {"layerz": 1})


def test_a_setting_without_an_equals_sign_is_refused() -> None:
    with pytest.raises(BadInput, match="key=value"):
        parse(Config, ["layer"])


def test_fields_are_described_with_type_default_and_meaning() -> None:
    rows = {row[0]: row[1:] for row in describe_fields(Config)}
    assert rows["layer"] == ("none or a whole number", "none", "Block that is written, 0-based.")
    assert rows["layers"] == ("a list of a whole number", "(1, 2)", "")
    assert rows["loss"][0] == "'target' or 'prompt_last'"


def test_inherited_fields_keep_their_meaning() -> None:
    rows = {row[0]: row[3] for row in describe_fields(Child)}
    assert (rows["lr"], rows["extra"]) == ("Step size.", "One more.")


@pytest.mark.parametrize("pair", ["lr=nan", f"layer={10**400}", f"layers=1,{2**63}", f"layer={'1' * 5000}"])
def test_a_number_that_no_library_takes_is_refused(pair: str) -> None:
    with pytest.raises(BadInput, match="it must be") as caught:
        parse(Config, [pair])
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("given_", [{"lr": float("nan")}, {"lr": 10**400}, {"layer": -(2**63)}, {"layers": [2**64]}])
def test_a_value_that_no_library_takes_is_refused(given_: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="it must be"):
        resolve(Config, given_)


WHOLE = st.integers(1 - 2**63, 2**63 - 1)


@pytest.mark.slow
@given(st.builds(Config, layer=st.none() | WHOLE, lr=st.floats(allow_nan=False), exact=st.booleans()))
def test_what_str_writes_parse_reads(config: Config) -> None:
    pairs = [f"{name}={getattr(config, name)}" for name in ("layer", "lr", "exact", "loss")]
    assert resolve(Config, parse(Config, pairs)) == config
