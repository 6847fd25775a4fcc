"""Putting patches on the model, watching its health, and proving that everything came off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from ...data.edits import Edit
from ...data.matching import find
from ...errors import BadInput, CannotMount, Diverged, ForeignWrite, Harmful, SubjectNotFound
from ...inference.plain_text import perplexity
from ...models.lm import LM
from ...patches.ledger import Applied, applied, apply
from ...patches.patch import Mount, Patch
from ...provenance import hash_json, hash_tensor
from .health import synchronise

Make = Callable[[LM, list[Edit]], Patch]
MakeEach = Callable[[LM, list[Edit]], Sequence[Patch | Harmful]]
"""``Harmful`` in the place of a patch: that edit is refused."""
COLLAPSE = 2.0  # times the base perplexity


def refuse_patched(lm: LM) -> None:
    """Raise ``BadInput`` if the model carries patches: what it says then is not the base's answer."""
    if applied(lm):
        names = ", ".join(on.patch.method for on in applied(lm))
        raise BadInput(f"the model carries patches ({names}), so it is not the base. Call remove(lm), or pass patch=.")


@dataclass
class Fitted:
    """What is put on in one go: the patch a method made of one commit, or patches that were there already."""

    patches: tuple[Patch, ...]
    seconds: float
    edits: int
    """How many it writes."""
    refused: dict[int, str] = field(default_factory=dict)
    """Place in the commit → why the method would not write that edit."""


@dataclass
class Maker:
    """Where the patches of a run come from, as ``runner.run`` is given it."""

    patches: tuple[Patch, ...] = ()
    make: Make | None = None
    make_each: MakeEach | None = None
    fit_batch: int = 1

    @property
    def any(self) -> bool:
        """There are patches, or there will be."""
        return bool(self.patches or self.make or self.make_each)

    def settle(self, items: Sequence[Sequence[Sequence[Edit]]]) -> None:
        """Use ``make_each`` only where all edits stand alone; ``BadInput`` where they do not and there is no other."""
        if self.make_each and any(sum(map(len, commits)) != 1 for commits in items):
            if not self.make:
                raise BadInput("make_each fits single edits, and here several stand together. Give make as well.")
            self.make_each = None

    def fits(self, lm: LM, items: Sequence[Sequence[Sequence[Edit]]]) -> Iterator[Iterator[Fitted]]:
        """What is put on for each item, of whose commits it is made when it is asked for."""
        if self.patches:
            seconds = sum(float(patch.made.get("seconds", 0.0)) for patch in self.patches)
            edits = sum(len(patch.edits) for patch in self.patches)
            yield from (iter([Fitted(self.patches, seconds, edits or sum(map(len, commits)))]) for commits in items)
        elif self.make_each:
            for start in range(0, len(items), self.fit_batch):
                group = [edit for commits in items[start : start + self.fit_batch] for (edit,) in commits]
                yield from (iter([fitted]) for fitted in _fit_each(lm, self.make_each, group))
        elif make := self.make:
            yield from ((fit(lm, make, edits) for edits in commits) for commits in items)


def fit(lm: LM, make: Make, edits: Sequence[Edit]) -> Fitted:
    """Make the patch of one commit. Edits whose subject is missing are refused alone, else the whole commit."""
    refused: dict[int, str] = {}
    patch: Patch | None = None
    synchronise(lm)
    start = perf_counter()
    while patch is None and (left := [i for i in range(len(edits)) if i not in refused]):
        try:
            patch = make(lm, [edits[i] for i in left])
        except (SubjectNotFound, Diverged) as error:
            lost = [i for i in left if find(edits[i].prompt, edits[i].subject) < 0]
            wrong = lost if lost and isinstance(error, SubjectNotFound) else left
            refused |= dict.fromkeys(wrong, _said(error))
    synchronise(lm)
    return Fitted((patch,) if patch else (), perf_counter() - start, len(edits) - len(refused), refused)


def _one(patch: Patch | Harmful) -> Patch:
    if isinstance(patch, Harmful):
        raise patch
    return patch


def _said(error: Exception) -> str:
    return f"refused: {type(error).__name__}: {error}"


