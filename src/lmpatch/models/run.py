"""Every call to a model: score targets, generate or stream an answer, read hidden states.

Two habits beside those of ``forward`` make it fast: prompts are sorted by length and equal ones run once, and finished
rows leave a generation batch. Where a rule of ``acting`` is on, each prompt has two rows in the batch, with and without
its context, and both get the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from ..data.context import InContext
from ..errors import BadInput
from .acting import Prompt, Rule, Streams, actors, streams
from .choice import Choice
from .forward import HEAD_CHUNK as HEAD_CHUNK  # callers find here whatever runs a model
from .forward import blocks as blocks
from .forward import first as first
from .forward import frozen as frozen
from .forward import head_loss as head_loss
from .forward import hooked as hooked
from .forward import kl as kl
from .forward import logits as logits
from .forward import nll as nll
from .forward import positions as positions
from .lm import LM
from .tokens import pad, pad_id

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what) by everything that takes long."""

Pair = tuple[tuple[int, ...], ...]
"""Token ids of one prompt: with its context, and with a rule on also without."""


@dataclass(frozen=True)
class Score:
    """A target under teacher forcing; one entry per target token."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    argmax: tuple[int, ...]

    @property
    def total(self) -> float:
        """Log probability of the whole target, nats."""
        return sum(self.logprobs)

    @property
    def accuracy(self) -> float:
        """Share of target tokens that are the model's first choice given the right ones before."""
        return sum(a == b for a, b in zip(self.ids, self.argmax, strict=True)) / len(self.ids)


