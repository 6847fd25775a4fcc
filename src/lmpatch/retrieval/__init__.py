"""From a question to a fact: what a memory asks to encode facts, to encode questions, and what to insert.

A file of this folder with a function ``load(parts, tensors)`` is a retriever by its file's name: ``recipe`` (a trained
network), ``cosine`` (any sentence encoder). Other packages add theirs through the entry-point group
``lmpatch.retrievers``. A patch keeps a retriever as its name, ``parts()`` and ``tensors()``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from ..errors import BadInput, BadPatch

if TYPE_CHECKING:
    from torch import Tensor

    from ..inference.interventions import Insert
    from ..models.lm import LM
    from .encoder import Encoder

Fact = tuple[str, str]
"""A fact as prompt and target."""
Form = Literal["vectors", "text", "both", "change"]
"""What goes before a question: continuous prompt vectors, the fact as a sentence (RAG), or both, the text last. change:
nothing does; a change of weights that is stored with the fact acts on the question alone."""


@dataclass(frozen=True)
class Lookup:
    """When a fact is used."""

    gate: Literal["sentinel", "cosine", "always"] = "sentinel"
    """A fact is used if it beats the knowledge sentinel, if it reaches a cosine, or always."""
    threshold: float = 0.0
    """Cosine of query and key that ``gate=cosine`` asks for."""
    lookup: Literal["last", "whole"] = "last"
    """What of a prompt is looked up: of a chat the last message of the user, of a text of several paragraphs the last,
    and its last sentence alone as well, of which the nearer one counts; or the whole prompt. What is longer than the
    encoder reads loses its beginning."""
    top_k: int = 1
    """Facts used at most."""
    doubt: float = 0.8
    """A fact that was found is left out if its question asks for something else with a larger chance, says the
    verifier, which ``gate=sentinel`` asks if retrieval has one. 1: it is not asked. Published: 1."""


@dataclass(frozen=True)
class Scope(Lookup):
    """When a fact is used, and as what."""

    insert: Form = "vectors"
    """What goes before the question: continuous prompt vectors, the fact as a sentence (RAG), or both; or what acts on
    it: a stored change of weights."""
    at: Literal["front", "after_bos"] | None = None
    """Vectors go before everything, as published, or behind the start token, which keeps its place as sink. none: where
    they were when the editor was trained."""


class Retriever(Protocol):
    """A value that becomes a network when it is first asked something. Nothing it computes has a gradient."""

    name: str
    width: int  # w, of keys
    matched: int  # M <= w, of queries: they are compared with the first M components of a key
    scale: float  # a score is an inner product over this
    unit: bool  # keys and queries have length one: an inner product is a cosine
    rivals: int  # nearest facts that ``rank`` compares with a question again; 0: none

    @property
    def verifies(self) -> bool: ...  # it can tell whether a question asks for a fact
    @property
    def encoder(self) -> Encoder: ...  # raises WrongModel if it is not the one the retriever was made with
    def parts(self) -> dict[str, Any]: ...  # JSON; what ``load`` needs beside the tensors
    def tensors(self) -> dict[str, Tensor]: ...
    def describe(self, form: Form) -> str: ...  # what it inserts and which encoder asks, in a few words
    def keys(self, facts: Sequence[Fact]) -> Tensor: ...  # [n, w] fp32
    def queries(self, prompts: Sequence[str]) -> Tensor: ...  # [m, M] fp32
    def gate(self, queries: Tensor) -> Tensor: ...  # [m] fp64 learned thresholds of the inner product; BadInput: none
    def insert(self, lm: LM, facts: Sequence[Fact], keys: Tensor, form: Form) -> list[Insert]: ...  # keys: [n, w]
    def rank(self, query: Tensor, keys: Tensor) -> tuple[Tensor, bool]: ...  # [M], [k, w]: new scores [k]; fire anyway?
    def verify(self, facts: Sequence[Fact], prompts: Sequence[str]) -> Tensor: ...  # [n, 3]; see ``verifier``
    def check(self, lm: LM, scope: Scope) -> None: ...  # WrongModel, BadInput: it cannot be used so on this model


def load_retriever(name: str, parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Retriever:
    """The retriever of that name.

    Raises:
        BadPatch: there is none, or parts and tensors are not its own.
    """
    own = {module.name for module in pkgutil.iter_modules(__path__)}
    others = {point.name: point for point in entry_points(group="lmpatch.retrievers")}
    module = import_module(f"{__name__}.{name}") if name in own else others[name].load() if name in others else None
    if module is None or not hasattr(module, "load"):
        raise BadPatch(f"it needs a retriever called {name!r}, which is not here. Update lmpatch, or install it.")
    try:
        return cast("Retriever", module.load(parts, tensors))
    except (BadInput, KeyError, TypeError, ValueError) as error:
        raise BadPatch(f"it holds no {name} retriever ({error}).") from None
