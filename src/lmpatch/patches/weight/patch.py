"""``WeightPatch``: changes of weights by parameter name, and ``Target``: the weight of a model one of them lands on."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ...errors import BadInput, BadPatch, Diverged
from ...models.lm import LM
from ...models.sharding import sharded
from ...provenance import hash_tensor, made_now
from ..patch import Base, Mount, Patch, plain, plain_edits
from .delta import KINDS, Delta


@dataclass(eq=False)
class WeightPatch(Patch):
    """Changes of weights. Make one with ``WeightPatch.make``."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    """Parameter name, as in ``state_dict``, -> its change."""
    kind: ClassVar[str] = "weight"
    mounts: ClassVar[tuple[Mount, ...]] = ("bake", "side")

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
            config: the method's ``Config``, or a dict.
            edits: ``Edit`` records or dicts.
            seconds: how long the fit took.
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
        weights = {t.name: original(lm.model, t) for t in targets.values()}
        norms = {name: float(w.float().norm()) for name, w in weights.items() if has_values(w)}
        return cls(
            method=method,
            config=plain(config or {}),
            base=Base(fingerprint(lm), lm.name, {name: hash_of(weight) for name, weight in weights.items()}),
            edits=plain_edits(edits),
            made=made_now(seconds) | {"weight_norms": norms},
            notes=plain(notes or {}),
            extras={name: t.detach().to("cpu", copy=True).contiguous() for name, t in (extras or {}).items()},
            deltas={targets[name].name: delta.to("cpu", copy=True) for name, delta in deltas.items()},
        )

    def scaled(self, strength: float) -> WeightPatch:
        """The patch with every change times ``strength``; see ``Delta.scaled``."""
        notes = {**self.notes, "strength": self.notes.get("strength", 1.0) * strength}
        deltas = {name: delta.scaled(strength) for name, delta in self.deltas.items()}
        return replace(self, deltas=deltas, notes=notes)

    def parts(self) -> dict[str, Any]:
        return {name: {"kind": delta.kind, "shape": list(delta.shape)} for name, delta in self.deltas.items()}

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}/{key}": t for name, delta in self.deltas.items() for key, t in delta.tensors().items()}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], tensors: Mapping[str, Tensor], **common: Any) -> WeightPatch:
        deltas = {name: _delta(name, part, tensors) for name, part in parts.items()}
        patch = cls(**common, deltas=deltas)
        if set(patch.tensors()) != set(tensors):
            raise BadPatch(f"tensors without a place: {sorted(set(tensors) - set(patch.tensors()))}.")
        if set(patch.base.touched) != set(deltas):
            raise BadPatch("the weights it changes are not the weights it has hashes of.")
        return patch

    def describe(self) -> list[str]:
        lines = []
        for name, delta in self.deltas.items():
            norm = self.made.get("weight_norms", {}).get(name)
            share = f", {delta.norm() / norm:.2g} of its norm" if norm and delta.kind != "scale" else ""
            lines.append(f"  {name}: {delta.label} on {delta.shape[0]} x {delta.shape[1]}{share}")
        return lines


def _delta(name: str, part: Any, tensors: Mapping[str, Tensor]) -> Delta:
    try:
        form, (out, width) = KINDS[part["kind"]], part["shape"]
        if not all(type(n) is int and n > 0 for n in (out, width)):
            raise BadPatch(f"shape {part['shape']}")
        own = {key.rpartition("/")[2]: t for key, t in tensors.items() if key.rpartition("/")[0] == name}
        delta = form.from_tensors(own, (out, width))
    except (KeyError, TypeError, ValueError) as error:  # BadInput is a ValueError
        raise BadPatch(f"the change of {name} cannot be read ({error}).") from None
    if not delta.is_finite():
        raise BadPatch(f"the change of {name} holds infinite or undefined numbers.")
    return delta


@dataclass(frozen=True)
class Target:
    """A weight of a model."""

    names: tuple[str, ...]
    """Every name it goes by: a head tied to the embedding has two."""
    module: nn.Module
    """The module it belongs to under the name that was asked for."""
    attribute: str
    """Its name in that module."""
    shape: tuple[int, ...]
    """(out, in), whatever the storage. A vector, such as a bias or a norm's weight, is one column: (n, 1)."""
    transposed: bool
    """Stored as (in, out)."""
    offset: float = 0.0
    """What the module adds to the stored numbers before it uses them: 1 in a norm that multiplies by 1 + w."""

    @property
    def name(self) -> str:
        """The first of ``names``."""
        return self.names[0]

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that is there now."""
        parameter: nn.Parameter = getattr(self.module, self.attribute)
        return parameter

    @property
    def vector(self) -> bool:
        """Stored with one dimension."""
        return self.parameter.ndim == 1 and self.shape[1:] == (1,)

    def oriented(self, stored: Tensor) -> Tensor:
        """A view of the stored tensor as [out, in]."""
        if self.vector:
            return stored[:, None]
        return stored.T if self.transposed else stored

    def stored(self, oriented: Tensor) -> Tensor:
        """The inverse of ``oriented``, a view too."""
        if self.vector:
            return oriented[:, 0]
        return oriented.T if self.transposed else oriented


def find_targets(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Target]:
    """The weight each name stands for.

    Args:
        shapes: parameter name -> (out, in) of the change.
    Raises:
        LookupError: a name is unknown, two are one weight, or a shape differs. Callers say what that means to them.
    """
    groups = _tied(model.named_parameters(remove_duplicate=False))
    found: dict[str, Target] = {}
    for name, shape in shapes.items():
        if name not in groups:
            raise LookupError(f"the model has no parameter {name}.")
        target = _target(model, name, groups[name])
        if target.shape != tuple(shape):
            raise LookupError(f"{name} is {_by(target.shape)} (out x in), the change is {_by(shape)}.")
        if target.name in {t.name for t in found.values()}:
            raise LookupError(f"{' and '.join(target.names)} are one weight here, the change names it twice.")
        found[name] = target
    return found


def _target(model: nn.Module, name: str, names: tuple[str, ...]) -> Target:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    transposed = isinstance(module, Conv1D)
    shape = tuple(model.get_parameter(name).shape)
    if isinstance(module, nn.Linear) and attribute == "weight":
        shape = (module.out_features, module.in_features)  # a quantised weight is stored in another shape
    if len(shape) == 1:
        return Target(names, module, attribute, (*shape, 1), False, _offset(module, attribute))
    return Target(names, module, attribute, shape[::-1] if transposed else shape, transposed)


@torch.no_grad()
def _offset(module: nn.Module, attribute: str) -> float:
    """o where a norm multiplies by o + w, told from what it returns for weights of 0 and of 1."""
    weight = getattr(module, attribute)
    if attribute != "weight" or not has_values(weight):
        return 0.0
    bare = copy.copy(module)
    bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()  # a patch on the side may be a factor 0
    x = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype)[None]

    def returned(value: float) -> Tensor:
        swapped = {n: torch.full_like(p, value if n == attribute else 0.0) for n, p in module.named_parameters()}
        out: Tensor = functional_call(bare, swapped, x)
        return out.float()

    zero = returned(0.0)
    unit = returned(1.0) - zero
    return float(round(float((zero * unit).sum() / unit.square().sum())))


def _tied(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, tuple[str, ...]]:
    """Each name -> all names of the same storage, in the order of the model."""
    groups: dict[Any, list[str]] = {}
    for name, p in parameters:
        groups.setdefault((p.device, p.data_ptr()) if has_values(p) else id(p), []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}


def is_plain(parameter: Tensor) -> bool:
    """An ordinary tensor, not one of a quantiser's or a parallel library's own classes."""
    return type(parameter) in (nn.Parameter, Tensor) and type(parameter.data) is Tensor


def has_values(weight: Tensor) -> bool:
    """Its numbers can be read here and now."""
    return is_plain(weight) and not weight.is_meta


def original(model: nn.Module, target: Target) -> Tensor:
    """The weight as stored, without what patches baked into it."""
    kept: Mapping[str, Tensor] = getattr(model, "_lmpatch_originals", {})  # see ledger
    return kept.get(target.name, target.parameter.detach())


def hash_of(weight: Tensor) -> str:
    """``record.hash_tensor``; empty for an offloaded or quantised weight, whose values are not to be had."""
    return hash_tensor(weight) if has_values(weight) else ""


def fingerprint(lm: LM) -> str:
    """``LM.fingerprint``; empty if some weights are offloaded or quantised."""
    here = sharded(lm) or all(map(has_values, lm.model.parameters()))  # a sharded model was hashed before
    return lm.fingerprint() if here else ""


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
