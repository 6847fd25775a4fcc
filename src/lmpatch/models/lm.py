"""``LM``: a causal language model, its tokenizer, and the map of where its parts are."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import cached_property, partial
from html import escape
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from ..provenance import hash_tensors
from .checksum import checksums
from .layout import Layout

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # not on the model: it must stay copyable


class Lock:
    """A lock for a ``with``, given back when what says that it is taken goes.

    An interrupt between the last line of a block and its end leaves an ordinary lock taken for good.
    """

    class _Taken:
        end: object

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        self._taken: Lock._Taken | None = (taken := Lock._Taken())
        release = partial(self._lock.__exit__, None, None)  # no line of Python runs where it is called
        taken.end = self._lock.acquire() and ref(taken, release)

    def __exit__(self, *_: object) -> None:
        self._taken = None


PLACE = "\u2983words\u2984"
"""Stands for the user's words while a chat template is rendered."""


@dataclass(frozen=True)
class ChatFrame:
    """A chat template as two texts: the model reads ``head + words + tail`` and answers from there."""

    head: str
    tail: str
    user: str
    """What opens each message of the user."""

    def last_message(self, text: str) -> str:
        """The last message of the user in a text that is written as the template writes; any other text itself."""
        _, found, after = text.rpartition(self.user) if self.user else ("", "", "")
        return after.partition(self.tail)[0] if found else text


def chat_frame(tokenizer: Any) -> ChatFrame | None:
    """The tokenizer's chat template for one message of a user; None where it has none, or refuses such a message.

    A start token that the tokenizer adds by itself is left out of the head, so that there is one and not two.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    message = [{"role": "user", "content": PLACE}]
    try:
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template is a program of its own: what it raises is its author's choice
        return None
    head, place, tail = text.partition(PLACE)
    start = tokenizer.bos_token
    if start and head.startswith(start) and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:
        head = head.removeprefix(start)
    opens = max((head.rfind(token) for token in tokenizer.all_special_tokens), default=-1)
    return ChatFrame(head, tail, head[max(opens, 0) :]) if place else None


@dataclass(eq=False, repr=False)
class LM:
    """A model in evaluation mode with its tokenizer and layout. Make one with ``load`` or ``wrap``.

    ``model`` is an ordinary transformers model: nothing is subclassed or replaced.
    """

    model: Any
    tokenizer: Any
    layout: Layout
    name: str = "model"
    raw: bool = False
    """Prompts are read as they stand, without the model's chat template."""
    _fingerprint: tuple[dict[str, int], str] | None = None

    @property
    def device(self) -> torch.device:
        """Where the embedding is, hence where token ids go."""
        return self.module(self.layout.embed).weight.device  # type: ignore[return-value]

    @property
    def lock(self) -> Lock:
        """Held while the model runs or its patches change: its hooks and weights are one for all threads.

        It belongs to ``model``: all ``LM`` of one model share it. One thread may take it again.
        """
        return Lock(_locks.setdefault(self.model, threading.RLock()))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype activations have."""
        return self.module(self.layout.final_norm or self.layout.embed).weight.dtype  # type: ignore[return-value]

    @property
    def window(self) -> int | None:
        """Tokens it reads at most, those it generates included; None where its config sets no limit."""
        found: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found

    @cached_property
    def chat(self) -> ChatFrame | None:
        """What goes around every prompt: the chat template, where the model has one and ``raw`` is not set."""
        return None if self.raw else chat_frame(self.tokenizer)

    @property
    def plain(self) -> LM:
        """The same model, patches included, for text that is no question: prompts are read as they stand."""
        return self if self.raw else replace(self, raw=True)

    def module(self, name: str) -> nn.Module:
        """The submodule of that dotted name; the model itself for ``""``."""
        module: nn.Module = self.model.get_submodule(name)
        return module

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of that dotted name, as in ``state_dict``."""
        parameter: nn.Parameter = self.model.get_parameter(name)
        return parameter

    def _facts(self) -> dict[str, str]:
        """What a line about the model says."""
        ledger = getattr(self.model, "_lmpatch_ledger", None)  # see patches.ledger
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        return {
            "architecture": f"{type(self.model).__name__} of {self.layout.n_layers} layers, d={self.layout.d_model}",
            "parameters": f"{size:,.1f}M" if size < 1000 else f"{size / 1000:,.1f}B",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "patches": ", ".join(applied.patch.method for applied in (ledger.applied if ledger else ())) or "none",
        }

    def __repr__(self) -> str:
        form = "LM({}: {architecture}, {parameters} parameters, {dtype} on {device}, patches: {patches})"
        return form.format(self.name, **self._facts())

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{key}</th><td>{escape(value)}</td></tr>" for key, value in self._facts().items())
        return f"<table><caption>{escape(self.name)}</caption>{rows}</table>"

    def fingerprint(self) -> str:
        """SHA-256 over every weight rounded to bf16, of the model *without* patches.

        Rounding first makes the fp32 and the bf16 copy of one model the same model: a patch fitted on one is
        accepted by the other. Computed again once a weight was written (0.5 s for 270M weights); that none was is
        told by their checksums (0.1 s). A model shared among processes is as it was before.
        """
        with self.lock:
            ledger = getattr(self.model, "_lmpatch_ledger", None)  # see patches.ledger
            originals = ledger.originals if ledger else {}
            weights = [(name, originals.get(name, p.detach())) for name, p in sorted(self.model.named_parameters())]
            if not self._fingerprint or not any(hasattr(weight, "to_local") for _, weight in weights):
                sums = checksums(dict(weights))
                if not self._fingerprint or self._fingerprint[0] != sums:
                    self._fingerprint = sums, hash_tensors(weights)
            return self._fingerprint[1]
