"""Changes of weights that a memory keeps: one for each fact, or one that all facts share.

A change acts on single rows of a batch, so each question has the weights that its fact wants and no other question
sees them. No weight is written: hooks add B (A x) to the outputs of projections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import BadPatch, CannotMerge
from ...inference.forward import current_pass
from ...models.hooks import Hook
from ...models.lm import LM
from ..weight.delta import FLOATS, LowRank
from ..weight.side import refuse
from ..weight.target import Target, find_targets

PREFIX = "change/"  # of its tensors in a file
Where = Literal["fired", "all"]
"""On which rows a change acts: those whose question fired a fact, or all."""


@dataclass(frozen=True, eq=False)
class Stored:
    """Low-rank changes by parameter name, all on one weight stacked."""

    factors: dict[str, tuple[Tensor, Tensor]]
    """Parameter name -> B [m, out, r] and A [m, r, in], ΔW = B A; m facts, or 1 where all facts share the change."""
    shared: bool = False
    rows: Where = "fired"

    @classmethod
    def of(cls, changes: Sequence[Mapping[str, LowRank]], **how: Any) -> Stored:
        """From the changes of each fact, which are of the same weights and ranks."""
        pairs = {name: [(own[name].b, own[name].a) for own in changes] for name in changes[0]}
        stacked = {name: tuple(torch.stack(side) for side in zip(*own, strict=True)) for name, own in pairs.items()}
        return cls({name: (b.cpu().contiguous(), a.cpu().contiguous()) for name, (b, a) in stacked.items()}, **how)

    def __len__(self) -> int:
        """m, how many there are."""
        return min(len(b) for b, _ in self.factors.values())

    def delta(self, place: int) -> dict[str, LowRank]:
        """The change of one fact by parameter name."""
        return {name: LowRank(b[place], a[place]) for name, (b, a) in self.factors.items()}

    def select(self, places: Sequence[int]) -> Stored:
        """Those of these facts, in this order. One that is shared stays."""
        if self.shared:
            return self
        return replace(self, factors={name: (b[places], a[places]) for name, (b, a) in self.factors.items()})

    def joined(self, others: Sequence[Stored]) -> Stored:
        """Those of all, one after the other. ``CannotMerge``: they change other weights, or are shared and differ."""
        for other in others:
            if self._form() != other._form() or (self.shared and not self._equals(other)):
                raise CannotMerge(
                    f"the memories store changes of other weights, or of other ranks: {', '.join(self.factors)} and "
                    f"{', '.join(other.factors)}. Fit them with equal settings."
                )
        if self.shared:
            return self
        every = (self, *others)
        return replace(self, factors={
            name: (torch.cat([s.factors[name][0] for s in every]), torch.cat([s.factors[name][1] for s in every]))
            for name in self.factors
        })  # fmt: skip

    def _form(self) -> Any:
        sizes = {name: (b.shape[1:], a.shape[1:]) for name, (b, a) in self.factors.items()}
        return self.shared, self.rows, sizes

    def _equals(self, other: Stored) -> bool:
        tensors = other.tensors()
        return all(torch.equal(t, tensors[name]) for name, t in self.tensors().items())

    def parts(self) -> dict[str, Any]:
        """What is not a tensor, as JSON."""
        return {"weights": list(self.factors), "shared": self.shared, "rows": self.rows}

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        sides = {name: {"b": b, "a": a} for name, (b, a) in self.factors.items()}
        return {f"{PREFIX}{name}/{side}": t for name, own in sides.items() for side, t in own.items()}

    @classmethod
    def read(cls, parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Stored:
        """The inverse of ``parts`` and ``tensors``. ``BadPatch``: they do not belong together."""
        names, shared, rows = parts["weights"], parts["shared"], parts["rows"]
        if not names or not all(isinstance(name, str) for name in names) or type(shared) is not bool:
            raise BadPatch("its stored changes are not as lmpatch writes them.")
        own = cls({n: (tensors[f"{PREFIX}{n}/b"], tensors[f"{PREFIX}{n}/a"]) for n in names}, shared, rows)
        for b, a in own.factors.values():
            fits = b.ndim == a.ndim == 3 and b.shape[::2] == (len(b), a.shape[1]) and len(b) == len(a) == len(own)
            if not fits or {b.dtype, a.dtype} - {*FLOATS} or (shared and len(b) != 1) or rows not in get_args(Where):
                raise BadPatch(f"a stored change has factors of shape {tuple(b.shape)} and {tuple(a.shape)}.")
        return own

    def describe(self) -> list[str]:
        """One line for each weight; of a change that all facts share, one line."""
        ranks = {name: b.shape[2] for name, (b, _) in self.factors.items()}
        if self.shared:
            where = "behind a fact" if self.rows == "fired" else "on every question"
            return [f"  a change of {len(ranks)} weights of rank {max(ranks.values())} that acts {where}"]
        return [f"  {name}: a change of rank {rank} for each fact" for name, rank in ranks.items()]

    def targets(self, lm: LM) -> dict[str, Target]:
        """The weights it changes.

        Raises:
            LookupError: a name is unknown, or a shape differs.
            CannotMount: hooks cannot change one of them.
        """
        found = find_targets(lm.model, {name: (b.shape[1], a.shape[2]) for name, (b, a) in self.factors.items()})
        for name, target in found.items():
            b, a = self.factors[name]
            refuse(target, LowRank(b.new_zeros(b.shape[1], 1), a.new_zeros(1, a.shape[2])))  # there may be no fact yet
        return found

    def hooks(self, lm: LM, number: int) -> list[Hook]:
        """What adds the changes to the outputs of projections.

        Args:
            number: the key of these changes in ``Pass.changes``, whose values are places here.
        """
        return [Hook(t.module, _Adder(self, name, number)) for name, t in self.targets(lm).items()]


class _Adder:
    """y + B (A x) with the change of each row; rows without one stay as they are, to the bit."""

    def __init__(self, stored: Stored, name: str, number: int) -> None:
        self.b, self.a = stored.factors[name]
        self.shared, self.every, self.number = stored.shared, stored.shared and stored.rows == "all", number
        self._ready: tuple[Any, Tensor, Tensor] | None = None  # of the last batch

    def __call__(self, _: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x, now = args[0], current_pass()
        places = None if now is None or now.changes is None else now.changes.get(self.number)
        if now is None or (places is None and not self.every):
            return None
        n = len(now.mask)
        b, a = self._factors(places, x)
        rows = x.reshape(n, -1, x.shape[-1])  # [n, t, in]; some models flatten rows and tokens
        added = F.linear(F.linear(rows, a[0]), b[0]) if self.shared else rows @ a.mT @ b.mT  # [n, t, out]
        changed = output + added.to(output.dtype).reshape(output.shape)
        if self.every or places is None:
            return changed
        acts = (places >= 0)[:, None].expand(-1, rows.shape[1]).reshape(*output.shape[:-1], 1)
        return torch.where(acts, changed, output)

    def _factors(self, places: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """B and A of each row, or the one pair that all share, where ``x`` is and in its dtype."""
        key = (None if self.shared else places, x.device, x.dtype)
        ready = self._ready
        if ready is None or ready[0][0] is not key[0] or ready[0][1:] != key[1:]:
            pick = slice(None) if places is None or self.shared else places.clamp(min=0).to(self.b.device)
            with torch.inference_mode(False), torch.no_grad():  # made in inference mode it could serve no backward
                b, a = (t[pick].to(x.device, x.dtype) for t in (self.b, self.a))
            self._ready = ready = key, b, a
        return ready[1], ready[2]
