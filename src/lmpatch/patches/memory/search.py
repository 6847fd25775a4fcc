"""Facts at work: which facts a question fires, and what they put before it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from ...inference.interventions import Insert, Intervention
from ...models.lm import LM, chat_frame
from ...retrieval import Fact, Form, Retriever, Scope
from ...retrieval.index import KeyBlock
from ...retrieval.verifier import SLACK
from .stored import Stored

NUMBERS = count()  # of memories at work
KEPT = 4096
"""Inserts kept ready, by facts used last."""


Used = tuple[int, Form]
"""A fact, by its place, and as what it goes before the question."""


@dataclass(frozen=True)
class Hit:
    """A fact near to one prompt."""

    place: int
    """The fact, by the number its ``Facts`` know it by."""
    score: float
    gate: float
    """What the score had to exceed."""
    follows: bool = False
    """The verifier: the answer follows from the fact, and is not its target."""
    doubted: bool = False
    """The verifier: the question asks for something else."""

    @property
    def fired(self) -> bool:
        """The fact is used."""
        return self.score > self.gate and not self.doubted

    @property
    def told(self) -> str:
        """What becomes of the fact, in a word or two."""
        if self.doubted:
            return "no: another question"
        return ("yes: follows from it" if self.follows else "yes") if self.fired else "no"


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
        self._verifies = scope.gate == "sentinel" and scope.doubt < 1 and retriever.verifies
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
        most = max(self.scope.top_k, self.retriever.rivals)
        scores, places = self.facts.search(comparable(queries, self.retriever, self.scope), most)
        scale = 1.0 if self.scope.gate == "cosine" else self.retriever.scale
        gates = [self.scope.threshold if self.scope.gate == "cosine" else float("-inf")] * len(queries)
        if self.scope.gate == "sentinel":
            slack = SLACK if self._verifies else 0.0
            gates = [gate / scale - slack for gate in self.retriever.gate(queries).tolist()]
        for i, line, found, gate in zip(readable, scores.tolist(), places.tolist(), gates, strict=True):
            hits[i] = [Hit(place, score / scale, gate) for score, place in zip(line, found, strict=True)]
        if self.retriever.rivals:
            for i, query in zip(readable, queries, strict=True):
                hits[i] = self._ranked(query, hits[i])[: self.scope.top_k]
        return self._verified(hits, texts) if self._verifies else hits

    def _ranked(self, query: Tensor, hits: list[Hit]) -> list[Hit]:
        """The nearest facts compared again, best first."""
        scores, fires = self.retriever.rank(query, self.facts.keys([hit.place for hit in hits]))
        gates = [float("-inf") if fires else hit.gate for hit in hits]
        again = [replace(h, score=s, gate=g) for h, s, g in zip(hits, scores.tolist(), gates, strict=True)]
        return sorted(again, key=lambda hit: -hit.score)

    def _verified(self, hits: list[list[Hit]], texts: Sequence[str]) -> list[list[Hit]]:
        """What the verifier says of the facts that beat the gate."""
        pairs = [(i, j) for i, found in enumerate(hits) for j, hit in enumerate(found) if hit.fired]
        facts = [self.facts.fact(hits[i][j].place) for i, j in pairs]
        chances = self.retriever.verify(facts, [texts[i] for i, _ in pairs]).tolist() if pairs else []
        for (i, j), (asks, follows, other) in zip(pairs, chances, strict=True):
            hits[i][j] = replace(hits[i][j], follows=follows > asks, doubted=other > self.scope.doubt)
        return hits


def last_paragraph(text: str) -> str:
    """The last paragraph, with those before it until there are three words: ``Answer:`` alone asks nothing."""
    whole, start = text.rstrip(), len(text.rstrip())
    while start > 0 and len(whole[start:].split()) < 3:
        start = max(whole.rfind("\n\n", 0, start), 0)
    return text[start:].lstrip("\n")


class MemoryIntervention(Intervention):
    """A memory patch at work: the facts that a prompt fires go before it, or the changes stored with them act on it."""

    def __init__(self, lm: LM, finder: Finder, stored: Stored | None = None) -> None:
        self.lm, self.finder, self.stored, self.number = lm, finder, stored, next(NUMBERS)
        super().__init__(stored.hooks(lm, self.number) if stored else ())
        self._frame = chat_frame(lm.tokenizer) if finder.scope.lookup == "last" else None
        self._ready: OrderedDict[Used, Insert] = OrderedDict()

    def retrieve(self, prompts: Sequence[str]) -> list[Insert | None]:
        distinct = list(dict.fromkeys(prompts))
        asked = [self._frame.last_message(prompt) for prompt in distinct] if self._frame else distinct
        hits = zip(distinct, self.finder.search(asked), strict=True)
        used = {prompt: tuple(self._used(hit) for hit in found if hit.fired) for prompt, found in hits}
        self._prepare({one for each in used.values() for one in each})
        inserts = {each: self._insert(each) if each else None for each in dict.fromkeys(used.values())}
        return [inserts[used[prompt]] for prompt in prompts]

    def _used(self, hit: Hit) -> Used:
        """What follows from a fact takes thought: vectors, which make the model say its target, would be in the way."""
        form = self.finder.scope.insert
        return hit.place, "text" if form == "both" and hit.follows else form

    def _insert(self, used: tuple[Used, ...]) -> Insert:
        """What several facts put before a prompt, one after the other."""
        inserts = [self._ready[one] for one in used]
        vectors = [insert.vectors for insert in inserts if insert.vectors is not None]
        text, joined = "".join(insert.text for insert in inserts), torch.cat(vectors) if vectors else None
        change = (self.number, 0 if self.stored.shared else used[0][0]) if self.stored else None
        return Insert(text, joined, self.finder.scope.at or Insert.at, change)

    def _prepare(self, used: set[Used]) -> None:
        """Have these inserts ready; those used longest ago make room."""
        facts = self.finder.facts
        for form in sorted({form for _, form in used}):
            missing = sorted(one for one in used - set(self._ready) if one[1] == form)
            if missing:
                places = [place for place, _ in missing]
                pairs, keys = [facts.fact(place) for place in places], facts.keys(places)
                inserts = self.finder.retriever.insert(self.lm, pairs, keys, form)
                self._ready.update(zip(missing, inserts, strict=True))
        for one in used:
            self._ready.move_to_end(one)
        while len(self._ready) > max(KEPT, len(used)):
            self._ready.popitem(last=False)
