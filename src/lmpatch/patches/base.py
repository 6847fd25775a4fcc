"""``Base``: the model a patch was made for, and the check that another one is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import BadPatch, WrongModel
from ..models.lm import LM
from ..models.sharding import sharded
from ..provenance import hash_tensor


@dataclass(frozen=True)
class Base:
    """The model a patch was made for, without any patches on it."""

    fingerprint: str
    """``LM.fingerprint()``: SHA-256 over all weights rounded to bf16."""
    name: str
    touched: dict[str, str] = field(default_factory=dict)
    """Parameter name -> SHA-256 of that tensor rounded to bf16, for every parameter the patch changes."""

    @property
    def any_model(self) -> bool:
        """Whether it is made for no model in particular."""
        return self == ANY

    @classmethod
    def read(cls, header: Mapping[str, Any]) -> Base:
        """From its fields in a file. BadPatch: they are others."""
        fingerprint, name, touched = (header.get(key) for key in ("fingerprint", "name", "touched"))
        hashes = touched.values() if isinstance(touched, dict) else [None]
        if len(header) != 3 or not all(isinstance(text, str) for text in (fingerprint, name, *hashes)):
            raise BadPatch("it does not say which model it was made for.")
        return cls(**header)

    def misfit(self, lm: LM) -> str:
        """The beginning of a message that says that a patch does not fit."""
        return f"a patch made for {self.name} ({self.fingerprint[:12]}) does not fit {lm.name}"

    def require(self, lm: LM) -> None:
        """Raise ``WrongModel`` unless ``lm`` without its patches is this model, weight by weight."""
        if self.any_model:
            return
        whole = fingerprint(lm)
        if whole and whole == self.fingerprint:
            return
        who = self.misfit(lm)
        way = f"Load {self.name} as it was then, or pass strict=False to take any model of these shapes."
        hashes = {name: hash_of(original(lm.model, name)) for name in self.touched}
        differ = [name for name, now in hashes.items() if now and self.touched[name] not in ("", now)]
        if differ:
            raise WrongModel(f"{who}: {', '.join(differ)} had other values. {way}")
        if not whole or not self.fingerprint:
            raise WrongModel(f"{who} for certain: offloaded or quantised weights cannot be compared. {way}")
        raise WrongModel(f"{who} ({whole[:12]}): weights it does not change differ. {way}")


ANY = Base("any", "any model")
"""The base of what asks nothing of a model."""


def original(model: nn.Module, name: str) -> Tensor:
    """The weight as stored, without what patches wrote into it."""
    ledger = getattr(model, "_lmpatch_ledger", None)  # see patches.ledger
    kept: Tensor | None = ledger.originals.get(name) if ledger else None
    return model.get_parameter(name).detach() if kept is None else kept


def is_plain(parameter: Tensor) -> bool:
    """An ordinary tensor, not one of a quantiser's or a parallel library's own classes."""
    return type(parameter) in (nn.Parameter, Tensor) and type(parameter.data) is Tensor


def has_values(weight: Tensor) -> bool:
    """Its numbers can be read here and now."""
    return is_plain(weight) and not weight.is_meta


def hash_of(weight: Tensor) -> str:
    """``hash_tensor``; empty for an offloaded or quantised weight, whose values are not to be had."""
    return hash_tensor(weight) if has_values(weight) else ""


def fingerprint(lm: LM) -> str:
    """``LM.fingerprint``; empty if some weights are offloaded or quantised."""
    here = sharded(lm) or all(map(has_values, lm.model.parameters()))  # a sharded model was hashed before
    return lm.fingerprint() if here else ""
