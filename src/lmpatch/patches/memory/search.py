"""Facts at work: which facts a question fires, and what they put before it."""

from __future__ import annotations

import math
import re
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
BORDER = re.compile(r"(?<=[.!?])\s+")
"""Between two sentences."""

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
    def margin(self) -> float:
        """How far the score is above the gate; without a gate the score."""
        return self.score - self.gate if self.gate > -math.inf else self.score

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
        if not prompts or not len(self.facts):
            return [[] for _ in prompts]
        asked = [(i, text) for i, prompt in enumerate(prompts) for text in self._texts(prompt)]
        texts = self.encoder.ends([text for _, text in asked])
        read = [(i, text) for (i, _), text in zip(asked, texts, strict=True) if text.strip()]
        found: list[dict[int, tuple[Hit, str]]] = [{} for _ in prompts]
        nearest = self._nearest([text for _, text in read]) if read else []
        for (i, text), hits in zip(read, nearest, strict=True):
            for hit in hits:
                if hit.place not in found[i] or hit.margin > found[i][hit.place][0].margin:
                    found[i][hit.place] = hit, text
        best = [sorted(each.values(), key=lambda pair: -pair[0].margin)[: self.scope.top_k] for each in found]
        return self._verified(best) if self._verifies else [[hit for hit, _ in each] for each in best]

    def _texts(self, prompt: str) -> list[str]:
        """What of a prompt is looked up."""
        if self.scope.lookup == "whole":
            return [prompt]
        paragraph = last_paragraph(prompt)
        return list(dict.fromkeys([paragraph, last_sentence(paragraph)]))

    def _nearest(self, texts: Sequence[str]) -> list[list[Hit]]:
        """The facts nearest to each text, best first."""
        queries = self.retriever.queries(texts)  # [m, M]
        most = max(self.scope.top_k, self.retriever.rivals)
        scores, places = self.facts.search(comparable(queries, self.retriever, self.scope), most)
        scale = 1.0 if self.scope.gate == "cosine" else self.retriever.scale
        gates = [self.scope.threshold if self.scope.gate == "cosine" else float("-inf")] * len(queries)
        if self.scope.gate == "sentinel":
            slack = SLACK if self._verifies else 0.0
            gates = [gate / scale - slack for gate in self.retriever.gate(queries).tolist()]
        hits = [
            [Hit(place, score / scale, gate) for score, place in zip(line, found, strict=True)]
            for line, found, gate in zip(scores.tolist(), places.tolist(), gates, strict=True)
        ]
        return [self._ranked(*pair) for pair in zip(queries, hits, strict=True)] if self.retriever.rivals else hits

    def _ranked(self, query: Tensor, hits: list[Hit]) -> list[Hit]:
        """The nearest facts compared again, best first."""
        scores, fires = self.retriever.rank(query, self.facts.keys([hit.place for hit in hits]))
        gates = [float("-inf") if fires else hit.gate for hit in hits]
        again = [replace(h, score=s, gate=g) for h, s, g in zip(hits, scores.tolist(), gates, strict=True)]
        return sorted(again, key=lambda hit: -hit.score)[: self.scope.top_k]

    def _verified(self, found: list[list[tuple[Hit, str]]]) -> list[list[Hit]]:
        """What the verifier says of the facts that beat the gate, each beside the text that found it."""
        asked = [(hit, text) for each in found for hit, text in each if hit.fired]
        facts = [self.facts.fact(hit.place) for hit, _ in asked]
        chances = iter(self.retriever.verify(facts, [text for _, text in asked]).tolist() if asked else [])
        hits: list[list[Hit]] = []
        for each in found:
            hits.append([])
            for hit, _ in each:
                if hit.fired:
                    asks, follows, other = next(chances)
                    hit = replace(hit, follows=follows > asks, doubted=other > self.scope.doubt)
                hits[-1].append(hit)
        return hits


def last_paragraph(text: str) -> str:
    """The last paragraph, with those before it until there are three words: ``Answer:`` alone asks nothing."""
    whole, start = text.rstrip(), len(text.rstrip())
    while start > 0 and len(whole[start:].split()) < 3:
        start = max(whole.rfind("\n\n", 0, start), 0)
    return text[start:].lstrip("\n")


def last_sentence(text: str) -> str:
    """The last sentence, with those before it until there are three words: what is asked behind a remark."""
    starts = [0, *(border.end() for border in BORDER.finditer(text))]
    return next((text[start:] for start in reversed(starts) if len(text[start:].split()) >= 3), text)


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
