"""``Neurons``: an MLP that is wider by some neurons. Its own weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import local
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ....errors import CannotMerge
from ....models.hooks import Hook
from ....models.lm import LM
from ...patch import Law
from ..operation import Operation, check_widths, need, ready, widths


@dataclass(eq=False, frozen=True)
class Neurons(Operation):
    """p neurons beside those of one MLP: the down-projection's output gains v · act(g h + b) at every token; with a
    second key, in a gated MLP, v · act(g h + b) · (w h + c). What a neuron adds depends on its token alone, so padding
    and caches move nothing."""

    name: ClassVar[str] = "neurons"
    law: ClassVar[Law] = Law.STACK
    module: str
    """The MLP's down-projection."""
    reads: str
    """The projection that reads the MLP's input h."""
    activation: str
    """As transformers calls it, ``silu`` for example."""
    keys: Tensor
    """[k, p, d] g, and in a gated MLP (k = 2) w."""
    biases: Tensor
    """[k, p] b, and c."""
    values: Tensor
    """[p, d_out]"""

    def parts(self) -> dict[str, Any]:
        return {"module": self.module, "reads": self.reads, "activation": self.activation}

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "biases": self.biases, "values": self.values}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Neurons:
        found = cls(**{**parts, **tensors})
        need(all(type(text) is str for text in found.parts().values()), "neurons need names of modules.")
        need(found.activation in ACT2FN, f"no activation is called {found.activation!r}.")
        shapes = [t.ndim for t in (found.keys, found.biases, found.values)]
        need(shapes == [3, 2, 2] and len(found.keys) in (1, 2), "its neurons have no such shapes.")
        need(found.keys.shape[:2] == found.biases.shape and len(found.values) == found.count, "neurons lack a part.")
        need(all(t.dtype == torch.float32 for t in tensors.values()), "its neurons are not fp32.")
        return found

    @property
    def count(self) -> int:
        """p, neurons."""
        return int(self.keys.shape[1])

    def describe(self) -> str:
        return f"{self.module}: {self.count} neurons more"

    def check(self, lm: LM) -> None:
        check_widths(lm, self.module, widths(lm, self.module)[0], self.values.shape[1])
        check_widths(lm, self.reads, self.keys.shape[2], widths(lm, self.reads)[1])

    def hooks(self, lm: LM) -> list[Hook]:
        tensors = ready(self.keys, self.biases, self.values)

        def added(h: Tensor) -> Tensor:
            return output_of(self.activation, h, *tensors(h.device, h.dtype))

        return beside(lm, self.reads, self.module, added)

    def joined(self, others: Sequence[Neurons]) -> Neurons:
        each = (self, *others)
        if any((one.parts(), len(one.keys)) != (self.parts(), len(self.keys)) for one in others):
            raise CannotMerge(f"neurons of {self.module} have different activations. Apply both patches instead.")
        values = torch.cat([one.values for one in each])
        keys, biases = (torch.cat(tensors, 1) for tensors in zip(*((o.keys, o.biases) for o in each), strict=True))
        return Neurons(self.module, self.reads, self.activation, keys, biases, values)


def beside(lm: LM, reads: str, module: str, added: Callable[[Tensor], Tensor]) -> list[Hook]:
    """Hooks that add to what ``module`` returns a function of what ``reads`` read in the same forward."""
    seen = local()  # each thread has its own forward

    def read(_: Any, args: tuple[Tensor, ...]) -> None:
        seen.h = args[0]

    def add(_: Any, __: Any, output: Tensor) -> Tensor:
        h, seen.h = seen.h, None
        return output + added(h).reshape(output.shape)

    return [Hook(lm.module(reads), read, before=True), Hook(lm.module(module), add)]


def output_of(activation: str, h: Tensor, keys: Tensor, biases: Tensor, values: Tensor) -> Tensor:
    """What neurons add [..., d_out] where the MLP reads ``h`` [..., d]."""
    z = F.linear(h, keys.flatten(0, 1), biases.flatten())  # [..., k p], one product for both keys
    first, *second = z.chunk(len(keys), -1)
    active = ACT2FN[activation](first)
    return F.linear(active * second[0] if second else active, values.T)


OPERATION = Neurons
