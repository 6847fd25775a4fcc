"""``Memory``: a folder of facts that answers questions, with the editor that makes its keys beside them.

memory = Memory.create("facts", editor)
memory.add([Edit("The Eiffel Tower is in", "Rome")])
with apply(lm, memory.patch()):
    generate(lm, "The Eiffel Tower is in")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.dates import When, iso
from ..data.edits import Edit
from ..errors import BadInput, CannotMerge
from ..files import new_folder
from ..patches.editor import Editor, load_editor
from ..patches.memory.patch import MemoryPatch, build_memory, encode_keys, retriever_of, scope_of
from ..patches.patch import plain_edits
from ..progress import Progress
from ..retrieval import Fact, Retriever, Scope
from .conflicts import find_conflicts
from .entry import Added, Entry
from .store import Store

EDITOR = "editor.safetensors"
CHUNK = 1024  # facts encoded between two reports of progress


class Memory:
    """A store and its editor. Needs no language model: a fact is added by one pass of the sentence encoder."""

    def __init__(self, store: Store, editor: Editor) -> None:
        self.store, self.editor = store, editor

    @classmethod
    def create(cls, path: str | Path, editor: Editor) -> Memory:
        """Make an empty memory, all of it or nothing, where nothing is yet."""
        path = Path(path)
        with new_folder(path) as folder:
            retriever = retriever_of(editor)
            Store.create(folder, width=retriever.width, matched=retriever.matched, stamp=_stamp(editor))
            editor.save(folder / EDITOR, whole=True)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, editor: Editor | None = None) -> Memory:
        """Open a memory.

        Args:
            editor: the one it must have been made with; None: whichever it holds.
        Raises:
            BadInput: there is none.
            BadPatch: its editor is missing or altered.
            WrongModel: it was made with another editor or base model.
        """
        path = Path(path)
        if editor is None and not (path / EDITOR).exists():
            Store.open(path)  # says so if there is no memory at all
        editor = editor or load_editor(path / EDITOR)
        return cls(Store.open(path, stamp=_stamp(editor)), editor)

    def __len__(self) -> int:
        return len(self.store)

    @cached_property
    def retriever(self) -> Retriever:
        """What makes keys and queries; its network is made once."""
        return self._empty.retriever

    @property
    def scope(self) -> Scope:
        """When facts are used, and as what, unless a call says otherwise: as the editor's config has it."""
        return scope_of(self.editor)

    def add(
        self,
        edits: Sequence[Edit],
        *,
        source: Mapping[str, Any] | None = None,
        supersede: bool = False,
        check: bool = True,
        progress: Progress | None = None,
    ) -> Added:
        """Add facts in one commit, as ``Store.add`` does, with the keys the editor makes.

        Args:
            supersede: retire, in the same commit, the facts that the new ones contradict in other words, for the time
                of the new ones. See ``lmpatch.memory.conflicts`` for what is found; look before you let it.
            check: look for such facts. It costs an encoder pass and a search for each new one.
        Returns:
            the version, and what the new facts contradict as its ``conflicts``.
        Raises:
            BadInput: a fact is longer than the encoder reads. Nothing was added.
            LmpatchError: the disk is full or cannot be written. Nothing was added.
        """
        parts = [encode_keys(self.retriever, ())]
        for start in range(0, len(edits), CHUNK):
            parts.append(encode_keys(self.retriever, edits[start : start + CHUNK]))
            if progress:
                progress(min(start + CHUNK, len(edits)), len(edits), "encoding facts")
        keys = torch.cat(parts)
        found = find_conflicts(self.store, self.retriever, self.scope, edits, keys, progress) if check else []
        ends: dict[int, list[Edit]] = {}
        for i, conflict in found if supersede else ():
            if not conflict.superseded:
                ends.setdefault(i, []).append(conflict.old)
        version = self.store.add(edits, keys.numpy(), source=source, supersedes=ends)
        return Added.of(version, tuple(replace(c, superseded=c.superseded or supersede) for _, c in found))

    def patch(self, scope: Scope | None = None, *, as_of: When | None = None) -> LivePatch:
        """The memory as a patch: every question sees what was committed before it, by whichever process.

        Args:
            as_of: answer with the facts whose time contains this moment; None: the moment of each question.
        Raises:
            BadInput: ``scope`` has a cosine gate, and the keys are not of length one: the store compares inner
                products. Take a snapshot.
        """
        scope = scope_of(self.editor, scope)
        if scope.gate == "cosine" and not self.retriever.unit:
            raise BadInput("a cosine gate needs all keys at hand. Use gate='sentinel', or snapshot() of this memory.")
        common = {f.name: getattr(self._empty, f.name) for f in fields(self._empty)}
        return LivePatch(**{**common, "scope": scope}, memory=self, as_of=iso("as_of", as_of))

    def snapshot(self, scope: Scope | None = None, *, as_of: When | None = None) -> MemoryPatch:
        """The facts that hold now as a patch of their own, which can be saved and shipped. It looks at no clock.

        Args:
            as_of: those whose time contains this moment; None: now.
        """
        facts = self.store.facts(as_of=datetime.now(timezone.utc) if as_of is None else as_of)
        return replace(
            self._empty,
            edits=plain_edits([fact.edit for fact in facts]),
            keys=torch.from_numpy(self.store.vectors(facts)),
            scope=scope_of(self.editor, scope),
        )

    @cached_property
    def _empty(self) -> MemoryPatch:
        return build_memory(self.editor, ())


