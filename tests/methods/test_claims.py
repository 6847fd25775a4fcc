"""What the context methods claim, on small models that were trained to remember and to read (``tests/trained.py``).

Everything is chosen on the names that were shown with contexts and measured on the others, for two seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from trained import NAMES, SEEN, UNSEEN, Trained, trained

import lmpatch as lp
from lmpatch.data.context import ContextRecord, render

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("trained")]  # one worker trains the models, once

SEARCHED: dict[str, Any] = {"search_neurons": (4, 8, 12, 16, 24), "search_factors": (3.0, 5.0, 7.0, 10.0, 15.0, 20.0)}


@pytest.fixture(params=[0, 1], scope="module")
def known(request: pytest.FixtureRequest) -> Iterator[Trained]:
    found = trained(request.param)
    before = {name: tensor.clone() for name, tensor in found.lm.model.state_dict().items()}
    yield found
    assert all(torch.equal(before[name], tensor) for name, tensor in found.lm.model.state_dict().items())


def told(known: Trained, records: Sequence[ContextRecord], patch: lp.Patch | None = None) -> tuple[float, float]:
    """Shares answered as the context says, and as the model remembers."""
    with lp.apply(known.lm, patch) if patch else nullcontext():
        said = [text.strip() for text in lp.generate(known.lm, [r.asked for r in records], max_new_tokens=2)]
    pairs = list(zip(said, records, strict=True))
    return sum(s == r.answer for s, r in pairs) / len(pairs), sum(s == r.memory for s, r in pairs) / len(pairs)


def test_the_model_remembers_every_home_and_mostly_stays_with_it(known: Trained) -> None:
    without_context = lp.generate(known.lm, [render("", name) for name in NAMES], max_new_tokens=2)
    assert [text.strip() for text in without_context] == [known.homes[name] for name in NAMES]
    follows, stays = told(known, known.conflicts(UNSEEN, 5))
    assert 0.05 < follows < 0.3 and stays > 0.6


def test_context_aware_neurons_are_worth_more_than_random_ones(known: Trained) -> None:
    dev, test = known.conflicts(SEEN, 2), known.conflicts(UNSEEN, 5)
    patch = lp.fit(known.lm, "ircan", dev, force=True, **SEARCHED)  # plain text is nothing to this model
    neurons, factor = len(patch.notes["neurons"]), float(next(iter(patch.deltas.values())).factor[0])
    control_of = partial(lp.fit, known.lm, "ircan", dev, neurons=neurons, factor=factor, force=True)
    drawn = [control_of(control_seed=s) for s in range(10)]
    (before, stayed), (after, stays) = told(known, test), told(known, test, patch)
    control = sum(told(known, test, one)[0] for one in drawn) / len(drawn)
    assert after > before + 0.08 and after > control + 0.08 and stays < stayed - 0.15
    assert control < before + 0.1


def test_contrast_makes_it_follow_and_costs_nothing_where_both_agree(known: Trained) -> None:
    test = known.conflicts(UNSEEN, 5)
    agree = [known.record(name, known.homes[name]) for name in NAMES]
    before, stayed = told(known, test)
    cad, adacad = (lp.fit(known.lm, name, [], **cfg) for name, cfg in (("cad", {"alpha": 0.5}), ("adacad", {})))
    follows, stays = told(known, test, cad)
    assert follows > before + 0.4 and stays < stayed / 3
    assert told(known, test, adacad)[0] > before + 0.15
    assert told(known, agree)[0] == told(known, agree, cad)[0] == told(known, agree, adacad)[0] == 1
