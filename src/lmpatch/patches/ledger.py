"""``apply``: put a patch on a model. The model's ledger knows what is on it, and undoes it in any order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from ..errors import BadInput, CannotMount, WrongModel
from ..inference.interventions import Intervention
from ..models.hooks import Hooks
from ..models.lm import LM
from .hook.patch import HookPatch, forget_compiled
from .patch import Mount, Patch, RunPatch
from .weight import bake, side
from .weight.bake import Baked
from .weight.delta import Addition, Delta, Scale
from .weight.patch import Target, WeightPatch, find_targets, fingerprint, hash_of, original
from .weight.side import Side

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Applied:
    """A patch that is on a model. Use it in a ``with`` statement, or call ``remove``."""

    lm: LM = field(repr=False)
    patch: Patch
    mount: Mount
    rounding_error: float = 0.0
    """Share of the change that rounding to the weights' dtype swallowed when it was baked: ‖(W_now - W_before) - ΔW‖ /
    ‖ΔW‖ over all weights of the patch. 0 on the side mount."""

    def remove(self, *, force: bool = False) -> None:
        """Take the patch off; the others stay. A second call does nothing.

        Args:
            force: also where someone else wrote a weight in the meantime; that write is dropped.
        Raises:
            ForeignWrite: someone did. Nothing was done.
        """
        _ledger(self.lm.model).take(self, force)

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


def apply(lm: LM, patch: Patch, mount: Mount | None = None, *, strict: bool = True) -> Applied:
    """Put a patch on a model: all of it, or an error and nothing.

    Args:
        mount: ``bake`` writes the weights and keeps the originals; ``side`` adds the change by hooks; ``run`` acts
            in lmpatch's own calls. None: ``bake`` for changes of weights, ``run`` for patches that touch none.
        strict: the model must be the one the patch was made for, weight by weight (compared after rounding to
            bf16). ``False`` asks for equal shapes only.
    Returns:
        a handle. Leaving its ``with`` block takes the patch off, in any order with others.
    Raises:
        WrongModel: the patch was made for other weights or other shapes.
        CannotMount: this mount cannot work on one of the weights; the message names the other.
        ForeignWrite: a weight that another patch is baked into was written by someone else.
    """
    mount = mount or patch.mounts[0]
    if mount not in ("bake", "side", "run"):
        raise BadInput(f"no mount is called {mount!r}. There are bake, side and run.")
    if mount not in patch.mounts:
        raise CannotMount(
            f"a {patch.method} patch of kind {patch.kind} cannot be mounted {mount!r}. Pass mount={patch.mounts[0]!r}, "
            "or leave mount out."
        )
    on = Applied(lm, patch, mount)
    _put(on, strict)
    return on


def applied(lm: LM) -> tuple[Applied, ...]:
    """The patches on a model, in the order they went on."""
    return tuple(_ledger(lm.model).applied)


@contextmanager
def suspended(lm: LM) -> Iterator[None]:
    """The model without its patches inside the ``with`` block, with all of them again after it.

    Raises:
        ForeignWrite: a weight that a patch is baked into was written by someone else. All patches stay on.
    """
    on = applied(lm)
    try:
        for one in reversed(on):
            one.remove()
        yield
    finally:
        for one in on:
            if one not in applied(lm):
                _put(one, strict=False)


def _put(on: Applied, strict: bool) -> None:
    lm, patch, ledger = on.lm, on.patch, _ledger(on.lm.model)
    if isinstance(patch, RunPatch):
        if strict:
            _same_model(lm, patch)
        ledger.act(on, patch.attach(lm))
    elif isinstance(patch, HookPatch):
        if strict:
            _same_model(lm, patch)
        ledger.steer(on, patch.hooks(lm))
    elif isinstance(patch, WeightPatch):
        targets = check(lm, patch, strict=strict)
        ledger.put(on, {target: patch.deltas[name] for name, target in targets.items()})
    else:
        raise BadInput(f"cannot apply {type(patch).__name__}. Give a WeightPatch, a HookPatch or a RunPatch.")


def check(lm: LM, patch: WeightPatch, *, strict: bool = True) -> dict[str, Target]:
    """The weight of ``lm`` behind each name in the patch, once it is certain that the patch fits.

    Raises:
        WrongModel: see ``apply``.
    """
    who, way = _who(lm, patch)
    try:
        targets = find_targets(lm.model, {name: delta.shape for name, delta in patch.deltas.items()})
    except LookupError as error:
        raise WrongModel(f"{who}: {error} Load {patch.base.name}.") from None
    if not strict:
        return targets
    found = {name: hash_of(original(lm.model, target)) for name, target in targets.items()}
    differ = [name for name in found if found[name] and patch.base.touched.get(name) not in ("", found[name])]
    if differ:
        raise WrongModel(f"{who}: {', '.join(differ)} had other values. {way}")
    _same_model(lm, patch)
    return targets


def _same_model(lm: LM, patch: Patch) -> None:
    who, way = _who(lm, patch)
    whole = fingerprint(lm)
    if not whole or not patch.base.fingerprint:
        raise WrongModel(f"{who} for certain: offloaded or quantised weights cannot be compared. {way}")
    if whole != patch.base.fingerprint:
        raise WrongModel(f"{who} ({whole[:12]}): weights it does not change differ. {way}")


def _who(lm: LM, patch: Patch) -> tuple[str, str]:
    """What is wrong, and what to do about it."""
    return (
        f"a patch made for {patch.base.name} ({patch.base.fingerprint[:12]}) does not fit {lm.name}",
        f"Load {patch.base.name} as it was then, or pass strict=False to take any model of these shapes.",
    )


class Ledger:
    """All patches on one model. It lives on the model while there are any."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.applied: list[Applied] = []
        self.entries: dict[Mount, dict[str, Baked | Side]] = {"bake": {}, "side": {}}  # by the weight's first name
        self.interventions: dict[Applied, Intervention] = {}
        self.handles: dict[Applied, list[Any]] = {}  # of hooks that belong to one patch alone

    def put(self, on: Applied, changes: dict[Target, Delta]) -> None:
        """Add a patch, after looking at everything that could stand against it."""
        for target, delta in changes.items():
            bake.refuse(target) if on.mount == "bake" else side.refuse(target)
            self._refuse_mixed(on.mount, target, delta)
        entries = self.entries[on.mount]
        for target in changes:
            if target.name in entries:
                entries[target.name].check()
        sums = [torch.zeros(2)]
        with self._all_or_nothing():
            for target, delta in changes.items():
                if target.name not in entries:
                    entries[target.name] = Baked(target) if on.mount == "bake" else Side(target)
                sums.append(entries[target.name].add(on, delta))
            self.applied.append(on)
        missed, wanted = torch.stack(sums).double().sum(0).sqrt().tolist()
        on.rounding_error = missed / wanted if wanted else 0.0

    def act(self, on: Applied, intervention: Intervention) -> None:
        """Add a patch that touches no weight."""
        self.interventions[on] = intervention
        if intervention.rules:
            self.handles[on] = [_missed(on)]
        self.applied.append(on)
        self._tidy()

    def steer(self, on: Applied, hooks: Hooks) -> None:
        """Add a patch of hooks."""
        self.handles[on] = [hooks]
        self.applied.append(on)
        self._tidy()
        try:
            hooks.put()
            forget_compiled()
        except BaseException:
            self.take(on)
            raise

    def take(self, on: Applied, force: bool = False) -> None:
        """Remove a patch, if it is on."""
        if on not in self.applied:
            return
        if on in self.interventions or on in self.handles:
            self.interventions.pop(on, None)
            if on in self.handles:
                for handle in self.handles.pop(on):
                    handle.remove()
                forget_compiled()
            self.applied.remove(on)
            self._tidy()
            return
        mine = [e for e in self.entries[on.mount].values() if any(owner is on for owner, _ in e.changes)]
        for entry in mine if not force else ():
            entry.check()
        with self._all_or_nothing():
            for entry in mine:
                entry.write(tuple(change for change in entry.changes if change[0] is not on))
            self.applied.remove(on)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """On an error, an interrupt included, every entry goes back to what it had."""
        was, had = list(self.applied), {entry: entry.changes for entry in self._all()}
        try:
            yield
        except BaseException:
            self.applied = was
            with ExitStack() as undo:  # runs to its end even if one step fails
                for entry in self._all():
                    if entry.changes != had.get(entry, ()):
                        undo.callback(entry.write, had.get(entry, ()))
            raise
        finally:
            self._tidy()

    def _all(self) -> list[Baked | Side]:
        return [entry for entries in self.entries.values() for entry in entries.values()]

    def _tidy(self) -> None:
        """Forget entries without changes, and leave on the model what the rest of the library reads."""
        for entries in self.entries.values():
            for name in [name for name, entry in entries.items() if not entry.changes]:
                del entries[name]
        originals = {name: e.original for e in self._all() if isinstance(e, Baked) for name in e.target.names}
        _leave(self.model, "_lmpatch_ledger", self if self.applied else None)
        _leave(self.model, "_lmpatch_originals", originals or None)
        _leave(self.model, "_lmpatch_interventions", tuple(self.interventions.values()) or None)

    def _refuse_mixed(self, mount: Mount, target: Target, delta: Delta) -> None:
        """A hook that scales the input of a weight would also scale what was baked into it."""
        other = self.entries["side" if mount == "bake" else "bake"].get(target.name)
        there = [d for _, d in other.changes] if other else []
        scale, addition = (there, [delta]) if mount == "bake" else ([delta], there)
        if any(isinstance(d, Scale) for d in scale) and any(isinstance(d, Addition) for d in addition):
            raise CannotMount(
                f"cannot mount {mount!r} on {target.name}: a scale on the side would also scale what is baked in. "
                f"Mount both the same way: mount={'side' if mount == 'bake' else 'bake'!r} here."
            )


def _missed(on: Applied) -> Any:
    """A hook that says once that a decode patch is passed by. Our own calls stop at the last block, before it."""

    def say(*_: Any) -> None:
        handle.remove()
        log.warning(
            "this call of the model does not see the %s patch that is on it: the patch acts in lmpatch's generate, "
            "stream, score and next_logits.",
            on.patch.method,
        )

    handle = on.lm.model.register_forward_hook(say)
    return handle


def _ledger(model: Any) -> Ledger:
    return getattr(model, "_lmpatch_ledger", None) or Ledger(model)


def _leave(model: Any, name: str, value: Any) -> None:
    if value is not None:
        setattr(model, name, value)
    elif hasattr(model, name):
        delattr(model, name)
