"""``HookPatch``: what hooks add to what modules read or return, and further operations. No weight could hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...errors import BadInput, BadPatch, Diverged, WrongModel
from ...inference.forward import current_pass
from ...inference.interventions import Intervention
from ...models.hooks import Hook
from ...models.lm import LM
from ..handle import Handle
from ..merge import merged_fields
from ..patch import Law, Mount, Patch, fields_for
from .operation import Operation, find_operation, need, widths


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
    """Vectors added to what linear layers read or return, and operations. Make one with ``HookPatch.make``.

    A vector v in front of y = W x + b is what the bias b + W v would be.
    """

    kind: ClassVar[str] = "steer"
    mounts: ClassVar[tuple[Mount, ...]] = ("side",)
    vectors: dict[Site, Tensor] = field(default_factory=dict)
    """Site -> [width] fp32."""
    operations: tuple[Operation, ...] = ()
    """What else hooks do; no two of one name at one module."""

    @classmethod
    def make(
        cls,
        lm: LM,
        vectors: Mapping[str | Site, Tensor],
        operations: Sequence[Operation] = (),
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
            operations: their tensors are on the CPU.
            newest: modules given by their names are steered from the last prompt token on.
            method, config, edits, seconds, notes: see ``fields_for``.
        Raises:
            BadInput: no such layer, or a vector of another width.
            Diverged: a vector holds infinite or undefined numbers.
        """
        tokens: Literal["all", "answer"] = "answer" if newest else "all"
        sites = {s if isinstance(s, Site) else Site(s, "input", tokens): v for s, v in vectors.items()}
        try:
            _check(lm, sites, operations)
        except LookupError as error:
            raise BadInput(f"cannot make a {method} patch: {error}") from None
        if not all(bool(vector.isfinite().all()) for vector in sites.values()):
            raise Diverged(f"{method}: a vector holds infinite or undefined numbers. Lower the strength.")
        if not all(bool(tensor.isfinite().all()) for one in operations for tensor in one.tensors().values()):
            raise Diverged(f"{method}: a tensor holds infinite or undefined numbers. Lower the learning rate.")
        copies = {s: v.detach().to("cpu", torch.float32, copy=True).contiguous() for s, v in sites.items()}
        fields = fields_for(lm, method, config, edits, seconds, notes)
        return cls(**fields, vectors=copies, operations=tuple(operations))

    def parts(self) -> dict[str, Any]:
        if self._plain():
            widths = {site.module: len(vector) for site, vector in self.vectors.items()}
            return {"newest": any(site.tokens == "answer" for site in self.vectors), "widths": widths}
        added = {"add": sorted([s.module, s.at, s.tokens, len(vector)] for s, vector in self.vectors.items())}
        listed = [{"name": one.name, "parts": one.parts(), "tensors": sorted(one.tensors())} for one in self.operations]
        return {**added, "operations": listed} if listed else added

    def tensors(self) -> dict[str, Tensor]:
        plain = self._plain()
        vectors = {site.module if plain else site.name: vector for site, vector in self.vectors.items()}
        return vectors | {f"{i}/{n}": t for i, one in enumerate(self.operations) for n, t in one.tensors().items()}

    def _plain(self) -> bool:
        """All are inputs, at the same tokens: written as the first release did, so that hashes stay."""
        kinds = {(s.at, s.tokens) for s in self.vectors}
        return not self.operations and kinds in (set(), {("input", "all")}, {("input", "answer")})

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], tensors: Mapping[str, Tensor], **common: Any) -> HookPatch:
        operations, tensors = _read(parts.get("operations", []), tensors)
        whole, parts = dict(parts), {name: value for name, value in parts.items() if name != "operations"}
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
        vectors = {by_name[name]: vector for name, vector in tensors.items()} if same else {}
        patch = cls(**common, vectors=vectors, operations=operations)
        if not same or patch.parts() != whole:
            raise BadPatch("its vectors are not those it lists.")
        return patch

    def describe(self) -> list[str]:
        where = {"all": "at every token", "answer": "from the last prompt token on"}
        return [
            f"  {s.module}: a vector of length {v.norm():.3g} on its {s.at} {where[s.tokens]}"
            for s, v in self.vectors.items()
        ] + [f"  {one.describe()}" for one in self.operations]

    def fits(self, lm: LM) -> None:
        try:
            _check(lm, self.vectors, self.operations)
        except LookupError as error:
            raise WrongModel(f"a {self.method} patch does not fit {lm.name}: {error}") from None

    def attach(self, lm: LM, mount: Mount, others: Sequence[Handle]) -> Handle:
        hooks = [_hook(lm.module(site.module), site, vector) for site, vector in self.vectors.items()]
        return Handle([Intervention([*hooks, *(hook for one in self.operations for hook in one.hooks(lm))])])

    def merged(self, others: Sequence[HookPatch]) -> HookPatch:
        total = dict(self.vectors)
        for other in others:
            for site, vector in other.vectors.items():
                total[site] = total[site] + vector if site in total else vector
        groups: dict[tuple[str, str], list[Operation]] = {}
        for one in (one for patch in (self, *others) for one in patch.operations):
            groups.setdefault((one.name, one.module), []).append(one)
        joined = tuple(first.joined(rest) for first, *rest in groups.values())
        return HookPatch(**merged_fields((self, *others)), vectors=total, operations=joined)

    def law(self) -> Law:
        laws = {one.law for one in self.operations} | ({Law.STACK} if self.vectors else set())
        return laws.pop() if len(laws) == 1 else Law.STACK


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


def _read(listed: Any, tensors: Mapping[str, Tensor]) -> tuple[tuple[Operation, ...], dict[str, Tensor]]:
    """The operations that a file lists, and the tensors that are of none. BadPatch: they do not belong together."""
    rest, operations = dict(tensors), []
    try:
        for i, one in enumerate(listed):
            own = {name: rest.pop(f"{i}/{name}") for name in one["tensors"]}
            need(all(t.isfinite().all() for t in own.values()), "a tensor holds infinite or undefined numbers.")
            operations.append(find_operation(one["name"]).from_parts(one["parts"], own))
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise BadPatch(f"its operations are not as lmpatch writes them ({error}).") from None
    return tuple(operations), rest


def _check(lm: LM, vectors: Mapping[Site, Tensor], operations: Sequence[Operation]) -> None:
    """Raise ``LookupError`` unless every vector fits its site of the model, and every operation its module."""
    for operation in operations:
        operation.check(lm)
    for site, vector in vectors.items():
        read, returned = widths(lm, site.module)
        if site.tokens == "answer" and site.module in lm.layout.tail:
            raise LookupError(f"{site.module} runs behind the blocks, where no token is told from another.")
        width, verb = (read, "reads") if site.at == "input" else (returned, "returns")
        if tuple(vector.shape) != (width,):
            found = tuple(vector.shape)
            raise LookupError(f"{site.module} {verb} vectors of {width}, the patch has one of shape {found}.")
