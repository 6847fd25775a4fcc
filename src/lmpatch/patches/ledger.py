"""``apply``: put a patch on a model. The model's ledger knows what is on it, and undoes it in any order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from ..errors import BadInput, CannotMount
from ..inference.interventions import Intervention
from ..models.lm import LM
from ..models.load import require_lm
from .file import as_patch
from .handle import Handle
from .patch import ONLY, Mount, Patch

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Applied:
    """A patch that is on a model. Use it in a ``with`` statement, or call ``remove``."""

    lm: LM
    patch: Patch
    mount: Mount
    handle: Handle = field(default_factory=Handle)
    strict: bool = True
    entered: bool = False
    """A ``with`` block is open."""

    @property
    def rounding_error(self) -> float:
        """Share of the change that rounding to the weights' dtype swallowed when it was baked.

        That is ‖(W_now - W_before) - ΔW‖ / ‖ΔW‖ over all weights of the patch; 0 on the other mounts.
        """
        return self.handle.rounding_error

    def remove(self, *, force: bool = False) -> None:
        """Take the patch off; the others stay. A second call does nothing.

        Args:
            force: also where someone else wrote a weight in the meantime; that write is dropped.
        Raises:
            ForeignWrite: someone did. Nothing was done.
        """
        with self.lm.lock:
            _ledger(self.lm.model).take(self, force)

    def __enter__(self) -> Applied:
        try:
            with self.lm.lock:
                if self.entered and self in applied(self.lm):
                    raise BadInput(
                        "this Applied is in a with block already, which ends first. Call apply once for each."
                    )
                if self not in applied(self.lm):  # a second block: it is put on again
                    check(self.lm, self.patch, strict=self.strict)
                    _ledger(self.lm.model).put(self)
                self.entered = True
                return self
        except KeyboardInterrupt:  # no block begins, so none takes it off
            self.remove(force=True)
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self.remove()
        finally:  # again: a Ctrl-C may have stopped the first
            self.remove()
            self.entered = False

    def __repr__(self) -> str:
        where = "on" if self in applied(self.lm) else "off"
        lost = f", {self.rounding_error:.1%} lost by rounding" if self.rounding_error else ""
        return f"<{self.patch.method} patch {where} {self.lm.name}, mount {self.mount}{lost}>"


def apply(lm: LM, patch: Patch | str | Path, mount: Mount | None = None, *, strict: bool = True) -> Applied:
    """Put a patch on a model: all of it, or an error and nothing. One that is on goes on again, with a warning.

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
    require_lm(lm)
    patch = as_patch(patch)
    if not patch.mounts:
        raise CannotMount(f"a {patch.kind} patch makes a new model. Call rebuild(lm, patch), which returns it.")
    mount = mount or patch.mounts[0]
    if mount not in get_args(Mount):
        raise BadInput(f"no mount is called {mount!r}. There are bake, side and run.")
    if patch.only_in_context and mount == "bake":
        raise CannotMount(f"a baked weight acts on every prompt, and this {patch.method} patch {ONLY}")
    if mount not in patch.mounts:
        raise CannotMount(
            f"a {patch.method} patch of kind {patch.kind} cannot be mounted {mount!r}. Pass mount={patch.mounts[0]!r}, "
            "or leave mount out."
        )
    on = Applied(lm, patch, mount, strict=strict)
    try:
        with lm.lock:
            check(lm, patch, strict=strict)
            _warn(lm, patch)
            _ledger(lm.model).put(on)
        return on
    except BaseException:  # a Ctrl-C behind the last line: nobody would have what takes it off
        on.remove(force=True)
        raise


def _warn(lm: LM, patch: Patch) -> None:
    """Log what is legal and seldom meant: a patch that is on already, or one without those it was fitted on top of."""
    on, below = [one.patch for one in applied(lm)], patch.made.get("on", {})
    if any(one is patch or (one.describe() == patch.describe() and one.hash() == patch.hash()) for one in on):
        log.warning("%r is on %s already: its change counts twice. remove(lm) takes all patches off.", patch, lm.name)
    if missing := [f"{method} ({key[:12]})" for key, method in below.items() if key not in {p.hash() for p in on}]:
        log.warning("%r was fitted on a model with %s on, which is not on %s.", patch, missing, lm.name)


def check(lm: LM, patch: Patch, *, strict: bool = True) -> None:
    """Raise ``WrongModel`` unless the patch fits the model; see ``apply``."""
    patch.fits(lm)
    if strict:
        patch.base.require(lm)


