"""Putting patches on the model, watching its health, and proving that everything came off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

from ...data.edits import Edit
from ...data.matching import find
from ...errors import BadInput, CannotMount, Diverged, ForeignWrite, SubjectNotFound
from ...models.lm import LM
from ...patches.ledger import Applied, applied, apply
from ...patches.patch import Mount, Patch
from ...provenance import hash_json, hash_tensor, hash_tensors
from .health import perplexity, synchronise

Make = Callable[[LM, list[Edit]], Patch]
MakeEach = Callable[[LM, list[Edit]], Sequence[Patch]]
S = TypeVar("S")
COLLAPSE = 2.0  # times the base perplexity


def refuse_patched(lm: LM) -> None:
    """Raise ``BadInput`` if the model carries patches: what it says then is not the base's answer."""
    if applied(lm):
        names = ", ".join(on.patch.method for on in applied(lm))
        raise BadInput(f"the model carries patches ({names}), so it is not the base. Remove them, or pass patch=.")


def refuse_decode(patches: Sequence[Patch]) -> None:
    """Raise ``BadInput`` for a decode patch, before a bench that asks without contexts asks anything."""
    for patch in patches:
        if patch.needs_context:
            raise BadInput(
                f"{patch.method} is a decode patch: it compares a prompt with its form without context, and this bench "
                "has no contexts. Measure it with memotrap, kre or rag."
            )


@dataclass
class Fitted:
    """What is put on in one go: the patch a method made of one commit, or patches that were there already."""

    patches: tuple[Patch, ...]
    seconds: float
    edits: int
    """How many it writes."""
    refused: dict[int, str] = field(default_factory=dict)
    """Place in the commit → why the method would not write that edit."""


@dataclass(frozen=True)
class Maker:
    """Where the patches of a run come from."""

    patches: tuple[Patch, ...] = ()
    """There already."""
    make: Make | None = None
    """Makes the patch of one commit, on the model with the earlier ones."""
    make_each: MakeEach | None = None
    """Makes one patch per edit, as if each were fitted alone."""
    fit_batch: int = 32

    def fits(
        self, lm: LM, parts: Sequence[S], commits: Callable[[S], Sequence[Sequence[Edit]]]
    ) -> Iterator[tuple[S, Iterator[Fitted]]]:
        """Each part with what is put on for it, made when it is asked for."""
        if self.patches:
            seconds = sum(float(patch.made.get("seconds", 0.0)) for patch in self.patches)
            edits = sum(len(patch.edits) for patch in self.patches)
            for part in parts:
                count = edits or sum(map(len, commits(part)))
                yield part, iter([Fitted(self.patches, seconds, count)])
        elif self.make_each and _single(parts, commits):
            for start in range(0, len(parts), self.fit_batch):
                group = parts[start : start + self.fit_batch]
                each = _fit_each(lm, self.make_each, [commits(part)[0][0] for part in group])
                for part, fitted in zip(group, each, strict=True):
                    yield part, iter([fitted])
        elif self.make:
            for part in parts:
                yield part, (fit(lm, self.make, edits) for edits in commits(part))

    @property
    def any(self) -> bool:
        """There are patches, or there will be."""
        return bool(self.patches or self.make or self.make_each)

    def check(self, parts: Sequence[S], commits: Callable[[S], Sequence[Sequence[Edit]]] | None) -> None:
        """Raise ``BadInput`` where single edits are fitted and several stand together."""
        if self.make_each and not self.make and commits and not _single(parts, commits):
            raise BadInput("make_each fits single edits, and here several stand together. Give make as well.")


def _single(parts: Sequence[S], commits: Callable[[S], Sequence[Sequence[Edit]]]) -> bool:
    return all(sum(map(len, commits(part))) == 1 for part in parts)


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
            wrong = {i for i, e in enumerate(edits) if i not in refused and find(e.prompt, e.subject) < 0}
            refused |= {i: _why(error) for i in wrong or set(range(len(edits))) - set(refused)}
        except Diverged as error:
            refused |= {i: _why(error) for i in range(len(edits)) if i not in refused}
    synchronise(lm)
    patches = () if patch is None else (patch,)
    return Fitted(patches, perf_counter() - start, len(edits) - len(refused), refused)


def _fit_each(lm: LM, make_each: MakeEach, edits: list[Edit]) -> Iterator[Fitted]:
    """One patch per edit from one call; one call per edit if the method will not write some of them."""

    def one(lm: LM, edits: list[Edit]) -> Patch:
        return make_each(lm, edits)[0]

    start = perf_counter()
    try:
        patches = make_each(lm, edits)
    except (SubjectNotFound, Diverged):
        yield from (fit(lm, one, [edit]) for edit in edits)
        return
    if len(patches) != len(edits):
        raise BadInput(f"make_each made {len(patches)} patches of {len(edits)} edits. It must make one each.")
    synchronise(lm)
    seconds = (perf_counter() - start) / len(edits)
    yield from (Fitted((patch,), seconds, 1) for patch in patches)


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
    base_perplexity: float | None = None
    """None: health is not watched."""
    stack: list[Applied] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    collapsed_at: int | None = None
    """Edits in the model when its perplexity passed twice the base's."""

    def write(self, fitted: Fitted) -> None:
        """Put one commit on and note what it did.

        Raises:
            CannotMount: a patch did not become active.
        """
        if not fitted.patches:
            return
        on = [self._put(patch) for patch in fitted.patches]
        record = {
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
        record |= self._health()

    def _put(self, patch: Patch) -> Applied:
        for name in patch.base.touched:
            if name not in self.originals:  # never touched before, so it is as it was
                self.originals[name] = hash_tensor(self.lm.parameter(name), exact=True)
        on = apply(self.lm, patch, self.mount)
        self.stack.append(on)
        if applied(self.lm)[-1].patch is not patch:
            raise CannotMount(f"the {patch.method} patch is not active after it was applied. Nothing was scored.")
        return on

    def _health(self) -> dict[str, Any]:
        if self.base_perplexity is None:
            return {}
        now = perplexity(self.lm)
        if self.collapsed_at is None and not now <= COLLAPSE * self.base_perplexity:
            self.collapsed_at = self.edits
        return {"perplexity": now}

    def record(self) -> dict[str, Any]:
        """What is kept of the chunk."""
        return {
            "commits": self.commits, "collapsed_at": self.collapsed_at, "base_perplexity": self.base_perplexity,
            "restored": True,
        }  # fmt: skip

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
    writer = Writer(lm, mount, {})
    try:
        writer.write(Fitted(tuple(patches), 0.0, sum(len(patch.edits) for patch in patches)))
        yield
    finally:
        writer.close()


@contextmanager
def unchanged(lm: LM) -> Iterator[None]:
    """Raise ``ForeignWrite`` where any weight, touched or not, is another one after the block."""
    before = _bits(lm)
    yield
    if _bits(lm) != before:
        raise ForeignWrite("a weight that no patch holds was changed during the run. Load the model again.")


def _bits(lm: LM) -> str:
    return hash_tensors(sorted(lm.model.named_parameters()), exact=True)


def _change(patch: Patch) -> dict[str, float]:
    """‖ΔW‖ / ‖W‖ of every weight the patch adds to."""
    norms = patch.made.get("weight_norms", {})
    deltas = getattr(patch, "deltas", {}).items()
    return {name: delta.norm() / norms[name] for name, delta in deltas if norms.get(name) and delta.kind != "scale"}
