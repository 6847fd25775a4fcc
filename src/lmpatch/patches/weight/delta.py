"""The change of one weight, in one of five forms.

Every form sees the weight as (out, in), y = W x, whatever way the model stores it. On one weight they add up to

    W_now = W_original * prod(scales) + sum(additions)

so the order in which changes come and go does not matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import BadInput

D = TypeVar("D", bound="Delta")

When = Literal["always", "context"]
"""When a change acts: always, or only in prompts that carry a context (``InContext``), row by row of a batch."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Delta(ABC):
    """The change of one weight. A value: its tensors are never written."""

    when: When = field(default="always", kw_only=True)
    kind: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    """Its tensors, by field name. The last holds the numbers that grow with the change."""

    if TYPE_CHECKING:  # a field in some forms, so no descriptor may stand here at run time

        @property
        def shape(self) -> tuple[int, int]:
            """(out, in) of the weight it changes."""

    def norm(self) -> float:
        """Frobenius norm of the change."""
        return _norm(self._last)

    def scaled(self: D, strength: float) -> D:
        """The change times ``strength``: 1 keeps every bit, 0 is no change."""
        return self._with({self.names[-1]: self._last * strength})

    @classmethod
    def from_tensors(cls: type[D], tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> D:
        """The inverse of ``tensors()`` and ``shape``.

        Raises:
            BadInput: names, shapes, dtypes or indices do not make a change of that shape.
        """
        _need(set(tensors) == set(cls.names), f"{cls.kind} has tensors {sorted(tensors)}, not {sorted(cls.names)}")
        sizes = {"shape": shape, "out": shape[0]}
        own: dict[str, Any] = {**tensors, **{f.name: sizes[f.name] for f in fields(cls) if f.name in sizes}}
        delta = cls(**own)
        _need(delta.shape == shape, f"{cls.kind} has shape {delta.shape}, not {shape}")
        return delta

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name."""
        return {name: getattr(self, name) for name in self.names}

    @property
    def nbytes(self) -> int:
        """Bytes its tensors take."""
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def label(self) -> str:
        """Its kind and how much of it there is: ``low_rank 3``, ``rows 5``, ``dense``."""
        first, *more = self.tensors().values()
        return f"{self.kind} {len(first)}" if more else self.kind

    def to(self: D, device: torch.device | str, dtype: torch.dtype | None = None, *, copy: bool = False) -> D:
        """The same change elsewhere; ``dtype`` is for the floating tensors, an index stays int64."""

        def move(t: Tensor) -> Tensor:
            return t.detach().to(device, dtype if t.is_floating_point() else None, copy=copy).contiguous()

        return self._with({name: move(t) for name, t in self.tensors().items()})

    def is_finite(self) -> bool:
        """No entry is infinite or NaN."""
        return all(bool(torch.isfinite(t).all()) for t in self.tensors().values())

    def _with(self: D, changes: Mapping[str, Any]) -> D:
        return replace(self, **changes)

    @property
    def _last(self) -> Tensor:
        last: Tensor = getattr(self, self.names[-1])
        return last

    def _check(self, dims: int, end: int = 0) -> None:
        """Raise ``BadInput`` unless the floating tensors have so many dimensions and an index runs up to ``end``."""
        tensors, kind = self.tensors(), self.kind
        index = tensors.pop("index", None)
        for name, t in tensors.items():
            _need(t.ndim == dims, f"{kind}.{name} has {t.ndim} dimensions, it must have {dims}")
            _need(t.dtype in FLOATS, f"{kind}.{name} is {t.dtype}, it must be floating")
        if index is not None:
            _need(index.dtype == torch.int64 and index.ndim == 1, f"{kind}.index must be int64 with one dimension")
            _need(len(index) == len(t), f"{kind} has {len(index)} indices for {len(t)} values")
        if index is not None and len(index):
            low, high = torch.stack(index.aminmax()).tolist()
            _need(low >= 0 and high < end, f"{kind}.index runs from {low} to {high}, it must be in 0..{end - 1}")
            _need(bool((index.sort().values.diff() > 0).all()), f"{kind}.index names an entry twice")


@dataclass(frozen=True, eq=False)
class Addition(Delta):
    """A change that is added: W + ΔW."""

    @abstractmethod
    def add_to(self, weight: Tensor) -> None:
        """Add ΔW to a weight [out, in] in place; computed in the dtype of this change."""

    @abstractmethod
    def times(self, x: Tensor) -> Tensor:
        """ΔW x for inputs x [..., in] of the same dtype; [..., out]."""

    def dense(self) -> Tensor:
        """ΔW written out, [out, in] fp32 (fp64 if it is held so)."""
        dtype = torch.promote_types(self._last.dtype, torch.float32)
        whole = torch.zeros(self.shape, dtype=dtype, device=self._last.device)
        self.to(whole.device, whole.dtype).add_to(whole)
        return whole


@dataclass(frozen=True, eq=False)
class LowRank(Addition):
    """ΔW = b @ a, r (out + in) numbers instead of out * in."""

    b: Tensor  # [out, r]
    a: Tensor  # [r, in]
    kind: ClassVar[str] = "low_rank"
    names: ClassVar[tuple[str, ...]] = ("a", "b")

    def __post_init__(self) -> None:
        self._check(2)
        sizes = ["x".join(map(str, t.shape)) for t in (self.b, self.a)]
        _need(self.b.shape[1] == self.a.shape[0], f"b is {sizes[0]} and a is {sizes[1]}: the ranks differ")

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Columns of ``b``."""
        return self.b.shape[1]

    def norm(self) -> float:
        """Frobenius norm from the r x r Gram matrices, in fp64; b @ a is not formed."""
        b, a = self.b.double(), self.a.double()
        return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())

    def add_to(self, weight: Tensor) -> None:
        weight.add_(self.b @ self.a)

    def times(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b)

    def compact(self) -> LowRank:
        """The same change at its true rank, by QR of both factors and a small SVD (fp64)."""
        q_out, r_out = torch.linalg.qr(self.b.double())
        q_in, r_in = torch.linalg.qr(self.a.double().T)
        u, s, vt = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)  # at most [r, r], [r], [r, r]
        keep = s > 1e-12 * r_out.norm() * r_in.norm()  # below is the noise of fp64: a zero
        root = s[keep].sqrt()
        b, a = q_out @ (u[:, keep] * root), (root[:, None] * vt[keep]) @ q_in.T
        return LowRank(b.to(self.b.dtype), a.to(self.a.dtype))


