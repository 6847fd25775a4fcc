"""What benches share that put texts to a model: none longer than its window, and the logits of given tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ...inference.interventions import Prompt, prepare
from ...inference.multiple_choice import next_logits
from ...models.lm import LM


def beyond_window(
    lm: LM, prompts: Sequence[str], targets: Sequence[str] | None = None, new_tokens: int = 0
) -> list[str]:
    """Why each prompt, with its target or new tokens behind it and all that patches put before it, does not fit the
    model's window; "" where it does."""
    window = lm.window
    if window is None or not prompts:
        return [""] * len(prompts)
    rows, _ = prepare(lm, prompts, targets)
    over = f"longer than the model's window of {window} tokens"
    return [over if len(row.ids) + new_tokens > window else "" for row in rows]


def mark_logits(
    lm: LM, prompts: Sequence[Prompt], marks: Sequence[Sequence[int]], batch_size: int
) -> list[tuple[float, ...]]:
    """The logits of each prompt's own tokens behind it."""
    if not prompts:
        return []
    columns = {token: k for k, token in enumerate(sorted({token for ids in marks for token in ids}))}
    table = next_logits(lm, prompts, list(columns), batch_size=batch_size).tolist()  # [n, k]
    return [tuple(row[columns[token]] for token in ids) for row, ids in zip(table, marks, strict=True)]
