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

Book = dict[str, dict[str, Baked | Side]]
"""Mount -> first name of a weight -> all that is on it."""
NUMBERS = count()


class WeightHandle(Handle):
    """Changes of some weights, baked or on the side."""

    def __init__(self, changes: Mapping[Target, Delta], mount: Mount, others: Sequence[Handle]) -> None:
        super().__init__()
        self.changes, self.mount, self.number = dict(changes), mount, next(NUMBERS)
        self.book: Book = next((h.book for h in others if isinstance(h, WeightHandle)), {"bake": {}, "side": {}})
        for target, delta in self.changes.items():
            bake.refuse(target) if mount == "bake" else side.refuse(target, delta)
            self._refuse_mixed(target, delta)
        for target in self.changes:
            if target.name in self._entries:
                self._entries[target.name].check()

    @property
    def _entries(self) -> dict[str, Baked | Side]:
        return self.book[self.mount]

    def enable(self) -> None:
        sums = [torch.zeros(2)]
        for target, delta in self.changes.items():
            entry = self._entries.get(target.name) or (Baked(target) if self.mount == "bake" else Side(target))
            self._entries[target.name] = entry
            if not self._is_in(entry):
                sums.append(entry.add(delta, tuple(sorted((*entry.changes, (self.number, delta)), key=_number))))
        if len(sums) > len(self.changes):
            missed, wanted = torch.stack(sums).double().sum(0).sqrt().tolist()
            self.rounding_error = missed / wanted if wanted else 0.0

    def disable(self) -> None:
        with ExitStack() as rest:  # goes through all of them even if one fails
            for entry in self._mine():
                rest.callback(entry.write, tuple(change for change in entry.changes if change[0] != self.number))
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
        return [entry for entry in entries if entry is not None and self._is_in(entry)]

    def _is_in(self, entry: Baked | Side) -> bool:
        return any(number == self.number for number, _ in entry.changes)

    def _refuse_mixed(self, target: Target, delta: Delta) -> None:
        """A hook that scales the input of a weight would also scale what was baked into it."""
        entry = self.book["side" if self.mount == "bake" else "bake"].get(target.name)
        others = [d for _, d in entry.changes] if entry else []
        scale, addition = (others, [delta]) if self.mount == "bake" else ([delta], others)
        if any(isinstance(d, Scale) for d in scale) and any(isinstance(d, Addition) for d in addition):
            raise CannotMount(
                f"cannot mount {self.mount!r} on {target.name}: a scale on the side would also scale what is baked in. "
                f"Mount both the same way: mount={'side' if self.mount == 'bake' else 'bake'!r} here."
            )


def _number(change: tuple[int, Delta]) -> int:
    return change[0]
