"""``WeightHandle``: one weight patch on a model. Patches on one weight share what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import count

import torch
from torch import Tensor

from ...errors import CannotMount
from ..handle import Handle
from ..patch import Mount
from . import bake, side
from .bake import Baked
from .delta import Addition, Delta, Scale
from .side import Side
from .target import Target

NUMBERS = count()


class WeightHandle(Handle):
    """Changes of some weights, baked or on the side."""

    def __init__(self, changes: Mapping[Target, Delta], mount: Mount, others: Sequence[Handle]) -> None:
        super().__init__()
        self.changes, self.mount, self.number = dict(changes), mount, next(NUMBERS)
        empty: dict[str, dict[str, Baked | Side]] = {"bake": {}, "side": {}}
        self.book = next((h.book for h in others if isinstance(h, WeightHandle)), empty)
        """Mount -> first name of a weight -> all that is on it, of all patches."""
        self._entries = self.book[mount]
        for target, delta in self.changes.items():
            bake.refuse(target) if mount == "bake" else side.refuse(target, delta)
            self._refuse_mixed(target, delta)
        for target in self.changes:
            if target.name in self._entries:
                self._entries[target.name].check()

    def enable(self) -> None:
        sums = [torch.zeros(2)]
        for target, delta in self.changes.items():
            entry = self._entries.get(target.name) or (Baked(target) if self.mount == "bake" else Side(target))
            self._entries[target.name] = entry
            if self.number not in entry.changes:
                sums.append(entry.add(delta, dict(sorted([*entry.changes.items(), (self.number, delta)]))))
        if len(sums) > len(self.changes):
            missed, wanted = torch.stack(sums).double().sum(0).sqrt().tolist()
            self.rounding_error = missed / wanted if wanted else 0.0

    def disable(self) -> None:
        with ExitStack() as rest:  # goes through all of them even if one fails
            for entry in self._mine():
                rest.callback(entry.write, {n: delta for n, delta in entry.changes.items() if n != self.number})
        for target in self.changes:
            if target.name in self._entries and not self._entries[target.name].changes:
                del self._entries[target.name]

    def check(self) -> None:
        for entry in self._mine():
            entry.check()

    def originals(self) -> Mapping[str, Tensor]:
        baked = (entry for entry in self.book["bake"].values() if isinstance(entry, Baked))
        return {name: entry.original for entry in baked for name in entry.target.names}

    def _mine(self) -> list[Baked | Side]:
        entries = (self._entries.get(target.name) for target in self.changes)
        return [entry for entry in entries if entry is not None and self.number in entry.changes]

    def _refuse_mixed(self, target: Target, delta: Delta) -> None:
        """A hook that scales the input of a weight would also scale what was baked into it."""
        other: Mount = "side" if self.mount == "bake" else "bake"
        entry = self.book[other].get(target.name)
        others = [*entry.changes.values()] if entry else []
        scale, addition = (others, [delta]) if other == "side" else ([delta], others)
        if any(isinstance(d, Scale) for d in scale) and any(isinstance(d, Addition) for d in addition):
            raise CannotMount(
                f"cannot mount {self.mount!r} on {target.name}: a scale on the side would also scale what is baked in. "
                f"Mount both the same way: mount={other!r} here."
            )
