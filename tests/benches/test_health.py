"""Health and cost: perplexity by hand, times that are times, memory from above."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from tiny import tiny_lm

from lmpatch.benches import facts
from lmpatch.benches.core.health import latency, peak_memory, seconds, working_memory
from lmpatch.benches.facts import Config
from lmpatch.data.edits import Edit
from lmpatch.inference.plain_text import TEXT, perplexity
from lmpatch.models.lm import LM
from lmpatch.patches.weight.patch import WeightPatch


@pytest.mark.slow
def test_perplexity_is_that_of_the_second_parts_token_by_token(lm: LM) -> None:
    total, count = 0.0, 0
    for start, rest in TEXT:
        skip = len(lm.tokenizer(start).input_ids)
        ids = lm.tokenizer(f"{start} {rest}", return_tensors="pt").input_ids  # [1, T]
        with torch.no_grad():
            logp = lm.model(ids).logits[0, :-1].log_softmax(-1)  # [T - 1, V]
        picked = logp.gather(-1, ids[0, 1:, None])[skip - 1 :]
        total, count = total - float(picked.sum()), count + len(picked)
    assert perplexity(lm) == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.slow
def test_every_time_is_positive_and_a_median() -> None:
    made = latency(tiny_lm("llama"))
    assert set(made) == {"prefill_b1", "token_b1", "prefill_b8", "token_b8"}
    assert made["prefill_b1"] > 0 and made["prefill_b8"] > 0
    waits = iter([0.5, 0.0, 0.0])
    assert seconds(tiny_lm("llama"), lambda: time.sleep(next(waits))) < 0.4


def test_memory_is_counted_from_above() -> None:
    lm = tiny_lm("llama")
    few, many = (working_memory(lm, ["some words"] * n, 32, 64) for n in (1, 64))
    assert 0 < few < many < working_memory(lm, ["some words"] * 64, 64, 64)
    assert (peak_memory(lm) or 0) > 10**7


@pytest.mark.slow
def test_the_time_of_a_commit_is_shared_by_its_edits(
    edits: list[Edit], make: Callable[[LM, Sequence[Edit]], WeightPatch], quick: Config
) -> None:
    lm = tiny_lm("llama")
    record = facts.run(lm, edits, quick, patch=make(lm, edits)).run("rank_one").record
    assert record["edit_s"]["median"] == pytest.approx(0.5 / 6)
    assert record["bytes_per_edit"] == 4 * (64 + 128) / 6