def combined(lm: LM, states: Tensor, rules: Sequence[Rule], memory: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits of the next token under the rules, some prompts at a time.

    Args:
        states: [streams, n, d] after the last block; one stream without rules, two with.
        memory: [rules, n] as in ``Rule.combine``.
    Yields:
        which prompts, and their logits [c, V], fp32.
    """
    size = HEAD_CHUNK // len(states)
    for start in range(0, states.shape[1], size):
        rows = slice(start, start + size)
        z = logits(lm, states[:, rows].flatten(0, 1))  # [streams * c, V]
        full, bare = z.chunk(2) if rules else (z, z)
        for rule, known in zip(rules, memory, strict=True):
            full = rule.combine(full, bare, known[rows])
        yield rows, full


def memories(lm: LM, rules: Sequence[Rule], n: int) -> Tensor:
    """What the rules know before the first token: [rules, n] zeros."""
    return torch.zeros(len(rules), n, dtype=torch.int64, device=lm.device)


@torch.no_grad()
def score(
    lm: LM, prompts: Sequence[Prompt], targets: Sequence[str], *, batch_size: int = 64, progress: Progress | None = None
) -> list[Score]:
    """Score each target after its prompt, teacher-forced.

    Args:
        prompts: texts, or ``InContext`` where a decode patch is on the model: its combined distribution is scored.
    Returns:
        one ``Score`` per prompt, in the order given.
    Raises:
        BadInput: nothing stands before a target, the two are longer than the model's window, or a decode patch is on
            and a prompt is a plain text.
    """
    told = streams(lm, prompts, targets)
    for prompt, rows in zip(prompts, told.rows, strict=True):
        if not all(row.target for row in rows):
            raise BadInput(
                f"nothing stands before the target of {prompt!r}: the tokenizer adds no start token. Give a prompt."
            )
    asked = [(tuple(row.ids for row in rows), tuple(row.target for row in rows)) for rows in told.rows]
    queue = sorted(set(asked), key=lambda key: _longest(key[0]))
    done: dict[tuple[Pair, tuple[int, ...]], Score] = {}
    size = max(1, batch_size // told.width)
    for start in range(0, len(queue), size):
        batch = queue[start : start + size]
        done.update(zip(batch, _scores(lm, told, batch), strict=True))
        if progress:
            progress(start + len(batch), len(queue), "scoring")
    return [done[key] for key in asked]


def _longest(pair: Pair) -> int:
    return max(map(len, pair))


def _scores(lm: LM, told: Streams, batch: Sequence[tuple[Pair, tuple[int, ...]]]) -> list[Score]:
    """One batch of ``score``: (ids, where the target begins) of each stream of each prompt."""
    n, width = len(batch), told.width
    rows = [pair[s] for s in range(width) for pair, _ in batch]
    starts = torch.tensor([targets for _, targets in batch], device=lm.device).T  # [streams, n]
    ids, mask = pad(rows, pad_id(lm), side="right")
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    states = blocks(lm, ids, mask, position_ids=positions(mask), vectors=told.vectors)  # [streams * n, T, d]
    states = states.unflatten(0, (width, n))
    labels = [pair[0][targets[0] :] for pair, targets in batch]
    spots = [(i, k) for i, label in enumerate(labels) for k in range(len(label))]
    # a rule goes through an answer token by token, since it may remember; without one all tokens are alike
    steps = [[s for s in spots if s[1] == k] for k in range(max(map(len, labels)))] if told.rules else [spots]
    memory = memories(lm, told.rules, n)
    found: dict[tuple[int, int], tuple[float, int]] = {}
    for step in steps:
        row, k = torch.tensor(step, device=lm.device).T
        want = ids[row, starts[0, row] + k]
        picked = states[torch.arange(width, device=lm.device)[:, None], row, starts[:, row] + k - 1]  # [streams, c, d]
        known, logp, best = memory[:, row], [], []
        for part, z in combined(lm, picked, told.rules, known):
            logp.append(-F.cross_entropy(z, want[part], reduction="none"))
            best.append(z.argmax(-1))
        memory[:, row] = known
        found.update(zip(step, zip(torch.cat(logp).tolist(), torch.cat(best).tolist(), strict=True), strict=True))
    each = [[found[i, k] for k in range(len(label))] for i, label in enumerate(labels)]
    return [
        Score(label, tuple(p for p, _ in tokens), tuple(a for _, a in tokens))
        for label, tokens in zip(labels, each, strict=True)
    ]


@torch.no_grad()
def hidden(lm: LM, prompts: Sequence[Prompt], *, batch_size: int = 64, progress: Progress | None = None) -> Tensor:
    """The state after the last block at each prompt's last token.

    Returns:
        [n, d] fp32, before the final norm; ``logits`` makes next-token distributions of it.
    Raises:
        BadInput: a decode patch is on the model, which changes no state; ``next_logits`` shows it.
    """
    if any(actor.rules for actor in actors(lm)):
        raise BadInput("a decode patch combines logits, and states do not show it. Call next_logits, or take it off.")
    return last_states(lm, streams(lm, prompts), batch_size=batch_size, progress=progress)[0]


def last_states(lm: LM, told: Streams, *, batch_size: int = 64, progress: Progress | None = None) -> Tensor:
    """The state after the last block at the last token of every row, [streams, n, d] fp32."""
    rows = [pair[s].ids for s in range(told.width) for pair in told.rows]
    queue = sorted(set(rows), key=len)
    done: dict[tuple[int, ...], Tensor] = {}
    for start in range(0, len(queue), batch_size):
        batch = queue[start : start + batch_size]
        ids, mask = pad(batch, pad_id(lm), side="left")
        ids, mask = ids.to(lm.device), mask.to(lm.device)
        states = blocks(lm, ids, mask, position_ids=positions(mask), vectors=told.vectors)  # [n, T, d]
        done.update(zip(batch, states[:, -1].float(), strict=True))
        if progress:
            progress(start + len(batch), len(queue), "reading states")
    return torch.stack([done[row] for row in rows]).view(told.width, len(told.rows), -1)


@torch.no_grad()
def next_kl(lm: LM, base_hidden: Tensor, now_hidden: Tensor, *, chunk: int = HEAD_CHUNK // 2) -> Tensor:
    """KL(p_base || p_now) of next-token distributions from stored states: 2.5 kB a prompt instead of 1 MB.

    Args:
        base_hidden: [n, d] from ``hidden`` on the model before the change.
        now_hidden: [n, d] from ``hidden`` on the changed model. The head must be the same for both.
    Returns:
        [n] nats.
    """
    out = []
    for a, b in zip(base_hidden.split(chunk), now_hidden.split(chunk), strict=True):
        p, q = (logits(lm, h.to(lm.dtype)).log_softmax(-1) for h in (a, b))
        out.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(out)


@torch.no_grad()
def generate(
    lm: LM,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 32,
    stop: Sequence[str] = ("\n",),
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
        stop: a token whose text contains one of these ends the answer and is left out. The model's own
            end tokens always do.
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
    choice = Choice(temperature, top_p, seed)
    given: list[Prompt] = [prompts] if isinstance(prompts, (str, InContext)) else list(prompts)
    told = streams(lm, given, new_tokens=max_new_tokens)
    pairs = _pairs(told)
    numbers = choice.numbers(len(pairs), max_new_tokens).to(lm.device)
    asked = [(pair, i if temperature else 0) for i, pair in enumerate(pairs)]  # draws differ between equal prompts
    queue = sorted(set(asked), key=lambda key: (_longest(key[0]), key[1]))
    places: dict[tuple[Pair, int], list[int]] = {}
    for i, key in enumerate(asked):
        places.setdefault(key, []).append(i)
    ends, size = Ends(lm, stop), max(1, batch_size // told.width)
    done: dict[tuple[Pair, int], str] = {}
    for start in range(0, len(queue), size):
        batch = queue[start : start + size]
        drawn = numbers[[place for _, place in batch]]
        new: list[list[int]] = [[] for _ in batch]
        ended = [False] * len(batch)
        for tokens in _steps(lm, told, [pair for pair, _ in batch], ends, choice, drawn, ended):
            for i, token in tokens:
                new[i].append(token)
                if enough:
                    text = lm.tokenizer.decode(new[i], skip_special_tokens=True)
                    ended[i] = all(enough(place, text) for place in places[batch[i]])
        for key, ids in zip(batch, new, strict=True):
            done[key] = lm.tokenizer.decode(ids, skip_special_tokens=True)
        if progress:
            progress(start + len(batch), len(queue), "generating")
    texts = [done[key] for key in asked]
    return texts[0] if isinstance(prompts, (str, InContext)) else texts


@torch.no_grad()
def stream(
    lm: LM,
    prompt: Prompt,
    *,
    max_new_tokens: int = 32,
    stop: Sequence[str] = ("\n",),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Continue one prompt and give the text in pieces, as it comes; together they are what ``generate`` says.

    Arguments and errors are those of ``generate``. No piece ends within a character.
    """
    choice = Choice(temperature, top_p, seed)
    told = streams(lm, [prompt], new_tokens=max_new_tokens)
    new: list[int] = []
    said = text = ""
    numbers = choice.numbers(1, max_new_tokens).to(lm.device)
    for tokens in _steps(lm, told, _pairs(told), Ends(lm, stop), choice, numbers, [False]):
        new += [token for _, token in tokens]
        text = lm.tokenizer.decode(new, skip_special_tokens=True)
        whole = text.rstrip(" \ufffd")  # a character may come in several tokens, and a blank may go before a point
        if len(whole) > len(said):
            yield whole[len(said) :]
            said = whole
    if len(text) > len(said):
        yield text[len(said) :]


def _pairs(told: Streams) -> list[Pair]:
    pairs: list[Pair] = [tuple(row.ids for row in rows) for rows in told.rows]
    if not all(ids for pair in pairs for ids in pair):
        raise BadInput("an empty prompt tokenises to nothing: this tokenizer adds no start token. Give some text.")
    return pairs


class Ends:
    """Which token ids end an answer. Ids are decoded once each, when they first come up."""

    def __init__(self, lm: LM, stop: Sequence[str]) -> None:
        config = getattr(lm.model, "generation_config", None)
        found = [getattr(config, "eos_token_id", None), lm.tokenizer.eos_token_id]
        self.known = {int(i): True for e in found if e is not None for i in (e if isinstance(e, list) else [e])}
        self.stop, self.tokenizer = tuple(stop), lm.tokenizer

    def __contains__(self, token: int) -> bool:
        if token not in self.known:
            text = self.tokenizer.decode([token])
            self.known[token] = any(s in text for s in self.stop)
        return self.known[token]


def _steps(
    lm: LM,
    told: Streams,
    batch: Sequence[Pair],
    ends: Ends,
    choice: Choice,
    numbers: Tensor,
    ended: list[bool],
) -> Iterator[list[tuple[int, int]]]:
    """Step after step, (row of ``batch``, its new token) for those that go on.

    Rows that ended leave the batch once a quarter of it is idle.

    Args:
        numbers: [n, steps] for ``choice``.
        ended: which rows ended. The caller may end more of them between two steps.
    """
    width, n, limit = told.width, len(batch), numbers.shape[1]
    ids, mask = pad([pair[s] for s in range(width) for pair in batch], pad_id(lm), side="left")  # stream after stream
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    cache = DynamicCache(config=lm.model.config)
    alive = list(range(n))  # batch row -> row of `batch`
    memory = memories(lm, told.rules, n)
    for step in range(limit):
        at = positions(mask)[:, -ids.shape[1] :]
        vectors = told.vectors if step == 0 else None  # later tokens are all real
        states = blocks(lm, ids, mask, position_ids=at, cache=cache, vectors=vectors)[:, -1]  # [streams * n, d]
        scored = combined(lm, states.unflatten(0, (width, -1)), told.rules, memory)
        drawn = numbers[alive, step]
        chosen = torch.cat([choice.take(z, drawn[rows]) for rows, z in scored])  # [n]
        said = [(row, token) for row, token in zip(alive, chosen.tolist(), strict=True) if not ended[row]]
        for row, token in said:
            ended[row] = token in ends
        yield [(row, token) for row, token in said if not ended[row]]
        keep = [i for i, row in enumerate(alive) if not ended[row]]
        if not keep or step + 1 == limit:
            return
        ids, mask = chosen.repeat(width)[:, None], F.pad(mask, (0, 1), value=1)
        if len(keep) <= 0.75 * len(alive):
            pick = torch.tensor([s * len(alive) + i for s in range(width) for i in keep], device=lm.device)
            cache.batch_select_indices(pick)
            ids, mask, memory = ids[pick], mask[pick], memory[:, pick[: len(keep)]]
            alive = [alive[i] for i in keep]
