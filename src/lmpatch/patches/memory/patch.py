"""``MemoryPatch``: facts that are looked up for each question and put before it. No weight changes."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from ...data.edit import Edit, prompt_key
from ...errors import BadInput, BadPatch, CannotMerge, WrongModel
from ...inference.interventions import Insert, Intervention
from ...inference.tokens import join, statement
from ...models.lm import LM
from ...retrieval.encoder import shared_encoder
from ...retrieval.index import KeyBlock
from ...retrieval.network import Retriever, Shape, target_embeddings
from ..editor import Editor
from ..patch import Law, RunPatch, plain_edits

log = logging.getLogger(__name__)
KEPT = 4096
"""Prompt vectors kept ready, by facts used last."""


@dataclass(frozen=True)
class Scope:
    """When a fact is used, and as what."""

    gate: Literal["sentinel", "cosine", "always"] = "sentinel"
    """A fact is used if it beats the knowledge sentinel, if it reaches a cosine, or always."""
    threshold: float = 0.0
    """Cosine of query and key that ``gate=cosine`` asks for."""
    insert: Literal["vectors", "text"] = "vectors"
    """What goes before the question: continuous prompt vectors, or the fact as a sentence (RAG)."""
    at: Literal["front", "after_bos"] | None = None
    """Vectors go before everything, as published, or behind the start token, which keeps its place as sink. none: where
    they were when the editor was trained."""
    top_k: int = 1
    """Facts used at most."""


@dataclass(eq=False)
class MemoryPatch(RunPatch):
    """Facts by key, with the retriever that finds them. ``edits[i]`` belongs to ``keys[i]``.

    Complete in itself but for the sentence encoder, which is named and checked by its fingerprint.
    """

    kind: ClassVar[str] = "memory"
    shape: Shape = field(kw_only=True)
    encoder_fingerprint: str = field(kw_only=True)
    editor: dict[str, Tensor] = field(kw_only=True)
    """What the editor learned, bf16."""
    editor_hash: str = field(kw_only=True)
    keys: Tensor = field(kw_only=True)
    """[n, R] fp16."""
    scope: Scope = field(default_factory=Scope)

    def parts(self) -> dict[str, Any]:
        return {
            "shape": asdict(self.shape),
            "encoder_fingerprint": self.encoder_fingerprint,
            "editor_hash": self.editor_hash,
            "scope": asdict(self.scope),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys, **{f"editor/{name}": t for name, t in self.editor.items()}}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], tensors: Mapping[str, Tensor], **common: Any) -> MemoryPatch:
        try:
            made = cls(
                **common,
                shape=Shape(**parts["shape"]),
                scope=Scope(**parts["scope"]),
                encoder_fingerprint=parts["encoder_fingerprint"],
                editor_hash=parts["editor_hash"],
                keys=tensors["keys"],
                editor={n.removeprefix("editor/"): t for n, t in tensors.items() if n.startswith("editor/")},
            )
        except (KeyError, TypeError) as error:
            raise BadPatch(f"it is no memory patch ({error}).") from None
        if set(made.tensors()) != set(tensors):
            raise BadPatch(f"tensors without a place: {sorted(set(tensors) - set(made.tensors()))}.")
        if made.keys.shape != (len(made.edits), made.shape.width):
            raise BadPatch(f"{len(made.edits)} facts and keys of shape {tuple(made.keys.shape)}.")
        if not all(t.isfinite().all() for t in tensors.values()):
            raise BadPatch("it holds infinite or undefined numbers.")
        return made

    def describe(self) -> list[str]:
        return [f"  {len(self.keys)} keys of width {self.shape.width}; {self._how()}"]

    def _how(self) -> str:
        gate = {"sentinel": "the knowledge sentinel", "cosine": f"a cosine of {self.scope.threshold}"}
        what = f"{self.shape.prompt_tokens} prompt vectors" if self.scope.insert == "vectors" else "the fact as text"
        return f"gate: {gate.get(self.scope.gate, 'none')}, inserts {what}; queries by {self.shape.encoder}"

    def network(self) -> Retriever:
        """The retriever, ready for use.

        Raises:
            WrongModel: the sentence encoder of that name is another one here.
        """
        encoder = shared_encoder(self.shape.encoder)
        if encoder.fingerprint != self.encoder_fingerprint:
            raise WrongModel(
                f"the patch was made with encoder {self.shape.encoder} ({self.encoder_fingerprint[:12]}), found "
                f"{encoder.fingerprint[:12]}. Install that version of it."
            )
        return Retriever.of(self.shape, encoder, self.editor)

    def intervention(self, lm: LM) -> MemoryIntervention:
        return MemoryIntervention(lm, Finder(self))

    def fits(self, lm: LM) -> None:
        width = lm.parameter(lm.layout.weight(lm.layout.embed)).shape[1]
        if self.scope.insert == "vectors" and self.shape.d_model != width:
            raise WrongModel(f"prompt vectors of width {self.shape.d_model} do not fit {lm.name}.")

    def merged(self, others: Sequence[MemoryPatch]) -> MemoryPatch:
        """The facts of all in one memory. Of two about the same prompt the later one stays.

        Raises:
            CannotMerge: they come from different editors or use facts in different ways.
        """
        for other in others:
            if (other.editor_hash, other.scope) != (self.editor_hash, self.scope):
                raise CannotMerge(
                    f"cannot merge memories of editors {self.editor_hash[:12]} and {other.editor_hash[:12]} with "
                    f"{self.scope} and {other.scope}. Fit them with one editor and equal settings."
                )
        edits = [edit for p in (self, *others) for edit in p.edits]
        keys = torch.cat([p.keys for p in (self, *others)])
        last = {prompt_key(edit["prompt"]): i for i, edit in enumerate(edits)}  # the later one wins
        kept = sorted(last.values())
        return replace(self, edits=tuple(edits[i] for i in kept), keys=keys[kept])

    def law(self) -> Law:
        return Law.UNION


@dataclass(frozen=True)
class Hit:
    """What retrieval says about one prompt."""

    place: int
    """The nearest fact, by the number its ``Facts`` know it by."""
    score: float
    gate: float
    """What the score had to exceed."""

    @property
    def fired(self) -> bool:
        """The fact is used."""
        return self.score > self.gate


def resolve_scope(scope: Scope, editor: Editor) -> Scope:
    """The scope with nothing left open."""
    return scope if scope.at else replace(scope, at=editor.config.get("at", Insert.at))


def build_memory(editor: Editor, edits: Sequence[Edit], scope: Scope, **common: Any) -> MemoryPatch:
    """A patch with these facts, of which none supersedes another.

    Args:
        common: further fields of ``Patch``.
    Raises:
        BadInput: a fact is longer than the encoder reads.
    """
    shape = Shape(**editor.parts["shape"])
    patch = MemoryPatch(
        method=editor.method,
        base=editor.base,
        edits=plain_edits(edits),
        shape=shape,
        encoder_fingerprint=editor.parts["encoder_fingerprint"],
        editor=editor.tensors,
        editor_hash=editor.hash(),
        keys=torch.zeros(0, shape.width, dtype=torch.float16),
        scope=resolve_scope(scope, editor),
        **{"config": {}, **common},
    )
    if edits:
        patch.keys = encode_keys(patch.network(), edits)
    return patch


@torch.no_grad()
def encode_keys(network: Retriever, edits: Sequence[Edit], weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Keys [n, R] fp16 of facts.

    Raises:
        BadInput: a fact is longer than the encoder reads.
    """
    encoder, texts = network.encoder, [join(edit.prompt, edit.target) for edit in edits]
    for text, ids in zip(texts, encoder.tokenise(texts) if texts else [], strict=True):
        if len(ids) > encoder.limit:
            raise BadInput(
                f"the fact {text[:60]!r}… has {len(ids)} tokens, {encoder.name} reads {encoder.limit}. Shorten it."
            )
    if not edits:
        return torch.zeros(0, network.shape.width, dtype=torch.float16)
    return network.keys([(edit.prompt, edit.target) for edit in edits], weights).half()


