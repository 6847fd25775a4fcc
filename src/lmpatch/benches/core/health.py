"""How the model is: time per prompt and per token, peak memory."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from ...inference.forward import HEAD_CHUNK
from ...inference.generate import generate
from ...inference.plain_text import TEXT
from ...inference.tokens import encode_all
from ...models.lm import LM

TOKENS = 4


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