def _fit_each(lm: LM, make_each: MakeEach, edits: list[Edit]) -> Iterator[Fitted]:
    """One patch per edit from one call; one call per edit if the method will not write some of them."""
    start = perf_counter()
    try:
        patches = make_each(lm, edits)
    except (SubjectNotFound, Diverged):
        yield from (fit(lm, lambda lm, one: _one(make_each(lm, one)[0]), [edit]) for edit in edits)
        return
    if len(patches) != len(edits):
        raise BadInput(f"make_each made {len(patches)} patches of {len(edits)} edits. It must make one each.")
    synchronise(lm)
    seconds = (perf_counter() - start) / len(edits)
    for patch in patches:
        if isinstance(patch, Harmful):
            yield Fitted((), seconds, 0, {0: _said(patch)})
        else:
            yield Fitted((patch,), seconds, 1)


@dataclass
class Writer:
    """The patches of one chunk. ``originals`` is shared by all chunks of a run."""

    lm: LM
    mount: Mount | None
    """None: each patch's own."""
    originals: dict[str, str]
    """Parameter → SHA-256 of its stored bytes before anything touched it."""
    base_perplexity: float | None = None
    """None: health is not watched."""
    stack: list[Applied] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    collapsed_at: int | None = None
    """Edits in the model when its perplexity passed twice the base's."""

    def write(self, fitted: Fitted) -> None:
        """Put one commit on and note what it did; ``CannotMount`` where a patch does not become active."""
        if not fitted.patches:
            return
        start = len(self.stack)
        for patch in fitted.patches:
            for name in set(patch.base.touched) - set(self.originals):  # never touched before, so it is as it was
                self.originals[name] = hash_tensor(self.lm.parameter(name), exact=True)
            self.stack.append(apply(self.lm, patch, self.mount))
            if applied(self.lm)[-1].patch is not patch:
                raise CannotMount(f"the {patch.method} patch is not active after it was applied. Nothing was scored.")
        on = self.stack[start:]
        record: dict[str, Any] = {
            "edits": fitted.edits,
            "seconds": fitted.seconds,
            "bytes": sum(patch.nbytes for patch in fitted.patches),
            "patch": fitted.patches[0].hash() if len(on) == 1 else hash_json([p.hash() for p in fitted.patches]),
            "method": " + ".join(patch.method for patch in fitted.patches),
            "mount": on[0].mount,
            "rounding_error": max(one.rounding_error for one in on),
            "change": {name: share for patch in fitted.patches for name, share in _change(patch).items()},
        }
        self.commits.append(record)
        if self.base_perplexity is not None:
            record["perplexity"] = perplexity(self.lm)
            if self.collapsed_at is None and not record["perplexity"] <= COLLAPSE * self.base_perplexity:
                self.collapsed_at = self.edits

    def record(self) -> dict[str, Any]:
        """What is kept of the chunk."""
        return {"commits": self.commits, "collapsed_at": self.collapsed_at, "base_perplexity": self.base_perplexity}

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
        """Take everything off; ``ForeignWrite`` where a patch is still there, or a weight is not what it was."""
        touched = {name for on in self.stack for name in on.patch.base.touched}
        for on in reversed(self.stack):
            on.remove()
        if applied(self.lm):
            raise ForeignWrite("a patch is still on the model after the chunk was taken off. Load the model again.")
        if changed := [
            n for n in sorted(touched) if hash_tensor(self.lm.parameter(n), exact=True) != self.originals[n]
        ]:
            raise ForeignWrite(f"{', '.join(changed)} did not come back as it was. Load the model again.")
        self.stack.clear()


@contextmanager
def writing(lm: LM, mount: Mount | None, originals: dict[str, str]) -> Iterator[Writer]:
    """A writer whose patches are off behind the block, wherever Ctrl-C arrives, and proved to be."""
    writer = Writer(lm, mount, originals)
    try:
        try:
            yield writer
        finally:
            writer.close()
    finally:
        writer.close()  # an interrupt may have stopped the first


def _change(patch: Patch) -> dict[str, float]:
    """‖ΔW‖ / ‖W‖ of every weight the patch adds to."""
    norms = patch.made.get("weight_norms", {})
    deltas = getattr(patch, "deltas", {}).items()
    return {name: delta.norm() / norms[name] for name, delta in deltas if norms.get(name) and delta.kind != "scale"}