def rebuild(lm: LM, patch: Patch | str | Path, *, strict: bool = True) -> LM:
    """The new model that a patch makes of ``lm``, which is left as it was.

    Raises:
        BadInput: the patch is of a kind that is put on a model (``apply``), or ``lm`` carries patches.
        WrongModel: as in ``apply``; so is ``strict``.
    """
    patch = as_patch(patch)
    if on := applied(lm):
        raise BadInput(f"{lm.name} carries {len(on)} patches. Call remove(lm), and apply them to the new model.")
    with lm.lock:
        check(lm, patch, strict=strict)
        return patch.rebuild(lm)


def remove(lm: LM, *, force: bool = False) -> None:
    """Take every patch off a model, the last one first; ``force`` as in ``Applied.remove``.

    Raises:
        ForeignWrite: someone else wrote a weight that a patch is baked into. All patches stay on.
    """
    on = applied(lm)
    with lm.lock:
        for one in () if force else on:
            one.handle.check()
        for one in reversed(on):
            one.remove(force=force)


def applied(lm: LM) -> tuple[Applied, ...]:
    """The patches on a model, in the order they went on."""
    require_lm(lm)
    return tuple(_ledger(lm.model).applied)


@contextmanager
def suspended(lm: LM) -> Iterator[None]:
    """The model without its patches inside the ``with`` block, with all of them again after it.

    Other threads wait for the end of the block before they run the model.

    Raises:
        ForeignWrite: a weight that a patch is baked into was written by someone else. All patches stay on.
    """

    def put_back(on: Applied) -> None:
        if on not in applied(lm):
            on.patch.fits(lm)
            _ledger(lm.model).put(on)

    with lm.lock, ExitStack() as stack:  # the stack goes through all of them even if one fails
        on = applied(lm)
        for one in reversed(on):
            stack.callback(put_back, one)
            stack.callback(put_back, one)  # first of the two: where a Ctrl-C stops it, the other goes on
        for one in reversed(on):
            one.remove()
        yield


@contextmanager
def trial(lm: LM, patch: Patch, *mounts: Mount, strict: bool = True) -> Iterator[None]:
    """The patch is on inside the block, by the first of these mounts that its weights allow, and off behind it.

    Unlike ``with apply(...)`` it comes off wherever Ctrl-C arrives, also between the block's last line and the next.
    Other threads do not meet it: they wait for the end of the block.
    """
    with lm.lock:
        try:
            try:
                _put(lm, patch, mounts, strict)
                yield
            finally:
                _remove(lm, patch)
        finally:
            _remove(lm, patch)  # an interrupt may have stopped the first


def _put(lm: LM, patch: Patch, mounts: tuple[Mount, ...], strict: bool) -> None:
    for mount in mounts:
        try:
            apply(lm, patch, mount=mount, strict=strict)
            return
        except CannotMount:  # offloaded or quantised weights are not written
            if mount == mounts[-1]:
                raise


def _remove(lm: LM, patch: Patch) -> None:
    for on in applied(lm):
        if on.patch is patch:
            on.remove()


class Ledger:
    """All patches on one model. It lives on the model, as ``_lmpatch_ledger``, while there are any."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.applied: list[Applied] = []

    @property
    def originals(self) -> dict[str, Tensor]:
        """Parameter name -> the tensor as it was before any patch, for every weight that a patch wrote."""
        return {name: t for on in self.applied for name, t in on.handle.originals().items()}

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """What the patches do in lmpatch's own calls, in the order they went on."""
        return tuple(one for on in self.applied for one in on.handle.interventions)

    def put(self, on: Applied) -> None:
        """Put a patch on. It is in the ledger, and the ledger on the model, before anything is written or hooked."""
        on.handle = on.patch.attach(on.lm, on.mount, [other.handle for other in self.applied])
        try:
            self.applied.append(on)
            self.model._lmpatch_ledger = self
            on.handle.enable()
        except BaseException:
            on.handle.disable()
            self._drop(on)
            raise

    def take(self, on: Applied, force: bool = False) -> None:
        """Take a patch off, if it is on."""
        if on in self.applied and not force:
            on.handle.check()
        try:
            if on in self.applied:
                on.handle.disable()
            self._drop(on)
        except BaseException:
            if on in self.applied:
                on.handle.enable()
            raise

    def _drop(self, on: Applied) -> None:
        """Forget a patch, and leave nothing of the ledger on a model without patches."""
        if on in self.applied:
            self.applied.remove(on)
        if not self.applied and hasattr(self.model, "_lmpatch_ledger"):
            del self.model._lmpatch_ledger


def _ledger(model: Any) -> Ledger:
    return getattr(model, "_lmpatch_ledger", None) or Ledger(model)
