"""``HookPatch``: constants added to what modules read or return. No weight could hold them: most have no bias there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import BadInput, BadPatch, Diverged, WrongModel
from ...inference.forward import current_pass
from ...inference.interventions import Intervention
from ...models.hooks import Hook
from ...models.lm import LM
from ..handle import Handle
from ..merge import merged_fields
from ..patch import Mount, Patch, fields_for


@dataclass(frozen=True, order=True)
class Site:
    """Where in a forward a hook patch acts."""

    module: str
    """A linear layer, as a dotted module name."""
    at: Literal["input", "output"] = "input"
    tokens: Literal["all", "answer"] = "all"
    """At every token; or from the last prompt token on, where the answer is decided, in what is generated and what is
    scored alike. In a call of the model that is not lmpatch's, ``answer`` is the last token of each row."""

    @property
    def name(self) -> str:
        """Its tensor's name in a file."""
        return f"{self.module}:{self.at}:{self.tokens}"


@dataclass(eq=False)
class HookPatch(Patch):
    """Vectors added to what linear layers read or return. Make one with ``HookPatch.make``.

    A vector v in front of y = W x + b is what the bias b + W v would be.
    """

    kind: ClassVar[str] = "steer"
    mounts: ClassVar[tuple[Mount, ...]] = ("side",)
    vectors: dict[Site, Tensor] = field(default_factory=dict)
    """Site -> [width] fp32."""

    @classmethod
    def make(
        cls,
        lm: LM,
        vectors: Mapping[str | Site, Tensor],
        *,
        newest: bool = False,
        method: str,
        config: Any = None,
        edits: Sequence[Any] = (),
        seconds: float = 0.0,
        notes: Mapping[str, Any] | None = None,
    ) -> HookPatch:
        """A patch for ``lm``, whose vectors are copied to the CPU.

        Args:
            vectors: by site; a module's name alone is its input, at every token.
            newest: modules given by their names are steered from the last prompt token on.
            method, config, edits, seconds, notes: see ``fields_for``.
        Raises:
            BadInput: no such layer, or a vector of another width.
            Diverged: a vector holds infinite or undefined numbers.
        """
        tokens: Literal["all", "answer"] = "answer" if newest else "all"
        sites = {s if isinstance(s, Site) else Site(s, "input", tokens): v for s, v in vectors.items()}
        try:
            _check(lm, sites)
        except LookupError as error:
            raise BadInput(f"cannot make a {method} patch: {error}") from None
        if not all(bool(vector.isfinite().all()) for vector in sites.values()):
            raise Diverged(f"{method}: a vector holds infinite or undefined numbers. Lower the strength.")
        copies = {s: v.detach().to("cpu", torch.float32, copy=True).contiguous() for s, v in sites.items()}
        return cls(**fields_for(lm, method, config, edits, seconds, notes), vectors=copies)

    def parts(self) -> dict[str, Any]:
        if self._plain():
            widths = {site.module: len(vector) for site, vector in self.vectors.items()}
            return {"newest": any(site.tokens == "answer" for site in self.vectors), "widths": widths}
        return {"add": sorted([s.module, s.at, s.tokens, len(vector)] for s, vector in self.vectors.items())}

    def tensors(self) -> dict[str, Tensor]:
        plain = self._plain()
        return {site.module if plain else site.name: vector for site, vector in self.vectors.items()}

    def _plain(self) -> bool:
        """All are inputs, at the same tokens: written as the first release did, so that hashes stay."""
        return {(s.at, s.tokens) for s in self.vectors} in (set(), {("input", "all")}, {("input", "answer")})

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], tensors: Mapping[str, Tensor], **common: Any) -> HookPatch:
        for t in tensors.values():
            if t.ndim != 1 or t.dtype != torch.float32:
                raise BadPatch("it holds tensors that are no vectors in fp32.")
            if not t.isfinite().all():
                raise BadPatch("a vector holds infinite or undefined numbers.")
        if set(parts) == {"newest", "widths"} and type(parts["newest"]) is bool:
            tokens: Literal["all", "answer"] = "answer" if parts["newest"] else "all"
            by_name = {module: Site(module, "input", tokens) for module in tensors}
        elif set(parts) == {"add"}:
            by_name = {site.name: site for site in (Site(*entry[:3]) for entry in parts["add"])}
        else:
            raise BadPatch(f"its parts are {sorted(parts)}, not add, nor newest and widths.")
        if any(s.at not in ("input", "output") or s.tokens not in ("all", "answer") for s in by_name.values()):
            raise BadPatch(f"a site is none: {sorted(by_name)}.")
        same = set(by_name) == set(tensors)
        patch = cls(**common, vectors={by_name[name]: vector for name, vector in tensors.items()} if same else {})
        if not same or patch.parts() != dict(parts):
            raise BadPatch("its vectors are not those it lists.")
        return patch

    def describe(self) -> list[str]:
        where = {"all": "at every token", "answer": "from the last prompt token on"}
        return [
            f"  {s.module}: a vector of length {v.norm():.3g} on its {s.at} {where[s.tokens]}"
            for s, v in self.vectors.items()
        ]

    def fits(self, lm: LM) -> None:
        try:
            _check(lm, self.vectors)
        except LookupError as error:
            raise WrongModel(f"a {self.method} patch does not fit {lm.name}: {error}") from None

    def attach(self, lm: LM, mount: Mount, others: Sequence[Handle]) -> Handle:
        hooks = [_hook(lm.module(site.module), site, vector) for site, vector in self.vectors.items()]
        return Handle([Intervention(hooks)])

    def merged(self, others: Sequence[HookPatch]) -> HookPatch:
        total = dict(self.vectors)
        for other in others:
            for site, vector in other.vectors.items():
                total[site] = total[site] + vector if site in total else vector
        return HookPatch(**merged_fields((self, *others)), vectors=total)


SteerPatch = HookPatch
"""The name of the first release."""


def _hook(module: nn.Module, site: Site, vector: Tensor) -> Hook:
    def add(x: Tensor) -> Tensor:  # [n, t, width], or [n t, width] where a model flattens the batch
        moved = vector.to(x.device, x.dtype)
        if site.tokens == "all":
            return x + moved
        now = current_pass()
        if now is None:
            return torch.cat([x[..., :-1, :], x[..., -1:, :] + moved], -2)
        return torch.where(now.answering().reshape(*x.shape[:-1], 1), x + moved, x)

    if site.at == "output":
        return Hook(module, lambda _, args, output: add(output))
    # before other hooks: a scale on the side must also scale what is added here, as it would a larger input
    return Hook(module, lambda _, args: (add(args[0]), *args[1:]), before=True, first=True)


def _check(lm: LM, vectors: Mapping[Site, Tensor]) -> None:
    """Raise ``LookupError`` unless every vector fits its site of the model."""
    for site, vector in vectors.items():
        try:
            module = lm.module(site.module)
        except AttributeError:
            raise LookupError(f"the model has no module {site.module}.") from None
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise LookupError(f"{site.module} is a {type(module).__name__}, not a linear layer.")
        if site.tokens == "answer" and site.module in lm.layout.tail:
            raise LookupError(f"{site.module} runs behind the blocks, where no token is told from another.")
        widths = module.weight.shape if isinstance(module, Conv1D) else (module.in_features, module.out_features)
        width, verb = (widths[0], "reads") if site.at == "input" else (widths[1], "returns")
        if tuple(vector.shape) != (width,):
            found = tuple(vector.shape)
            raise LookupError(f"{site.module} {verb} vectors of {width}, the patch has one of shape {found}.")
