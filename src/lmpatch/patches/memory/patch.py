"""``MemoryPatch``: facts that are looked up for each question and put before it. No weight changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...config import resolve
from ...data.edits import Edit, prompt_key
from ...errors import BadInput, BadPatch, CannotMerge, WrongModel
from ...inference.interventions import Insert
from ...inference.tokens import join
from ...models.lm import LM
from ...provenance import hash_json, hash_tensors
from ...retrieval import Retriever, Scope, load_retriever
from ..editor import Editor
from ..patch import Law, RunPatch, plain_edits
from .search import Facts, Finder, ListedFacts, MemoryIntervention
from .stored import PREFIX as CHANGE
from .stored import Stored

FIRST = "recipe"  # the retriever of files that name none: those of the first release
WHOLE = {"lookup": "whole", "doubt": 1.0}  # of files that do not say it: those of the first release
PREFIX = "editor/"  # of the retriever's tensors in the file


@dataclass(eq=False)
class MemoryPatch(RunPatch):
    """Facts by key, with the retriever that finds them. ``edits[i]`` belongs to ``keys[i]``.

    Complete in itself but for the sentence encoder, which is named and checked by its fingerprint.
    """

    kind: ClassVar[str] = "memory"
    retriever: Retriever = field(kw_only=True)
    keys: Tensor = field(kw_only=True)
    """[n, w] fp16."""
    scope: Scope = field(default_factory=Scope)
    changes: Stored | None = None
    """Changes of weights that act on the questions that fire a fact."""

    def parts(self) -> dict[str, Any]:
        name = {} if self.retriever.name == FIRST else {"retriever": self.retriever.name}
        stored = {"changes": self.changes.parts()} if self.changes else {}
        return {**name, **self.retriever.parts(), "scope": asdict(self.scope), **stored}

    def tensors(self) -> dict[str, Tensor]:
        own = {f"{PREFIX}{name}": t for name, t in self.retriever.tensors().items()}
        return {"keys": self.keys, **own, **(self.changes.tensors() if self.changes else {})}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], tensors: Mapping[str, Tensor], **common: Any) -> MemoryPatch:
        own = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
        retriever = load_retriever(parts.get("retriever", FIRST), parts, own)
        try:
            patch = cls(
                **common, retriever=retriever, scope=resolve(Scope, {**WHOLE, **parts["scope"]}), keys=tensors["keys"],
                changes=stored_of(parts, tensors),
            )  # fmt: skip
            if not all(isinstance(edit[word], str) for edit in patch.edits for word in ("prompt", "target")):
                raise TypeError("a fact is no text")
        except (KeyError, TypeError, BadInput) as error:
            raise BadPatch(f"it is no memory patch ({error}).") from None
        if extra := set(tensors) - set(patch.tensors()):
            raise BadPatch(f"tensors without a place: {sorted(extra)}.")
        if patch.keys.shape != (len(patch.edits), retriever.width) or not patch.keys.is_floating_point():
            raise BadPatch(f"{len(patch.edits)} facts and keys of shape {tuple(patch.keys.shape)}, {patch.keys.dtype}.")
        if patch.changes and not patch.changes.shared and len(patch.changes) != len(patch.edits):
            raise BadPatch(f"{len(patch.edits)} facts and {len(patch.changes)} stored changes.")
        if not all(t.isfinite().all() for t in tensors.values()):
            raise BadPatch("it holds infinite or undefined numbers.")
        return patch

    def describe(self) -> list[str]:
        stored = self.changes.describe() if self.changes else []
        return [f"  {len(self.keys)} keys of width {self.retriever.width}; {self._how()}", *stored]

    def _how(self) -> str:
        gate = {"sentinel": "the knowledge sentinel", "cosine": f"a cosine of {self.scope.threshold}"}
        return f"gate: {gate.get(self.scope.gate, 'none')}, {self.retriever.describe(self.scope.insert)}"

    def facts(self) -> Facts:
        """Where its facts are looked up."""
        return ListedFacts(self.edits, self.keys, self.retriever, self.scope)

    def finder(self) -> Finder:
        """What finds the facts of a question."""
        return Finder(self.retriever, self.scope, self.facts())

    def intervention(self, lm: LM) -> MemoryIntervention:
        return MemoryIntervention(lm, self.finder(), self.changes)

    def fits(self, lm: LM) -> None:
        self.retriever.check(lm, self.scope)
        try:
            _ = self.changes and self.changes.targets(lm)
        except LookupError as error:
            raise WrongModel(f"{self.base.misfit(lm)}: {error} Load {self.base.name}.") from None

    def of(self, places: Sequence[int]) -> MemoryPatch:
        """The memory with these of its facts alone, in this order."""
        edits, changes = tuple(self.edits[i] for i in places), self.changes and self.changes.select(places)
        return replace(self, edits=edits, keys=self.keys[list(places)], changes=changes)

    def each(self, edits: Sequence[Edit]) -> list[MemoryPatch]:
        """A memory of one fact for each of these edits, whose prompts are among its own."""
        places = {prompt_key(edit["prompt"]): i for i, edit in enumerate(self.edits)}
        made = {**self.made, "seconds": self.made.get("seconds", 0.0) / max(1, len(places))}
        return [replace(self.of([places[prompt_key(edit.prompt)]]), made={**made}) for edit in edits]

    def merged(self, others: Sequence[MemoryPatch]) -> MemoryPatch:
        """The facts of all in one memory. Of two about the same prompt the later one stays.

        Raises:
            CannotMerge: they come from different editors or use facts in different ways.
        """
        own = _identity(self.retriever)
        for other in others:
            if (theirs := _identity(other.retriever), other.scope) != (own, self.scope):
                raise CannotMerge(
                    f"cannot merge memories of {self.method} and {other.method}, of editors {own[:12]} and "
                    f"{theirs[:12]} with {self.scope} and {other.scope}. Fit them with one method, one editor and "
                    "equal settings."
                )
        edits = [edit for p in (self, *others) for edit in p.edits]
        keys = torch.cat([p.keys for p in (self, *others)])
        stored = [p.changes for p in (self, *others) if p.changes]
        if 0 < len(stored) < 1 + len(others):
            raise CannotMerge("one memory stores changes of weights with its facts, and another does not.")
        changes = stored[0].joined(stored[1:]) if stored else None
        kept = sorted({prompt_key(edit["prompt"]): i for i, edit in enumerate(edits)}.values())  # the later one wins
        return replace(self, edits=tuple(edits), keys=keys, changes=changes).of(kept)

    def law(self) -> Law:
        return Law.UNION


def _identity(retriever: Retriever) -> str:
    """SHA-256 of all that makes its keys."""
    tensors = hash_tensors(sorted(retriever.tensors().items()), exact=True)
    return hash_json([retriever.name, retriever.parts(), tensors])


def stored_of(parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Stored | None:
    """The changes of weights that a patch or an editor keeps, if it does."""
    return Stored.read(parts["changes"], tensors) if "changes" in parts else None


def retriever_of(editor: Editor) -> Retriever:
    """The retriever an editor is about: the one its parts name, else the one called as its method."""
    name = editor.parts.get("retriever", editor.method)
    own = {key: tensor for key, tensor in editor.tensors.items() if not key.startswith(CHANGE)}
    return load_retriever(name, {**editor.parts, "editor_hash": editor.hash()}, own)


def scope_of(editor: Editor, scope: Scope | None = None) -> Scope:
    """The scope with nothing left open; None: as the editor's config says."""
    own = {f.name: editor.config[f.name] for f in fields(Scope) if f.name in editor.config}
    scope = scope or Scope(**own)
    return scope if scope.at else replace(scope, at=own.get("at", Insert.at))


