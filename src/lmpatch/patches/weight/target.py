"""``Target``: the weight of a model that a change lands on."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..base import has_values


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

    def present(self, model: nn.Module) -> list[Tensor]:
        """What its names stand for in the model now, each weight once: ``parameter`` alone, unless someone replaced a
        layer or untied a head."""
        try:
            found = [model.get_parameter(name) for name in self.names]
        except AttributeError:  # a name is gone, where a layer was wrapped: look under all others
            named = model.named_parameters(remove_duplicate=False)
            found = [p for name, p in named if name in self.names or p is self.parameter]
        return [*{_storage(p): p for p in found}.values()]

    @property
    def vector(self) -> bool:
        """Stored with one dimension."""
        return self.parameter.ndim == 1 and self.shape[1:] == (1,)

    def oriented(self, stored: Tensor) -> Tensor:
        """A view of the stored tensor as [out, in]."""
        return stored[:, None] if self.vector else stored.T if self.transposed else stored


def find_targets(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Target]:
    """The weight each name stands for.

    Args:
        shapes: parameter name -> (out, in) of the change.
    Raises:
        LookupError: a name is unknown, two are one weight, or a shape differs. Callers say what that means to them.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[Any, list[str]] = {}
    for name, p in parameters.items():
        tied.setdefault(_storage(p), []).append(name)
    targets: dict[str, Target] = {}
    for name, shape in shapes.items():
        if name not in parameters:
            raise LookupError(f"the model has no parameter {name}.")
        target = _target(model, name, tuple(tied[_storage(parameters[name])]))
        if target.shape != tuple(shape):
            raise LookupError(f"{name} is {_by(target.shape)} (out x in), the change is {_by(shape)}.")
        if target.name in {t.name for t in targets.values()}:
            raise LookupError(f"{' and '.join(target.names)} are one weight here, the change names it twice.")
        targets[name] = target
    return targets


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
    """o where a norm multiplies by o + w, measured by what it returns for weights of 0 and of 1."""
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


def _storage(p: Tensor) -> Any:
    """Equal for two names of one weight."""
    return (p.device, p.data_ptr()) if has_values(p) else id(p)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
