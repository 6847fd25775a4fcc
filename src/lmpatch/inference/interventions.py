"""What a patch may do while inference runs: before the prompt, inside the blocks, on the logits.

Scoring, generation and hidden states use an ``Intervention`` alike, so what is scored is what would be generated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..data.context import InContext
from ..errors import BadInput
from ..models.hooks import Hook
from ..models.lm import LM
from .forward import HEAD_CHUNK, logits
from .tokens import Row, encode_all

Prompt = str | InContext
"""What a model is asked. Without a rule on the model, an ``InContext`` is its ``prompt``."""

Pair = tuple[Row, ...]
"""One prompt, tokenised: with its context, and with a rule on also without."""


@dataclass(frozen=True)
class Insert:
    """What goes before one prompt: text, or continuous prompt vectors."""

    text: str = ""
    """Put before the prompt as it is."""
    vectors: Tensor | None = None
    """[P, d] in the space of the embedding module's output."""
    at: Literal["front", "after_bos"] = "after_bos"
    """Where vectors go: before everything, or behind the beginning-of-sequence token where there is one; in a chat at
    the beginning of the user's message."""
    change: tuple[int, int] | None = None
    """A stored change of weights that acts on this prompt alone: the number of the intervention whose hooks know it,
    and its place there. ``forward.current_pass()`` tells them."""


class Rule(ABC):
    """How two streams become one: the next token's logits behind a prompt, and behind it without its context."""

    pointwise: ClassVar[bool] = False
    """A token's score depends on that token's two logits alone, up to a constant that all tokens share."""

    @abstractmethod
    def combine(self, with_context: Tensor, without_context: Tensor, state: Tensor) -> Tensor:
        """One step of n answers: [n, V] logits of the combined distribution.

        Args:
            with_context: [n, V] logits with context, fp32. May be overwritten.
            without_context: [n, V] logits without. Left alone.
            state: [n] int64, what the rule knows about each answer so far: 0 before its first token, written in place.
        """


class Intervention:
    """A patch at work: before a prompt, inside the blocks, on the logits, or several of these."""

    hooks: tuple[Hook, ...] = ()
    """On the model's modules while the patch is on. ``forward.current_pass()`` tells them which tokens are prompt."""
    rules: tuple[Rule, ...] = ()
    """Applied one after the other: each takes the scores of the one before as the stream with context."""

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        self.hooks = tuple(hooks)

    def retrieve(self, prompts: Sequence[str]) -> list[Insert | None]:
        """What to put before each prompt; None leaves it alone. The answer is never part of ``prompts``."""
        return [None] * len(prompts)


def interventions(lm: LM) -> tuple[Intervention, ...]:
    """The interventions of the patches on this model, in the order they went on."""
    ledger = getattr(lm.model, "_lmpatch_ledger", None)  # see patches.ledger
    return ledger.interventions if ledger else ()


@dataclass(frozen=True)
class Streams:
    """Tokenised prompts, as the rules on the model need them."""

    rules: tuple[Rule, ...]
    rows: Sequence[Pair]
    """For each prompt its row; with rules a second one, without context. Both have the same target tokens."""
    vectors: Tensor | None
    """See ``prepare``."""

    @property
    def width(self) -> int:
        """Streams per prompt."""
        return 2 if self.rules else 1


def streams(lm: LM, prompts: Sequence[Prompt], targets: Sequence[str] | None = None, *, new_tokens: int = 0) -> Streams:
    """Tokenise prompts and targets for everything that acts on the model.

    Where every prompt is the same without its context there is one stream: each rule leaves two equal ones as they are.

    Raises:
        BadInput: a rule is on, and a prompt does not say what it is without its context; or a row, with so many new
            tokens, is longer than the model's window.
    """
    if isinstance(prompts, str) or isinstance(targets, str):
        raise BadInput("prompts and targets are lists of texts here. Put the one text into a list.")
    if odd := [prompt for prompt in [*prompts, *(targets or ())] if not isinstance(prompt, str | InContext)]:
        raise BadInput(f"a prompt or target is a text, found {odd[0]!r}.")
    if targets is not None and len(targets) != len(prompts):
        raise BadInput(f"{len(prompts)} prompts were given with {len(targets)} targets. Give one for each.")
    rules = tuple(rule for intervention in interventions(lm) for rule in intervention.rules)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if rules and texts:
        raise BadInput(
            f"a decode patch compares a prompt with its form without context, and {texts[0][:60]!r} is one text. Give "
            "InContext(prompt=..., without_context=...) (lmpatch ask: --context), or take the patch off."
        )
    with_context = [prompt if isinstance(prompt, str) else prompt.prompt for prompt in prompts]
    without_context = [prompt.without_context for prompt in prompts if isinstance(prompt, InContext)]
    alone = not rules or without_context == with_context
    carry = [isinstance(prompt, InContext) and prompt.prompt != prompt.without_context for prompt in prompts]
    wanted = None if targets is None else [*targets] * (1 if alone else 2)
    rows, vectors = prepare(lm, with_context if alone else with_context + without_context, wanted)
    need_window(lm, [row.ids for row in rows], new_tokens)
    if alone:
        return Streams((), [(replace(row, in_context=has),) for row, has in zip(rows, carry, strict=True)], vectors)
    pairs = zip(rows[: len(with_context)], rows[len(with_context) :], carry, strict=True)
    # the tokens at the border may depend on what stands before it: the stream with context says what the target is
    shared = [
        (replace(one, in_context=has), replace(two, ids=two.ids[: two.target] + one.ids[one.target :]))
        for one, two, has in pairs
    ]
    return Streams(rules, shared, vectors)