@dataclass(frozen=True, eq=False)
class Dense(Addition):
    """ΔW written out."""

    value: Tensor  # [out, in]
    kind: ClassVar[str] = "dense"
    names: ClassVar[tuple[str, ...]] = ("value",)

    def __post_init__(self) -> None:
        self._check(2)

    @property
    def shape(self) -> tuple[int, int]:
        return self.value.shape[0], self.value.shape[1]

    def add_to(self, weight: Tensor) -> None:
        weight.add_(self.value)

    def times(self, x: Tensor) -> Tensor:
        return F.linear(x, self.value)


@dataclass(frozen=True, eq=False)
class Sparse(Addition):
    """ΔW with few entries: ``value[i]`` at row ``index[i] // in``, column ``index[i] % in``."""

    index: Tensor  # [n] int64, each once
    value: Tensor  # [n]
    shape: tuple[int, int]
    kind: ClassVar[str] = "sparse"
    names: ClassVar[tuple[str, ...]] = ("index", "value")

    def __post_init__(self) -> None:
        self._check(1, self.shape[0] * self.shape[1])

    def add_to(self, weight: Tensor) -> None:
        row, column = self.index // self.shape[1], self.index % self.shape[1]
        weight.index_put_((row, column), self.value, accumulate=True)

    def times(self, x: Tensor) -> Tensor:
        return self.to_rows().times(x)

    def to_rows(self) -> Rows:
        """The same change as whole rows."""
        rows, place = torch.unique(self.index // self.shape[1], return_inverse=True)
        value = self.value.new_zeros(len(rows), self.shape[1])
        value[place, self.index % self.shape[1]] = self.value
        return Rows(rows, value, self.shape[0])


@dataclass(frozen=True, eq=False)
class Rows(Addition):
    """ΔW with few rows: ``value[i]`` is added to row ``index[i]``."""

    index: Tensor  # [n] int64, each once
    value: Tensor  # [n, in]
    out: int
    kind: ClassVar[str] = "rows"
    names: ClassVar[tuple[str, ...]] = ("index", "value")

    def __post_init__(self) -> None:
        self._check(2, self.out)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.value.shape[1]

    def add_to(self, weight: Tensor) -> None:
        weight.index_add_(0, self.index, self.value)

    def times(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out).index_add(-1, self.index, F.linear(x, self.value).to(x.dtype))


@dataclass(frozen=True, eq=False)
class Scale(Delta):
    """Columns of the original weight times a factor, one column per input; factor 0 mutes a neuron."""

    index: Tensor  # [n] int64 columns, each once
    factor: Tensor  # [n]
    shape: tuple[int, int]
    kind: ClassVar[str] = "scale"
    names: ClassVar[tuple[str, ...]] = ("index", "factor")

    def __post_init__(self) -> None:
        self._check(1, self.shape[1])

    def norm(self) -> float:
        """Norm of ``factor - 1``. The change itself depends on the weight."""
        return _norm(self.factor.double() - 1)

    def scaled(self, strength: float) -> Scale:
        """Factors 1 + strength (factor - 1): the weight moves ``strength`` times as far. -1 is no inverse."""
        return replace(self, factor=torch.lerp(torch.ones_like(self.factor), self.factor, strength))

    def factors(self) -> Tensor:
        """One factor per input, [in]; 1 where nothing changes."""
        whole = self.factor.new_ones(self.shape[1])
        whole[self.index] = self.factor
        return whole


Changes = Mapping[int, Delta]
"""What is on one weight: number of the patch -> its change, in the order the patches went on."""
KINDS: dict[str, type[Delta]] = {cls.kind: cls for cls in (LowRank, Dense, Sparse, Rows, Scale)}


def join(deltas: Sequence[LowRank]) -> LowRank:
    """The sum of low-rank changes, with the ranks side by side."""
    return LowRank(torch.cat([d.b for d in deltas], dim=1), torch.cat([d.a for d in deltas]))


def _need(ok: bool, complaint: str) -> None:
    if not ok:
        raise BadInput(f"not a change of a weight: {complaint}.")


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)))
