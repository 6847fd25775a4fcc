"""``Memory``: a folder of facts that answers questions, with the editor that makes its keys beside them.

memory = Memory.create("facts", editor)
memory.add([Edit("The Eiffel Tower is in", "Rome")])
with apply(lm, memory.patch()):
    generate(lm, "The Eiffel Tower is in")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.edit import Edit
from ..errors import BadInput, CannotMerge
from ..files import new_folder
from ..models.lm import LM
from ..patches.editor import Editor, load_editor
from ..patches.memory.patch import (
    Finder,
    MemoryIntervention,
    MemoryPatch,
    Scope,
    build_memory,
    encode_keys,
    resolve_scope,
)
from ..patches.patch import plain_edits
from ..progress import Progress
from ..retrieval.network import Retriever, Shape
from .entry import Entry
from .store import Store

EDITOR = "editor.safetensors"
CHUNK = 1024  # facts encoded between two reports of progress


class Memory:
    """A store and its editor. Needs no language model: a fact is added by one pass of the sentence encoder."""

    def __init__(self, store: Store, editor: Editor) -> None:
        self.store, self.editor = store, editor

    @classmethod
    def create(cls, path: str | Path, editor: Editor) -> Memory:
        """Make an empty memory: all of it, or nothing.

        Raises:
            BadInput: something is there already.
            MissingExtra: LanceDB is not installed.
        """
        path = Path(path)
        with new_folder(path) as folder:
            shape = Shape(**editor.parts["shape"])
            Store.create(folder, width=shape.width, matched=shape.matched, stamp=_stamp(editor))
            editor.save(folder / EDITOR)
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
    def network(self) -> Retriever:
        """The retriever, ready for use. Both that and the adapted encoder weights are made once."""
        return self._empty.network()

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The encoder's adapted weights."""
        with torch.no_grad():
            return self.network.encoder_weights()

    def add(
        self, edits: Sequence[Edit], *, source: Mapping[str, Any] | None = None, progress: Progress | None = None
    ) -> int:
        """Add facts in one commit. A fact whose prompt is there already supersedes the older one.

        Args:
            source: where the facts come from, kept with each.
        Returns:
            the version that holds them. They are on the disk by then.
        Raises:
            BadInput: a fact is longer than the encoder reads. Nothing was added.
            LmpatchError: the disk is full or cannot be written. Nothing was added.
        """
        parts = []
        for start in range(0, len(edits), CHUNK):
            parts.append(encode_keys(self.network, edits[start : start + CHUNK], self.weights))
            if progress:
                progress(min(start + CHUNK, len(edits)), len(edits), "encoding facts")
        keys = torch.cat(parts) if parts else encode_keys(self.network, ())
        return self.store.add(edits, keys.numpy(), source=source)

    def patch(self, scope: Scope | None = None) -> LivePatch:
        """The memory as a patch: every question sees what was committed before it, by whichever process.

        Raises:
            BadInput: ``scope`` has a cosine gate; the store compares inner products. Take a snapshot.
        """
        scope = resolve_scope(scope or Scope(), self.editor)
        if scope.gate == "cosine":
            raise BadInput("a cosine gate needs all keys at hand. Use gate='sentinel', or snapshot() of this memory.")
        common = {f.name: getattr(self._empty, f.name) for f in fields(self._empty)}
        return LivePatch(**{**common, "scope": scope}, memory=self)

    def snapshot(self, scope: Scope | None = None) -> MemoryPatch:
        """The facts that hold now as a patch of their own, which can be saved and shipped."""
        facts = self.store.facts()
        return replace(
            self._empty,
            edits=plain_edits([fact.edit for fact in facts]),
            keys=torch.from_numpy(self.store.vectors(facts)),
            scope=resolve_scope(scope or Scope(), self.editor),
        )

    @cached_property
    def _empty(self) -> MemoryPatch:
        return build_memory(self.editor, (), Scope())


def is_memory(path: str | Path) -> bool:
    """Whether a folder holds a memory, not a patch."""
    return (Path(path) / EDITOR).exists()


@dataclass(eq=False)
class LivePatch(MemoryPatch):
    """A memory at work. It holds no facts itself, so there is nothing to save or merge: take a ``snapshot``."""

    memory: Memory = field(kw_only=True)

    def describe(self) -> list[str]:
        return [f"  {len(self.memory)} facts in {self.memory.store.path}; {self._how()}"]

    def intervention(self, lm: LM) -> MemoryIntervention:
        return MemoryIntervention(lm, Finder(self, self.facts(), self.memory.network))

    def facts(self) -> StoreFacts:
        """Where its facts are looked up."""
        return StoreFacts(self.memory.store)

    def save(self, path: str | Path) -> None:
        raise BadInput(f"the facts are in {self.memory.store.path}. Save memory.snapshot() to have them as a patch.")

    def merged(self, others: Sequence[MemoryPatch]) -> MemoryPatch:
        raise CannotMerge("a memory goes on changing. Merge memory.snapshot() instead.")


class StoreFacts:
    """The facts of a store, looked up for each question."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._found: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self.store)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As ``KeyBlock.search``; a label is the fact's row in the store."""
        scores, hits = self.store.search(queries.numpy(), k)
        self._found = {entry.seq: entry for line in hits for entry in line}
        labels = torch.tensor([[entry.seq for entry in line] for line in hits]).reshape(scores.shape)
        return torch.from_numpy(scores).double(), labels

    def fact(self, place: int) -> tuple[str, str]:
        """Prompt and target of a fact that was just found."""
        edit = self._found[place].edit
        return edit.prompt, edit.target

    def keys(self, places: Sequence[int]) -> Tensor:
        """Keys [n, R] of facts that were just found."""
        return torch.from_numpy(self.store.vectors([self._found[place] for place in places])).float()


def _stamp(editor: Editor) -> dict[str, str]:
    return {
        "editor": editor.hash(), "editor_name": editor.method, "base": editor.base.fingerprint,
        "base_name": editor.base.name,
    }  # fmt: skip