def build_memory(editor: Editor, edits: Sequence[Edit], scope: Scope | None = None, **common: Any) -> MemoryPatch:
    """A patch with these facts, of which none supersedes another.

    Args:
        scope: None: as the editor's config says.
        common: further fields of ``Patch``.
    Raises:
        BadInput: a fact is longer than the encoder reads.
    """
    retriever = retriever_of(editor)
    fields = {"method": editor.method, "base": editor.base, "config": {}, **common, "edits": plain_edits(edits)}
    keys, changes = encode_keys(retriever, edits), stored_of(editor.parts, editor.tensors)
    return MemoryPatch(**fields, retriever=retriever, keys=keys, scope=scope_of(editor, scope), changes=changes)


def encode_keys(retriever: Retriever, edits: Sequence[Edit]) -> Tensor:
    """Keys [n, w] fp16 of facts.

    Raises:
        BadInput: a fact is longer than the encoder reads.
    """
    if not edits:
        return torch.zeros(0, retriever.width, dtype=torch.float16)
    encoder, texts = retriever.encoder, [join(edit.prompt, edit.target) for edit in edits]
    for text, ids in zip(texts, encoder.tokenise(texts), strict=True):
        if len(ids) > encoder.limit:
            raise BadInput(
                f"the fact {text[:60]!r}… has {len(ids)} tokens, {encoder.name} reads {encoder.limit}. Shorten it."
            )
    return retriever.keys([(edit.prompt, edit.target) for edit in edits]).half()
