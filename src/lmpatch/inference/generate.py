"""Answers: generated in batches, or streamed one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from ..data.context import InContext
from ..errors import BadInput
from ..models.lm import LM
from ..progress import Progress
from .forward import blocks, positions
from .interventions import Pair, Prompt, Streams, combined, in_context, initial_states, longest, stored_changes, streams
from .tokens import each_once, padded

CONTROL = frozenset({"<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"})
"""Tokens of Gemma that no text holds and that a tokenizer read from a .gguf file does not mark as special."""
LONGEST, DRAWS = 1_000_000, 1 << 28  # new tokens of an answer, and numbers drawn for all answers of a call, at most


@dataclass(frozen=True)
class Sampling:
    """How the next token is taken from its logits."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, Real) or not 0 <= self.temperature < math.inf:
            raise BadInput(f"temperature is {self.temperature!r}. Give a number from 0; 0 is greedy.")
        if not isinstance(self.top_p, Real) or not 0 < self.top_p <= 1:
            raise BadInput(f"top_p is {self.top_p!r}. Give a number in 0..1 above 0; 1 draws from all tokens.")
        if not isinstance(self.seed, Integral) or not -(2**63) <= self.seed < 2**63:
            raise BadInput(f"seed is {self.seed!r}. Give a whole number of at most 63 bits.")

    def numbers(self, n: int, steps: int, device: torch.device | None = None) -> Tensor:
        """One uniform number for each token to come, [n, steps]; a view of zeros where none is drawn."""
        most = LONGEST if not self.temperature else min(LONGEST, DRAWS // max(1, n))
        if not isinstance(steps, Integral) or not 0 <= steps <= most:
            raise BadInput(f"max_new_tokens is {steps!r}. Give a whole number in 0..{most:,}.")
        if not self.temperature:
            return torch.zeros(1, 1, device=device).expand(n, steps)
        return torch.rand(n, steps, generator=torch.Generator().manual_seed(int(self.seed))).to(device)

    def take(self, z: Tensor, u: Tensor) -> Tensor:
        """Tokens [n] from logits [n, V] and uniform numbers [n]."""
        if not self.temperature:
            return z.argmax(-1)
        below = (z - z.amax(-1, keepdim=True)) / max(self.temperature, 1e-30)  # finite in fp32
        p, order = below.softmax(-1).sort(-1, descending=True)
        mass = p.cumsum(-1)
        last = ((mass - p < self.top_p).sum(-1, keepdim=True) - 1).clamp(min=0)  # of the likeliest that reach top_p
        place = torch.searchsorted(mass, u[:, None] * mass.gather(-1, last), right=True)
        return order.gather(-1, place.minimum(last))[:, 0]


@torch.no_grad()
def generate(
    lm: LM,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 32,
    stop: Sequence[str] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    enough: Callable[[int, str], bool] | None = None,
    progress: Progress | None = None,
) -> Any:
    """Continue each prompt, greedily unless a temperature is given.

    Args:
        prompts: one or many; prompts of different length share a batch, padded on the left. Texts, or ``InContext``
            where a decode patch is on the model.
        max_new_tokens: at most this many new tokens.
        stop: a token whose text contains one of these ends the answer and is left out. The model's own end tokens
            always do, and those that stand for turns and images. None: a new line, but for a chat model, which ends
            its replies itself.
        temperature: what logits are divided by before a token is drawn; 0 takes the likeliest one.
        top_p: draw from the likeliest tokens that together reach this probability.
        seed: of the draws. They depend on it and on a prompt's place in the list, not on the batch it is in.
        enough: called after each token with a prompt's place in the list and its answer so far; True ends the answer.
    Returns:
        the new text only; a list if a list was given.
    Raises:
        BadInput: a prompt tokenises to nothing, or the model's window does not hold it and the new tokens; a decode
            patch is on and a prompt is a plain text.
    """
    sampling = Sampling(temperature, top_p, seed)
    questions: list[Prompt] = [prompts] if isinstance(prompts, (str, InContext)) else list(prompts)
    numbers = sampling.numbers(len(questions), max_new_tokens, lm.device)
    inputs = streams(lm, questions, new_tokens=max_new_tokens)
    pairs = _pairs(inputs)
    keys = [(pair, i if temperature else 0) for i, pair in enumerate(pairs)]  # draws differ between equal prompts
    places: dict[tuple[Pair, int], list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    ends, answers = StopTokens(lm, stop), dict[tuple[Pair, int], str]()
    size = batch_size // inputs.width
    for batch in each_once(keys, lambda key: (longest(key[0]), key[1]), size, progress, "generating"):
        new: list[list[int]] = [[] for _ in batch]
        ended = [False] * len(batch)
        drawn = numbers[[place for _, place in batch]] if temperature else numbers[: len(batch)]
        for tokens in steps(lm, inputs, [pair for pair, _ in batch], ends, sampling, drawn, ended):
            for i, token in tokens:
                new[i].append(token)
                if enough:
                    text = lm.tokenizer.decode(new[i], skip_special_tokens=True)
                    ended[i] = all(enough(place, text) for place in places[batch[i]])
        for key, ids in zip(batch, new, strict=True):
            answers[key] = lm.tokenizer.decode(ids, skip_special_tokens=True)
    texts = [answers[key] for key in keys]
    return texts[0] if isinstance(prompts, (str, InContext)) else texts


@torch.no_grad()
def stream(
    lm: LM,
    prompt: Prompt,
    *,
    max_new_tokens: int = 32,
    stop: Sequence[str] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Continue one prompt and give the text in pieces, as it comes; together they are what ``generate`` gives.

    Arguments and errors are those of ``generate``. No piece ends within a character.
    """
    sampling = Sampling(temperature, top_p, seed)
    numbers = sampling.numbers(1, max_new_tokens, lm.device)
    inputs = streams(lm, [prompt], new_tokens=max_new_tokens)
    new: list[int] = []
    sent = text = ""
    for tokens in steps(lm, inputs, _pairs(inputs), StopTokens(lm, stop), sampling, numbers, [False]):
        new += [token for _, token in tokens]
        text = lm.tokenizer.decode(new, skip_special_tokens=True)
        whole = text.rstrip(" \ufffd")  # a character may come in several tokens, and a blank may go before a point
        if len(whole) > len(sent):
            yield whole[len(sent) :]
            sent = whole
    if len(text) > len(sent):
        yield text[len(sent) :]


def _pairs(inputs: Streams) -> list[Pair]:
    if not all(row.ids for pair in inputs.rows for row in pair):
        raise BadInput("an empty prompt tokenises to nothing: this tokenizer adds no start token. Give some text.")
    return [*inputs.rows]


class StopTokens:
    """Which token ids end an answer. Ids are decoded once each, when they first come up."""

    def __init__(self, lm: LM, stop: Sequence[str] | None) -> None:
        config = getattr(lm.model, "generation_config", None)
        end = [getattr(config, "eos_token_id", None), lm.tokenizer.eos_token_id]
        self.known = {i: True for e in end for i in (e if isinstance(e, list) else [e]) if isinstance(i, int)}
        own = (() if lm.chat else ("\n",)) if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
        if odd := [text for text in own if not isinstance(text, str) or not text]:
            raise BadInput(f"stop holds {odd[0]!r}. Give texts that end an answer, or () for none.")
        self.stop, self.tokenizer = own, lm.tokenizer

    def __contains__(self, token: int) -> bool:
        if token not in self.known:
            text = self.tokenizer.decode([token])
            self.known[token] = text in CONTROL or any(s in text for s in self.stop)
        return self.known[token]


def steps(
    lm: LM,
    inputs: Streams,
    batch: Sequence[Pair],
    ends: StopTokens,
    sampling: Sampling,
    numbers: Tensor,
    ended: list[bool],
) -> Iterator[list[tuple[int, int]]]:
    """Step after step, (row of ``batch``, its new token) for those that go on; ``numbers`` [n, steps] are drawn by.

    Rows that ended leave the batch once a quarter of it is idle. The caller may end more of them between two steps.
    """
    width, n, limit = inputs.width, len(batch), numbers.shape[1]
    rows = [pair[s] for s in range(width) for pair in batch]  # stream after stream
    ids, mask = padded(lm, [row.ids for row in rows], side="left")
    context, changes = in_context(lm, rows), stored_changes(lm, rows)
    prompt_end = torch.full((len(ids),), ids.shape[1] - 1, device=lm.device)  # all prompts end in one column
    cache = DynamicCache(config=lm.model.config)
    alive = list(range(n))  # batch row -> row of `batch`
    state = initial_states(lm, inputs.rules, n)
    vectors, row_state = inputs.vectors, dict[Any, Tensor | None]()
    for step in range(limit):
        at = positions(mask)[:, -ids.shape[1] :]
        own = numbers[alive, step]
        with lm.lock:
            states = blocks(
                lm, ids, mask, position_ids=at, cache=cache, vectors=vectors, prompt_end=prompt_end, in_context=context,
                row_state=row_state,
                changes=changes,
            )[:, -1]  # fmt: skip
            scores = combined(lm, states.unflatten(0, (width, -1)), inputs.rules, state)
            tokens = torch.cat([sampling.take(z, own[rows]) for rows, z in scores])  # [n]
        vectors = None  # later tokens are all real
        going = [(row, token) for row, token in zip(alive, tokens.tolist(), strict=True) if not ended[row]]
        for row, token in going:
            ended[row] = token in ends
        yield [(row, token) for row, token in going if not ended[row]]
        keep = [i for i, row in enumerate(alive) if not ended[row]]
        if not keep or step + 1 == limit:
            return
        ids, mask = tokens.repeat(width)[:, None], F.pad(mask, (0, 1), value=1)
        if len(keep) <= 0.75 * len(alive):
            pick = torch.tensor([s * len(alive) + i for s in range(width) for i in keep], device=lm.device)
            cache.batch_select_indices(pick)
            ids, mask, state = ids[pick], mask[pick], state[:, pick[: len(keep)]]
            prompt_end, alive = prompt_end[pick], [alive[i] for i in keep]
            context = None if context is None else context[pick]
            row_state = {key: known if known is None else known[pick] for key, known in row_state.items()}
            changes = changes and {number: places[pick] for number, places in changes.items()}
