"""A patch that is on the model while a method looks at what it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import CannotMount
from ..models.lm import LM
from ..patches.ledger import applied, apply
from ..patches.patch import Mount, Patch


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
