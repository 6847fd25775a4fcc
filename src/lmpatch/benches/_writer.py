"""Putting the commits of one chunk on the model, watching its health, and proving that everything came off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from ..data.edit import Edit
from ..errors import BadInput, CannotMount, Diverged, ForeignWrite, SubjectNotFound
from ..models.lm import LM
from ..patches.ledger import Applied, applied, apply
from ..patches.patch import Mount, Patch
from ..provenance import hash_tensor
from ._health import perplexity, synchronise

Make = Callable[[LM, list[Edit]], Patch]
COLLAPSE = 2.0  # times the base perplexity


def refuse_patched(lm: LM) -> None:
    """Raise ``BadInput`` if the model carries patches: what it says then is not the base's answer."""
    if applied(lm):
        names = ", ".join(on.patch.method for on in applied(lm))
        raise BadInput(f"the model carries patches ({names}), so it is not the base. Remove them, or pass patch=.")


def refuse_decode(patch: Patch | None) -> None:
    """Raise ``BadInput`` for a decode patch, before a bench that asks without contexts asks anything."""
    if patch is not None and patch.needs_context:
        raise BadInput(
            f"{patch.method} is a {patch.kind} patch: it compares a prompt with its form without context, and this "
            "bench has no contexts. Measure it with memotrap, kre or rag."
        )


@dataclass
class Fitted:
    """What a method made of one commit."""

    patch: Patch | None
    seconds: float
    refused: dict[int, str] = field(default_factory=dict)
    """Place in the commit → why the method would not write that edit."""


def fit(lm: LM, make: Make, edits: Sequence[Edit]) -> Fitted:
    """Make the patch of one commit. Edits whose subject is missing are refused alone, else the whole commit."""
    refused: dict[int, str] = {}
    synchronise(lm)
    start = perf_counter()
    patch: Patch | None = None
    while len(refused) < len(edits) and patch is None:
        left = [edit for i, edit in enumerate(edits) if i not in refused]
        try:
            patch = make(lm, left)
        except SubjectNotFound as error:
            wrong = {i for i, e in enumerate(edits) if i not in refused and not (e.subject and e.subject in e.prompt)}
            refused |= {i: _why(error) for i in wrong or set(range(len(edits))) - set(refused)}
        except Diverged as error:
            refused |= {i: _why(error) for i in range(len(edits)) if i not in refused}
    synchronise(lm)
    return Fitted(patch, perf_counter() - start, refused)


def _why(error: Exception) -> str:
    return f"refused: {type(error).__name__}: {error}"


@dataclass
class Writer:
    """The patches of one chunk. ``originals`` is shared by all chunks of a run."""

    lm: LM
    mount: Mount | None
    """None: each patch's own."""
    originals: dict[str, str]
    """Parameter → SHA-256 of its stored bytes before anything touched it."""
    base_perplexity: float | None
    """None: health is not watched."""
    stack: list[Applied] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    collapsed_at: int | None = None
    """Edits in the model when its perplexity passed twice the base's."""

    def write(self, fitted: Fitted, edits: int) -> None:
        """Put one commit on and note what it did.

        Raises:
            CannotMount: the patch did not become active.
        """
        patch = fitted.patch
        if patch is None:
            return
        for name in patch.base.touched:
            if name not in self.originals:  # never touched before, so it is as it was
                self.originals[name] = hash_tensor(self.lm.parameter(name), exact=True)
        on = apply(self.lm, patch, self.mount)
        self.stack.append(on)
        if applied(self.lm)[-1].patch is not patch:
            raise CannotMount(f"the {patch.method} patch is not active after it was applied. Nothing was scored.")
        record = {"edits": edits, "seconds": fitted.seconds, "bytes": patch.nbytes, "patch": patch.hash()}
        record |= {
            "method": patch.method,
            "mount": on.mount,
            "rounding_error": on.rounding_error,
            "change": patch.change_norms(),
        }
        self.commits.append(record)
        record |= self._health()

    def _health(self) -> dict[str, Any]:
        if self.base_perplexity is None:
            return {}
        now = perplexity(self.lm)
        if self.collapsed_at is None and not now <= COLLAPSE * self.base_perplexity:
            self.collapsed_at = self.edits
        return {"perplexity": now}

    @property
    def edits(self) -> int:
        """How many are in the model."""
        return sum(commit["edits"] for commit in self.commits)

    @property
    def tail_touched(self) -> bool:
        """A patch changed what follows the last block, which stored hidden states do not show."""
        layout = self.lm.layout
        tail = {*layout.tail, *([layout.embed] if layout.tied else [])}
        return any(name.rpartition(".")[0] in tail for on in self.stack for name in on.patch.base.touched)

    def close(self) -> None:
        """Take everything off.

        Raises:
            ForeignWrite: a patch is still there, or a touched weight differs from what it was.
        """
        touched = {name for on in self.stack for name in on.patch.base.touched}
        while self.stack:
            self.stack.pop().remove()
        if applied(self.lm):
            raise ForeignWrite("a patch is still on the model after the chunk was taken off. Load the model again.")
        changed = [n for n in sorted(touched) if hash_tensor(self.lm.parameter(n), exact=True) != self.originals[n]]
        if changed:
            raise ForeignWrite(f"{', '.join(changed)} did not come back as it was. Load the model again.")


@contextmanager
def mounted(lm: LM, patches: Sequence[Patch], mount: Mount | None) -> Iterator[None]:
    """The patches on the model, in this order; every touched weight is proved to come back."""
    writer = Writer(lm, mount, {}, base_perplexity=None)
    try:
        for patch in patches:
            writer.write(Fitted(patch, 0.0), len(patch.edits))
        yield
    finally:
        writer.close()
