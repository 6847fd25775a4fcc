"""How the model is: perplexity on fixed text, time per prompt and per token, peak memory."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from ...inference.forward import HEAD_CHUNK
from ...inference.generate import generate
from ...inference.score import score
from ...inference.tokens import encode_all
from ...models.lm import LM

TEXT = (
    ("In the early morning", "the harbour is quiet, and only the gulls follow the first boats out to sea."),
    ("Bread is made from", "flour, water, salt and yeast; the dough must rest before it goes into a hot oven."),
    ("The old library", "has three floors, and on the second one you will find maps, letters and books about travel."),
    ("When water freezes,", "it expands, which is why ice floats and why pipes can burst on a cold winter night."),
    ("She opened the window", "because the room was warm, and from the street she could hear children playing."),
    ("A good argument", "states what it claims, gives reasons for it, and admits what it cannot explain."),
    ("Trains between the two cities", "leave every hour, but on Sundays the last one goes at nine in the evening."),
    ("The human heart", "is a muscle with four chambers, and it beats about a hundred thousand times each day."),
    ("After the election", "the new government promised to repair the roads, build schools and lower the taxes."),
    ("To plant a tree,", "dig a hole twice as wide as the roots, fill it with loose soil and water it well."),
    ("Most of the stars", "that we can see at night are larger and brighter than the sun, but very far away."),
    ("He had never learned", "to swim, so he stayed on the beach and watched the others until it was time to go home."),
)
"""Everyday sentences, about 250 tokens for a common tokenizer: perplexity is taken on the second parts."""
TOKENS = 4


def perplexity(lm: LM) -> float:
    """exp of the mean negative log probability per token of ``TEXT``, the model as it is now."""
    scores = score(lm.plain, [start for start, _ in TEXT], [rest for _, rest in TEXT])
    count = sum(len(score.ids) for score in scores)
    mean = -sum(score.total for score in scores) / count
    return math.exp(mean) if mean < 700 else math.inf


def latency(lm: LM) -> dict[str, float]:
    """Milliseconds of the model as it is now: one prompt's first token and each further one, at batch 1 and 8.

    The median of three; a generation that ends early makes the time per token too small.
    """
    found = {}
    for batch in (1, 8):
        ask = partial(generate, lm, [start for start, _ in TEXT[:batch]], stop=())
        first, more = (seconds(lm, partial(ask, max_new_tokens=tokens)) for tokens in (1, 1 + TOKENS))
        found[f"prefill_b{batch}"] = 1000 * first
        found[f"token_b{batch}"] = 1000 * max(0.0, more - first) / TOKENS
    return found


def seconds(lm: LM, work: Callable[[], object], repeats: int = 3) -> float:
    """Median wall time, the device waited for."""
    times = []
    for _ in range(repeats):
        synchronise(lm)
        start = time.perf_counter()
        work()
        synchronise(lm)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronise(lm: LM) -> None:
    """Wait until the device has done its work."""
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)


def peak_memory(lm: LM) -> int | None:
    """Most bytes held so far: of the device if it is a GPU, else of the process; None where it cannot be told."""
    if lm.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(lm.device))
    if sys.platform == "win32":
        return None
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def working_memory(lm: LM, prompts: list[str], new_tokens: int, batch_size: int) -> int:
    """Bytes that scoring needs on top of the model, from above: cache, activations, logits, stored states."""
    longest = max((len(row.ids) for row in encode_all(lm, prompts)), default=1) + new_tokens
    longest = min(longest, lm.window or longest)  # what is longer is not asked
    layout, item = lm.layout, lm.dtype.itemsize
    rows = min(batch_size, len(prompts))
    cache = 2 * layout.n_layers * rows * longest * layout.d_model * item
    activations = 4 * rows * longest * max(*layout.widths, layout.d_model) * item
    logits = 3 * HEAD_CHUNK * layout.vocab * 4
    return cache + activations + logits + 2 * len(prompts) * layout.d_model * 4