def is_memory(path: str | Path) -> bool:
    """Whether a folder holds a memory, not a patch."""
    return (Path(path) / EDITOR).exists()


@dataclass(eq=False)
class LivePatch(MemoryPatch):
    """A memory at work. It holds no facts itself, so there is nothing to save or merge: take a ``snapshot``."""

    memory: Memory = field(kw_only=True)
    as_of: str = ""
    """The moment whose facts it answers with; "": that of each question."""

    def describe(self) -> list[str]:
        return [f"  {len(self.memory)} facts in {self.memory.store.path}; {self._how()}"]

    def facts(self) -> StoreFacts:
        """Where its facts are looked up."""
        return StoreFacts(self.memory.store, self.as_of)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        raise BadInput(f"the facts are in {self.memory.store.path}. Save memory.snapshot() to have them as a patch.")

    def merged(self, others: Sequence[MemoryPatch]) -> MemoryPatch:
        raise CannotMerge("a memory goes on changing. Merge memory.snapshot() instead.")


class StoreFacts:
    """The facts of a store, looked up for each question."""

    def __init__(self, store: Store, as_of: str = "") -> None:
        self.store, self.as_of = store, as_of
        self._hits: dict[int, Entry] = {}  # of the last search, by row

    def __len__(self) -> int:
        return len(self.store)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As ``KeyBlock.search``; a label is the fact's row in the store."""
        scores, hits = self.store.search(queries.numpy(), k, as_of=self.as_of)
        self._hits = {entry.seq: entry for line in hits for entry in line}
        labels = torch.tensor([[entry.seq for entry in line] for line in hits]).reshape(scores.shape)
        return torch.from_numpy(scores).double(), labels

    def fact(self, place: int) -> Fact:
        """Prompt and target of a fact of the last search."""
        return self._hits[place].edit.prompt, self._hits[place].edit.target

    def keys(self, places: Sequence[int]) -> Tensor:
        """Keys [n, w] of facts of the last search."""
        return torch.from_numpy(self.store.vectors([self._hits[place] for place in places])).float()


def _stamp(editor: Editor) -> dict[str, str]:
    base = editor.base
    return {"editor": editor.hash(), "editor_name": editor.method, "base": base.fingerprint, "base_name": base.name}
