"""Facts at work: which facts a question fires, and what they put before it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...inference.interventions import Insert, Intervention
from ...models.lm import LM, chat_frame
from ...retrieval import Fact, Retriever, Scope
from ...retrieval.index import KeyBlock

KEPT = 4096
"""Inserts kept ready, by facts used last."""


@dataclass(frozen=True)
class Hit:
    """A fact near to one prompt."""

    place: int
    """The fact, by the number its ``Facts`` know it by."""
    score: float
    gate: float
    """What the score had to exceed."""

    @property
    def fired(self) -> bool:
        """The fact is used."""
        return self.score > self.gate


class Facts(Protocol):
    """Where facts are looked up. A place is whatever number it knows a fact by."""

    def __len__(self) -> int: ...

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores [m, k'] float64 and places [m, k'] of the largest inner products, best first."""

    def fact(self, place: int) -> Fact:
        """Prompt and target of a fact of the last search."""

    def keys(self, places: Sequence[int]) -> Tensor:
        """Keys [n, w] of facts of the last search."""


class ListedFacts:
    """The facts of a patch. A place is an index into ``edits`` and ``keys`` [n, w]."""

    def __init__(self, edits: Sequence[Mapping[str, Any]], keys: Tensor, retriever: Retriever, scope: Scope) -> None:
        self._edits, self._keys = edits, keys
        self._block = KeyBlock(retriever.matched)
        self._block.add(comparable(keys[:, : retriever.matched].float(), retriever, scope), range(len(keys)))

    def __len__(self) -> int:
        return len(self._keys)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self._block.search(queries, k)

    def fact(self, place: int) -> Fact:
        edit = self._edits[place]
        return edit["prompt"], edit["target"]

    def keys(self, places: Sequence[int]) -> Tensor:
        return self._keys[list(places)].float()


def comparable(vectors: Tensor, retriever: Retriever, scope: Scope) -> Tensor:
    """With a cosine gate, unit vectors: their inner product is the cosine."""
    return torch.nn.functional.normalize(vectors, dim=-1) if scope.gate == "cosine" and not retriever.unit else vectors


class Finder:
    """Looks facts up: one encoder pass for each prompt, then an inner product with every key."""

    def __init__(self, retriever: Retriever, scope: Scope, facts: Facts) -> None:
        self.retriever, self.scope, self.facts = retriever, scope, facts
        self.encoder = retriever.encoder  # a wrong one is refused here, not at the first question

    @torch.no_grad()
    def search(self, prompts: Sequence[str]) -> list[list[Hit]]:
        """The facts nearest to each prompt, best first, fired or not; see ``Lookup.lookup``."""
        hits: list[list[Hit]] = [[] for _ in prompts]
        texts = [last_paragraph(prompt) for prompt in prompts] if self.scope.lookup == "last" else prompts
        texts = self.encoder.ends(texts) if len(self.facts) else []
        readable = [i for i, text in enumerate(texts) if text.strip()]
        if not readable:
            return hits
        queries = self.retriever.queries([texts[i] for i in readable])  # [m, M]
        scores, places = self.facts.search(comparable(queries, self.retriever, self.scope), self.scope.top_k)
        scale = 1.0 if self.scope.gate == "cosine" else self.retriever.scale
        gates = [self.scope.threshold if self.scope.gate == "cosine" else float("-inf")] * len(queries)
        if self.scope.gate == "sentinel":
            gates = [gate / scale for gate in self.retriever.gate(queries).tolist()]
        for i, line, found, gate in zip(readable, scores.tolist(), places.tolist(), gates, strict=True):
            hits[i] = [Hit(place, score / scale, gate) for score, place in zip(line, found, strict=True)]
        return hits


def last_paragraph(text: str) -> str:
    """The last paragraph, with those before it until there are three words: ``Answer:`` alone asks nothing."""
    whole, start = text.rstrip(), len(text.rstrip())
    while start > 0 and len(whole[start:].split()) < 3:
        start = max(whole.rfind("\n\n", 0, start), 0)
    return text[start:].lstrip("\n")


class MemoryIntervention(Intervention):
    """A memory patch at work: the facts that a prompt fires go before it."""

    def __init__(self, lm: LM, finder: Finder) -> None:
        self.lm, self.finder = lm, finder
        self._frame = chat_frame(lm.tokenizer) if finder.scope.lookup == "last" else None
        self._ready: OrderedDict[int, Insert] = OrderedDict()  # by place

    def retrieve(self, prompts: Sequence[str]) -> list[Insert | None]:
        distinct = list(dict.fromkeys(prompts))
        asked = [self._frame.last_message(prompt) for prompt in distinct] if self._frame else distinct
        hits = zip(distinct, self.finder.search(asked), strict=True)
        fired = {prompt: tuple(hit.place for hit in found if hit.fired) for prompt, found in hits}
        self._prepare({place for places in fired.values() for place in places})
        inserts = {places: self._insert(places) if places else None for places in dict.fromkeys(fired.values())}
        return [inserts[fired[prompt]] for prompt in prompts]

    def _insert(self, places: tuple[int, ...]) -> Insert:
        """What several facts put before a prompt, one after the other."""
        inserts = [self._ready[place] for place in places]
        vectors = [insert.vectors for insert in inserts if insert.vectors is not None]
        text, joined = "".join(insert.text for insert in inserts), torch.cat(vectors) if vectors else None
        return Insert(text, joined, self.finder.scope.at or Insert.at)

    def _prepare(self, places: set[int]) -> None:
        """Have the inserts of these facts ready; those used longest ago make room."""
        missing = sorted(places - set(self._ready))
        if missing:
            facts = self.finder.facts
            pairs, keys = [facts.fact(place) for place in missing], facts.keys(missing)
            inserts = self.finder.retriever.insert(self.lm, pairs, keys, self.finder.scope.insert)
            self._ready.update(zip(missing, inserts, strict=True))
        for place in places:
            self._ready.move_to_end(place)
        while len(self._ready) > max(KEPT, len(places)):
            self._ready.popitem(last=False)
