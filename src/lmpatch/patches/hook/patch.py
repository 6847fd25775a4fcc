"""``SteerPatch``: a constant added to what modules read, by hooks. No weight could hold it: most have no bias there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import BadInput, BadPatch, CannotMerge, Diverged, WrongModel
from ...models.lm import LM
from ...provenance import made_now
from ..base import Base, fingerprint
from ..handle import Handle, Hook
from ..merge import merged_fields
from ..patch import Law, Mount, Patch, plain, plain_edits


@dataclass(eq=False)
class SteerPatch(Patch):
    """Vectors added to the inputs of projections. Make one with ``SteerPatch.make``.

    A vector v in front of y = W x + b is what the bias b + W v would be. With ``newest`` it is added at the last token
    of each call alone: the newest while text is generated or read to its end. Where a text is scored as a whole
    (``score``), every token but the last is then left as it was; measure such a patch by what it generates.
    """

    kind: ClassVar[str] = "steer"
    mounts: ClassVar[tuple[Mount, ...]] = ("side",)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """Projection, as a dotted module name -> [d_in] fp32."""
    newest: bool = False
    """At the newest token alone."""

    @classmethod
    def make(
        cls,
        lm: LM,
        vectors: Mapping[str, Tensor],
        *,
        newest: bool = False,
        method: str,
        config: Any = None,
        edits: Sequence[Any] = (),
        seconds: float = 0.0,
        notes: Mapping[str, Any] | None = None,
    ) -> SteerPatch:
        """A patch for ``lm``, whose vectors are copied to the CPU.

        Raises:
            BadInput: no such projection, or a vector of another width.
            Diverged: a vector holds infinite or undefined numbers.
        """
        try:
            for name, vector in vectors.items():
                _check(lm, name, vector)
        except LookupError as error:
            raise BadInput(f"cannot make a {method} patch: {error}") from None
        if not all(bool(vector.isfinite().all()) for vector in vectors.values()):
            raise Diverged(f"{method}: a vector holds infinite or undefined numbers. Lower the strength.")
        return cls(
            method=method,
            config=plain(config or {}),
            base=Base(fingerprint(lm), lm.name),
            edits=plain_edits(edits),
            made=made_now(seconds),
            notes=plain(notes or {}),
            vectors={name: v.detach().to("cpu", torch.float32, copy=True).contiguous() for name, v in vectors.items()},
            newest=newest,
        )

    def parts(self) -> dict[str, Any]:
        return {"newest": self.newest, "widths": {name: len(vector) for name, vector in self.vectors.items()}}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.vectors)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], tensors: Mapping[str, Tensor], **common: Any) -> SteerPatch:
        widths = {name: len(t) for name, t in tensors.items() if t.ndim == 1 and t.dtype == torch.float32}
        if set(parts) != {"newest", "widths"} or type(parts["newest"]) is not bool:
            raise BadPatch(f"its parts are {sorted(parts)}, not newest and widths.")
        if parts["widths"] != widths or len(widths) < len(tensors):
            raise BadPatch("its vectors are not those it lists.")
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            raise BadPatch("a vector holds infinite or undefined numbers.")
        return cls(**common, vectors=dict(tensors), newest=parts["newest"])

    def describe(self) -> list[str]:
        where = "at the newest token" if self.newest else "at every token"
        return [f"  {name}: a vector of length {v.norm():.3g} on its input {where}" for name, v in self.vectors.items()]

    def fits(self, lm: LM) -> None:
        try:
            for name, vector in self.vectors.items():
                _check(lm, name, vector)
        except LookupError as error:
            raise WrongModel(f"a {self.method} patch does not fit {lm.name}: {error}") from None

    def attach(self, lm: LM, mount: Mount, others: Sequence[Handle]) -> Handle:
        # before other hooks: a scale on the side must also scale what is added here, as it would a larger input
        return Handle(
            hooks=[
                Hook(lm.module(name), _adding(vector, self.newest), before=True, first=True)
                for name, vector in self.vectors.items()
            ]
        )

    def merged(self, others: Sequence[SteerPatch]) -> SteerPatch:
        patches = (self, *others)
        if len({p.newest for p in patches}) > 1:
            raise CannotMerge("one patch acts at every token and another at the newest alone. Apply both instead.")
        total: dict[str, Tensor] = {}
        for patch in patches:
            for name, vector in patch.vectors.items():
                total[name] = total[name] + vector if name in total else vector
        return SteerPatch(**merged_fields(patches), vectors=total, newest=self.newest)

    def law(self) -> Law:
        return Law.STACK


def _adding(vector: Tensor, newest: bool) -> Any:
    def add(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]  # [n, T, d_in]
        moved = vector.to(x.device, x.dtype)
        if not newest:
            return x + moved, *args[1:]
        return torch.cat([x[:, :-1], x[:, -1:] + moved], 1), *args[1:]

    return add


def _check(lm: LM, name: str, vector: Tensor) -> None:
    """Raise ``LookupError`` unless the vector fits the input of that projection."""
    try:
        module = lm.module(name)
    except AttributeError:
        raise LookupError(f"the model has no module {name}.") from None
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise LookupError(f"{name} is a {type(module).__name__}, not a linear layer.")
    width = module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0]
    if tuple(vector.shape) != (width,):
        raise LookupError(f"{name} reads vectors of {width}, the patch has one of shape {tuple(vector.shape)}.")
