"""Hooks that surely come off again, also when Ctrl-C arrives between two lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn


class Stop(Exception):
    """What a hook raises to end a forward early."""


@dataclass(frozen=True)
class Hook:
    """A function that a module calls when it runs. It is on no module before ``Hooks.put`` or ``hooked``."""

    module: nn.Module
    run: Callable[..., Any]
    """``run(module, args, output)``, or with ``before`` ``run(module, args)``; as PyTorch's forward hooks."""
    before: bool = False
    """Called before the module runs."""
    kwargs: bool = False
    """``run`` also receives the keyword arguments, behind ``args``."""
    first: bool = False
    """Called before the hooks that are there already."""


class Hooks:
    """Hooks that go on and come off together; both may be repeated.

    They are known by their functions and not by PyTorch's handles: an interrupt between a registration and the
    return of its handle would lose the handle.
    """

    def __init__(self, *hooks: Hook) -> None:
        self._hooks = [(hook, partial(hook.run)) for hook in hooks]  # a function of its own for each registration

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def put(self) -> None:
        """Put on those that are off."""
        for hook, run in self._hooks:
            if not any(there is run for there in _tables(hook)[0].values()):
                add = hook.module.register_forward_pre_hook if hook.before else hook.module.register_forward_hook
                add(run, with_kwargs=hook.kwargs, prepend=hook.first)

    def remove(self) -> None:
        """Take off those that are on."""
        for hook, run in self._hooks:
            table, with_kwargs = _tables(hook)
            for key in [key for key, there in table.items() if there is run]:
                with_kwargs.pop(key, None)
                del table[key]


def _tables(hook: Hook) -> tuple[dict[int, Callable[..., Any]], dict[int, bool]]:
    module = hook.module
    if hook.before:
        return module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
    return module._forward_hooks, module._forward_hooks_with_kwargs


@contextmanager
def hooked(*hooks: Hook) -> Iterator[None]:
    """These hooks are on inside the block and off behind it, whatever happens."""
    on = Hooks(*hooks)
    try:
        try:
            on.put()
            yield
        finally:
            on.remove()
    finally:
        on.remove()  # an interrupt may have stopped the first
