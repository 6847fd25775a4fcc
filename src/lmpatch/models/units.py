"""Where something is inside a model. Layers and indices are 0-based; negative layers count from the end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Neuron:
    """One input of a block's down-projection, taken after the gate: a column of its weight, seen as (out, in)."""

    layer: int
    index: int


@dataclass(frozen=True, order=True)
class Head:
    """One query head of a block's attention."""

    layer: int
    index: int


@dataclass(frozen=True, order=True)
class Layer:
    """One block."""

    layer: int


@dataclass(frozen=True, order=True)
class Parameter:
    """One parameter by its dotted name, as in ``state_dict``."""

    name: str
