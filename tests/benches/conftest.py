"""Facts and hand-made patches for the bench: no method is needed to test how methods are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from lmpatch.benches.facts import Config
from lmpatch.data.edits import Ask, Edit
from lmpatch.models.lm import LM
from lmpatch.patches.weight.delta import LowRank
from lmpatch.patches.weight.patch import WeightPatch

Maker = Callable[[LM, Sequence[Edit]], WeightPatch]
PLACES = ("Paris", "Rome", "Tokyo", "Seattle", "Japan", "Italy")


def rank_one(lm: LM, edits: Sequence[Edit], strength: float = 0.3) -> WeightPatch:
    """A patch that depends on its edits, on the second block's down-projection."""
    name = lm.layout.weight(lm.layout.downs[1])
    source = torch.Generator().manual_seed(sum(map(ord, "".join(edit.prompt for edit in edits))))
    b = strength * torch.randn(lm.layout.d_model, 1, generator=source)
    a = strength * torch.randn(1, lm.layout.d_ff, generator=source)
    return WeightPatch.make(lm, {name: LowRank(b, a)}, method="rank_one", edits=edits, seconds=0.5)


@pytest.fixture(scope="session")
def make() -> Maker:
    """Makes a patch of a commit."""
    return rank_one


@pytest.fixture(scope="session")
def edits() -> list[Edit]:
    """Six facts with everything a case can ask."""
    return [
        Edit(
            f"The tower of {place} is in",
            "Rome" if place != "Rome" else "Paris",
            f"tower of {place}",
            old=place,
            rephrases=[f"You find the tower of {place} in"],
            locality={
                "same_relation": [Ask(f"The capital of {place} is", (place,))],
                "same_subject": [Ask(f"The tower of {place} was built by", ("Jobs",))],
            },
            portability={"reasoning": [Ask(f"Near the tower of {place} they speak", ("Italian",))]},
            id=place,
        )
        for place in PLACES
    ]


@pytest.fixture(scope="session")
def quick() -> Config:
    """Short answers, no timing."""
    return Config(max_new_tokens=4, latency=False, bootstrap=20, pack=0)