class Facts(Protocol):
    """Where facts are looked up. A place is whatever number it knows a fact by."""

    def __len__(self) -> int: ...

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores [m, k'] float64 and places [m, k'] of the largest inner products, best first."""

    def fact(self, place: int) -> tuple[str, str]:
        """Prompt and target of a fact that was just found."""

    def keys(self, places: Sequence[int]) -> Tensor:
        """Keys [n, R] of facts that were just found."""


class PatchFacts:
    """The facts of a patch."""

    def __init__(self, patch: MemoryPatch) -> None:
        self.patch = patch
        keys = patch.keys[:, : patch.shape.matched].float()
        self.block = KeyBlock(patch.shape.matched)
        self.block.add(comparable(keys, patch.scope), range(len(keys)))

    def __len__(self) -> int:
        return len(self.block)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self.block.search(queries, k)

    def fact(self, place: int) -> tuple[str, str]:
        edit = self.patch.edits[place]
        return edit["prompt"], edit["target"]

    def keys(self, places: Sequence[int]) -> Tensor:
        return self.patch.keys[list(places)].float()


def comparable(vectors: Tensor, scope: Scope) -> Tensor:
    """With a cosine gate, unit vectors: their inner product is the cosine."""
    return torch.nn.functional.normalize(vectors, dim=-1) if scope.gate == "cosine" else vectors


class Finder:
    """Looks facts up: one encoder pass for each prompt, then an inner product with every key."""

    def __init__(self, patch: MemoryPatch, facts: Facts | None = None, network: Retriever | None = None) -> None:
        self.scope, self.root = patch.scope, patch.shape.matched**0.5
        self.facts, self.network = facts or PatchFacts(patch), network or patch.network()
        with torch.no_grad():
            self.weights = self.network.encoder_weights()
            self.sentinel = self.network.sentinel(self.weights)

    @torch.no_grad()
    def search(self, prompts: Sequence[str]) -> list[list[Hit]]:
        """The facts nearest to each prompt, best first, fired or not. Prompts beyond the encoder's limit find none."""
        if not len(self.facts):
            return [[] for _ in prompts]
        encoder = self.network.encoder
        short = [i for i, ids in enumerate(encoder.tokenise(prompts)) if len(ids) <= encoder.limit]
        if len(short) < len(prompts):
            log.warning(
                "%d of %d prompts are longer than the %d tokens %s reads: no fact was looked up for them",
                len(prompts) - len(short), len(prompts), encoder.limit, encoder.name,
            )  # fmt: skip
        found: list[list[Hit]] = [[] for _ in prompts]
        if not short:
            return found
        queries = self.network.queries([prompts[i] for i in short], self.weights)  # [m, M]
        scores, places = self.facts.search(comparable(queries, self.scope), self.scope.top_k)
        if self.scope.gate == "sentinel":
            gates = (queries.double() @ self.sentinel.double()).tolist()
        else:
            gates = [self.scope.threshold if self.scope.gate == "cosine" else float("-inf")] * len(short)
        unit = 1.0 if self.scope.gate == "cosine" else self.root
        for i, score, place, gate in zip(short, scores.tolist(), places.tolist(), gates, strict=True):
            bar = gate / self.root if self.scope.gate == "sentinel" else gate
            found[i] = [Hit(p, s / unit, bar) for s, p in zip(score, place, strict=True)]
        return found


