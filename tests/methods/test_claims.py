"""What the context methods claim, on small models that were trained to remember and to read (``tests/trained.py``).

Everything is chosen on the names that were shown with contexts and measured on the others, for two seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from trained import NAMES, SEEN, TOWNS, UNSEEN, Trained, trained

import lmpatch as lp
from lmpatch.data.context import ContextRecord, render
from lmpatch.data.edits import Edit
from lmpatch.methods import finetune, wilke

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


def moved(known: Trained, count: int) -> list[Edit]:
    """Facts that name another home."""
    pairs = [(name, TOWNS[(TOWNS.index(known.homes[name]) + 7) % len(TOWNS)]) for name in SEEN[:count]]
    return [Edit(render("", name), subject=name, target=town) for name, town in pairs]


def test_a_quick_ranking_on_the_prompt_takes_the_block_that_the_whole_of_rome_takes(known: Trained) -> None:
    cfg = wilke.Config(layers=(0, 1, 2), moment_tokens=2048)
    edits = moved(known, 40)
    quick, slow = (wilke.ranking(known.lm, edits, replace(cfg, rank=rank)).best for rank in ("bare", "full"))
    assert sum(a == b for a, b in zip(quick, slow, strict=True)) >= 0.8 * len(edits)


def test_tuned_on_all_facts_in_each_epoch_more_hold_than_tuned_one_after_the_other(known: Trained) -> None:
    lm, edits, cfg = known.lm, moved(known, 30), finetune.Config(layer=2, epochs=300, lr=3e-3, end="eos")

    def hold() -> float:
        texts = lp.generate(lm, [edit.prompt for edit in edits], max_new_tokens=2)
        return sum(text.strip() == edit.target for text, edit in zip(texts, edits, strict=True)) / len(edits)

    with lp.apply(lm, finetune.fit(lm, edits, cfg)):
        together = hold()
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(lp.apply(lm, finetune.fit(lm, [edit], cfg)))
        after_each_other = hold()
    assert together > 0.9 and after_each_other < together - 0.05  # much less with the first seed, 0.1 with the second