def prepare(lm: LM, prompts: Sequence[str], targets: Sequence[str] | None = None) -> tuple[list[Row], Tensor | None]:
    """Tokenise prompts and targets with everything the model's interventions put before them.

    A position that holds a vector instead of a token has a negative id: -1 - its row in the table. So equal rows stay
    equal, and padding, masks, positions and caches treat it as the token it stands for.

    Returns:
        the rows, and the table [m, d] of vectors; None if there are none.
    """
    texts = list(prompts)
    found = [intervention.retrieve(list(prompts)) for intervention in interventions(lm)] if prompts else []
    for inserts in found:
        texts = [(i.text if i else "") + text for i, text in zip(inserts, texts, strict=True)]
    rows = encode_all(lm, texts, targets)
    table: list[Tensor] = []
    known: dict[int, tuple[int, ...]] = {}  # the same tensor for two prompts is the same ids
    for i, insert in (pair for inserts in found for pair in enumerate(inserts)):
        if insert is not None and insert.vectors is not None:
            key = id(insert.vectors)
            if key not in known:
                known[key] = tuple(-1 - len(table) - k for k in range(len(insert.vectors)))
                table += insert.vectors
            rows[i] = inserted(lm, rows[i], known[key], insert.at)
    for i, own in enumerate(zip(*found, strict=True)):
        if changes := tuple(insert.change for insert in own if insert and insert.change):
            rows[i] = replace(rows[i], changes=changes)
    return rows, torch.stack(table).to(lm.device) if table else None


def need_window(lm: LM, rows: Sequence[Sequence[int]], new_tokens: int = 0) -> None:
    """Raise ``BadInput`` if a row of token ids, and so many tokens behind it, do not fit into the model's window."""
    for row in rows:
        if lm.window is not None and len(row) + new_tokens > lm.window:
            raise BadInput(
                f"the text that begins {lm.tokenizer.decode([i for i in row[:20] if i >= 0])!r} takes {len(row)} tokens"
                f"{f' and {new_tokens} new ones' if new_tokens else ''}, and {lm.name} reads {lm.window}. Shorten its "
                "context: it is not cut for you."
            )


def inserted(lm: LM, row: Row, ids: tuple[int, ...], at: str) -> Row:
    """The row with ids put before it, or behind its beginning-of-sequence token and what opens a chat."""
    opening = () if at == "front" else _opening(lm.tokenizer, lm.chat.head if lm.chat else "")
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(opening, row.ids, strict=False)))
    return Row((*row.ids[:start], *ids, *row.ids[start:]), row.target + len(ids))


@lru_cache(maxsize=8)
def _opening(tokenizer: Any, head: str) -> tuple[int, ...]:
    """Ids before the first one of a prompt."""
    bos = tokenizer.bos_token_id
    return tuple(tokenizer(head)["input_ids"]) if head else () if bos is None else (bos,)


def combined(lm: LM, states: Tensor, rules: Sequence[Rule], state: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits of the next token under the rules, some prompts at a time: which ones, and [c, V] fp32.

    Args:
        states: [streams, n, d] after the last block; one stream without rules, two with.
        state: [rules, n] as in ``Rule.combine``.
    """
    size = HEAD_CHUNK // len(states)
    for start in range(0, states.shape[1], size):
        rows = slice(start, start + size)
        z = logits(lm, states[:, rows].flatten(0, 1))  # [streams * c, V]
        with_context, without_context = z.chunk(2) if rules else (z, z)
        for rule, known in zip(rules, state, strict=True):
            with_context = rule.combine(with_context, without_context, known[rows])
        yield rows, with_context


def initial_states(lm: LM, rules: Sequence[Rule], n: int) -> Tensor:
    """What the rules know before the first token: [rules, n] zeros."""
    return torch.zeros(len(rules), n, dtype=torch.int64, device=lm.device)


def longest(pair: Pair) -> int:
    return max(len(row.ids) for row in pair)


def in_context(lm: LM, rows: Sequence[Row]) -> Tensor | None:
    """Which rows carry a context, [n] bool; None: no row does."""
    return torch.tensor([row.in_context for row in rows], device=lm.device) if any(r.in_context for r in rows) else None


def stored_changes(lm: LM, rows: Sequence[Row]) -> dict[int, Tensor] | None:
    """Which stored change acts on each row: the intervention's number -> places [n], -1 where none does; None: nowhere
    does one."""
    numbers = sorted({number for row in rows for number, _ in row.changes})
    own = [dict(row.changes) for row in rows]
    return {n: torch.tensor([row.get(n, -1) for row in own], device=lm.device) for n in numbers} or None