class MemoryIntervention(Intervention):
    """A memory patch at work: facts that are found go before the prompt."""

    def __init__(self, lm: LM, finder: Finder) -> None:
        self.lm, self.finder, self.scope = lm, finder, finder.scope
        self._ready: OrderedDict[int, Tensor] = OrderedDict()

    def retrieve(self, prompts: Sequence[str]) -> list[Insert | None]:
        distinct = list(dict.fromkeys(prompts))
        fired = [tuple(f.place for f in found if f.fired) for found in self.finder.search(distinct)]
        self._prepare({place for places in fired for place in places})
        made: dict[tuple[int, ...], Insert | None] = {(): None}
        for places in fired:
            if places not in made:
                made[places] = self._insert(places)
        by_prompt = {prompt: made[places] for prompt, places in zip(distinct, fired, strict=True)}
        return [by_prompt[prompt] for prompt in prompts]

    def _insert(self, places: tuple[int, ...]) -> Insert:
        if self.scope.insert == "text":
            return Insert(text="".join(f"{statement(*self.finder.facts.fact(place))} " for place in places))
        return Insert(vectors=torch.cat([self._ready[place] for place in places]), at=self.scope.at or Insert.at)

    @torch.no_grad()
    def _prepare(self, places: set[int]) -> None:
        """Have the prompt vectors of these facts ready; those used longest ago make room."""
        if self.scope.insert == "text":
            return
        missing = sorted(places - set(self._ready))
        if missing:
            network, facts = self.finder.network, self.finder.facts
            said = target_embeddings(self.lm, [facts.fact(place) for place in missing], network.shape.target_tokens)
            made = network.prompts(facts.keys(missing), said.cpu())  # [m, P, d]
            self._ready.update(zip(missing, made, strict=True))
        for place in places:
            self._ready.move_to_end(place)
        while len(self._ready) > max(KEPT, len(places)):
            self._ready.popitem(last=False)
