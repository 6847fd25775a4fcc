"""``WeightPatch``: changes of weights by parameter name, and what one does to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import BadInput, BadPatch, CannotMount, Diverged, ForeignWrite, WrongModel
from ...models.lm import LM
from ..base import has_values, hash_of, original
from ..handle import Handle
from ..lora import Lora
from ..merge import merged_fields
from ..patch import Mount, Patch, fields_for
from . import bake, side
from .bake import Baked
from .combine import as_lora, combine
from .delta import KINDS, Addition, Delta, LowRank, Scale, When
from .side import Side
from .target import Target, find_targets

NUMBERS = count()
IN_CONTEXT = " in context"
"""Behind the kind of a change in a file: it acts only there. Releases that know no such change refuse the file."""


@dataclass(eq=False)
class WeightPatch(Patch):
    """Changes of weights. Make one with ``WeightPatch.make``."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    """Parameter name, as in ``state_dict``, -> its change."""
    kind: ClassVar[str] = "weight"
    mounts: ClassVar[tuple[Mount, ...]] = ("bake", "side")

    def __post_init__(self) -> None:
        if self.only_in_context:  # a weight acts on every prompt
            self.mounts = ("side",)  # type: ignore[misc]  # of this patch, not of its kind

    @property
    def only_in_context(self) -> bool:
        return any(delta.when == "context" for delta in self.deltas.values())

    @classmethod
    def make(
        cls,
        lm: LM,
        deltas: Mapping[str, Delta],
        *,
        method: str,
        config: Any = None,
        edits: Sequence[Any] = (),
        seconds: float | None = None,
        notes: Mapping[str, Any] | None = None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> WeightPatch:
        """A patch for ``lm``, whose tensors are copied to the CPU.

        Args:
            lm: the model, patched or not; what is recorded is the model without patches.
            deltas: parameter name -> change. Of tied names any will do; the first is kept.
            config, edits, seconds, notes: see ``fields_for``.
        Raises:
            BadInput: no such parameter, two names of one weight, or a change of another shape.
            Diverged: a change holds infinite or undefined numbers.
        """
        try:
            targets = find_targets(lm.model, {name: delta.shape for name, delta in deltas.items()})
        except LookupError as error:
            raise BadInput(f"cannot make a {method} patch: {error}") from None
        for name, delta in deltas.items():
            if not delta.is_finite():
                raise Diverged(f"{method}: the change of {name} left the finite numbers. Lower the learning rate.")
        patch = cls(
            **fields_for(lm, method, config, edits, seconds, notes),
            extras={name: t.detach().to("cpu", copy=True).contiguous() for name, t in (extras or {}).items()},
            deltas={targets[name].name: delta.to("cpu", copy=True) for name, delta in deltas.items()},
        )
        weights = {name: original(lm.model, name) for name in patch.deltas}
        patch.base.touched.update({name: hash_of(weight) for name, weight in weights.items()})
        patch.made["weight_norms"] = {n: float(w.float().norm()) for n, w in weights.items() if has_values(w)}
        return patch

    def scaled(self, strength: float) -> WeightPatch:
        """The patch with every change times ``strength``; see ``Delta.scaled``."""
        notes = {**self.notes, "strength": self.notes.get("strength", 1.0) * strength}
        deltas = {name: delta.scaled(strength) for name, delta in self.deltas.items()}
        return replace(self, deltas=deltas, notes=notes)

    def parts(self) -> dict[str, Any]:
        return {
            name: {"kind": delta.kind + IN_CONTEXT * (delta.when == "context"), "shape": list(delta.shape)}
            for name, delta in self.deltas.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}/{key}": t for name, delta in self.deltas.items() for key, t in delta.tensors().items()}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], tensors: Mapping[str, Tensor], **common: Any) -> WeightPatch:
        deltas = {name: _delta(name, part, tensors) for name, part in parts.items()}
        patch = cls(**common, deltas=deltas)
        if extra := set(tensors) - set(patch.tensors()):
            raise BadPatch(f"tensors without a place: {sorted(extra)}.")
        if set(patch.base.touched) != set(deltas):
            raise BadPatch("the weights it changes are not the weights it has hashes of.")
        return patch

    def describe(self) -> list[str]:
        shares = {name: f", {norm:.2g} of its norm" for name, norm in self.change_norms().items()}
        return [
            f"  {name}: {delta.label} on {delta.shape[0]} x {delta.shape[1]}{shares.get(name, '')}"
            f"{', only in a context' if delta.when == 'context' else ''}"
            for name, delta in self.deltas.items()
        ]

    def change_norms(self) -> dict[str, float]:
        norms = self.made.get("weight_norms", {})
        additions = {name: delta for name, delta in self.deltas.items() if norms.get(name) and delta.kind != "scale"}
        return {name: delta.norm() / norms[name] for name, delta in additions.items()}

    def _changes(self, lm: LM) -> dict[Target, Delta]:
        try:
            targets = find_targets(lm.model, {name: delta.shape for name, delta in self.deltas.items()})
        except LookupError as error:
            raise WrongModel(f"{self.base.misfit(lm)}: {error} Load {self.base.name}.") from None
        for name, delta in self.deltas.items():
            if delta.when == "context" and name.rpartition(".")[0] in lm.layout.tail:
                raise WrongModel(
                    f"{name} runs behind the blocks, where no row is told from another, so its change cannot act in a "
                    "context only. Let it act always."
                )
        return {target: self.deltas[name] for name, target in targets.items()}

    def fits(self, lm: LM) -> None:
        self._changes(lm)

    def attach(self, lm: LM, mount: Mount, others: Sequence[Handle]) -> Handle:
        return WeightHandle(lm.model, self._changes(lm), mount, others)

    def merged(self, others: Sequence[WeightPatch]) -> WeightPatch:
        patches = (self, *others)
        names = sorted({name for p in patches for name in p.deltas})
        deltas = {name: combine(name, [p.deltas[name] for p in patches if name in p.deltas]) for name in names}
        return WeightPatch(**merged_fields(patches), deltas=deltas)

    def lora(self, lm: LM, rank: int | None) -> Lora:
        return as_lora(self._changes(lm), rank)

    @classmethod
    def trial(cls, lm: LM, layer: int, strength: float) -> WeightPatch:
        """A random rank-one change of one down-projection, ``strength`` of the weight's norm."""
        name = lm.layout.weight(lm.layout.downs[layer])
        weight, generator = lm.parameter(name), torch.Generator().manual_seed(layer)
        b = torch.randn(lm.layout.d_model, 1, generator=generator)
        a = torch.randn(1, weight.numel() // lm.layout.d_model, generator=generator)
        b = b * (strength * float(weight.float().norm()) / float(b.norm() * a.norm()))
        return cls.make(lm, {name: LowRank(b, a)}, method="trial", seconds=0.0)


class WeightHandle(Handle):
    """Changes of some weights, baked or on the side."""

    def __init__(
        self, model: nn.Module, changes: Mapping[Target, Delta], mount: Mount, others: Sequence[Handle]
    ) -> None:
        super().__init__()
        self.model = model
        self.changes, self.mount, self.number = dict(changes), mount, next(NUMBERS)
        books = [handle.book for handle in others if isinstance(handle, WeightHandle)]
        self.book: dict[str, dict[str, Baked | Side]] = books[0] if books else {"bake": {}, "side": {}}
        """Mount -> first name of a weight -> all that is on it, of all patches."""
        self._entries = self.book[mount]
        for target, delta in self.changes.items():
            bake.refuse(target) if mount == "bake" else side.refuse(target, delta)
            self._refuse_mixed(target, delta, "side" if mount == "bake" else "bake")
        for target in self.changes:
            if target.name in self._entries:
                self._check(self._entries[target.name])

    def enable(self) -> None:
        sums = [torch.zeros(2)]
        for target, delta in self.changes.items():
            entry = self._entries.get(target.name)
            entry = entry or (Baked(target, self.model) if self.mount == "bake" else Side(target))
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
            self._check(entry)

    def _check(self, entry: Baked | Side) -> None:
        if isinstance(entry, Baked):
            entry.check()
        elif not any(module is entry.target.module for module in self.model.modules()):
            raise ForeignWrite(
                f"the layer of {entry.target.name} was replaced while a patch is on its side, so the patch does not "
                "act. Call remove(force=True), then apply it again."
            )

    def originals(self) -> Mapping[str, Tensor]:
        baked = (entry for entry in self.book["bake"].values() if isinstance(entry, Baked))
        return {name: entry.original for entry in baked for name in entry.target.names}

    def _mine(self) -> list[Baked | Side]:
        entries = (self._entries.get(target.name) for target in self.changes)
        return [entry for entry in entries if entry is not None and self.number in entry.changes]

    def _refuse_mixed(self, target: Target, delta: Delta, other: Mount) -> None:
        """A hook that scales the input of a weight would also scale what was baked into it."""
        entry = self.book[other].get(target.name)
        others = [*entry.changes.values()] if entry else []
        scale, addition = (others, [delta]) if other == "side" else ([delta], others)
        if any(isinstance(d, Scale) for d in scale) and any(isinstance(d, Addition) for d in addition):
            raise CannotMount(
                f"cannot mount {self.mount!r} on {target.name}: a scale on the side would also scale what is baked in. "
                f"Mount both the same way: mount={other!r} here."
            )


def _delta(name: str, part: Any, tensors: Mapping[str, Tensor]) -> Delta:
    try:
        kind, (out, width) = part["kind"], part["shape"]
        form = KINDS[kind.removesuffix(IN_CONTEXT)]
        when: When = "context" if kind.endswith(IN_CONTEXT) else "always"
        if not all(type(n) is int and n > 0 for n in (out, width)):
            raise BadPatch(f"shape {part['shape']}")
        own = {key.rpartition("/")[2]: t for key, t in tensors.items() if key.rpartition("/")[0] == name}
        delta = replace(form.from_tensors(own, (out, width)), when=when)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # BadInput is a ValueError
        raise BadPatch(f"the change of {name} cannot be read ({error}).") from None
    if not delta.is_finite():
        raise BadPatch(f"the change of {name} holds infinite or undefined numbers.")
    return delta
