"""What methods that scale neurons share: from the neurons that records name to a patch."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch

from ..errors import BadInput
from ..models.lm import LM
from ..models.units import Neuron
from ..patches.weight.delta import Scale, When
from ..patches.weight.patch import WeightPatch

Named = Sequence[tuple[int, int, float]]
"""(layer, index, score) of the neurons one record names."""


def ranked(named: Iterable[Named], ties: Literal["score", "first_seen"] = "score") -> list[tuple[Neuron, int]]:
    """Every neuron that some record names, and by how many it is named; the most named first.

    Args:
        ties: neurons named equally often are ordered by their summed score, then by address; or, as in released
            code, by when they were first seen.
    """
    counts: dict[Neuron, int] = {}
    sums: dict[Neuron, float] = {}
    for neurons in named:
        for layer, index, score in neurons:
            neuron = Neuron(layer, index)
            counts[neuron] = counts.get(neuron, 0) + 1
            sums[neuron] = sums.get(neuron, 0.0) + score
    if ties == "first_seen":
        return sorted(counts.items(), key=lambda item: -item[1])
    return sorted(counts.items(), key=lambda item: (-item[1], -sums[item[0]], item[0]))


def drawn(lm: LM, count: int, seed: int) -> list[Neuron]:
    """That many neurons of the model at random, each once: the control."""
    ends = list(accumulate(lm.layout.widths))  # of each block's neurons, counted through the model
    places = random.Random(seed).sample(range(ends[-1]), count)
    return [Neuron(i, place - ends[i] + lm.layout.widths[i]) for place in places for i in [bisect_right(ends, place)]]


def check(neurons: int, factor: float) -> None:
    """Raise ``BadInput`` at a count or factor that cannot be used."""
    if neurons < 1:
        raise BadInput(f"neurons is {neurons}. Scale at least 1.")
    if not math.isfinite(factor):
        raise BadInput(f"factor is {factor}. Give a finite number; 0 mutes the neurons.")


def need(count: int, found: Sequence[object], records: int) -> None:
    """Raise ``BadInput`` if the records name fewer neurons than that."""
    if not found:
        raise BadInput(
            f"none of {records} records names a neuron: with their contexts no neuron raises p(answer). Check that "
            "the contexts state the answers."
        )
    if len(found) < count:
        raise BadInput(
            f"{records} records name {len(found)} neurons, and {count} are to be scaled. Scale fewer, or give more "
            "records."
        )


def scaling(lm: LM, neurons: Sequence[Neuron], factor: float, *, when: When = "always", **made: Any) -> WeightPatch:
    """The patch that multiplies the down-projection columns of these neurons; ``made`` as in ``WeightPatch.make``."""
    layout = lm.layout
    deltas = {}
    for layer in sorted({neuron.layer for neuron in neurons}):
        index = torch.tensor(sorted(n.index for n in neurons if n.layer == layer))
        shape = (layout.d_model, layout.widths[layer])
        factors = torch.full((len(index),), float(factor))
        deltas[layout.weight(layout.downs[layer])] = Scale(index, factors, shape, when=when)
    return WeightPatch.make(lm, deltas, **made)
