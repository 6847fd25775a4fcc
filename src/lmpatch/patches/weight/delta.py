"""The change of one weight, in one of five forms.

Every form sees the weight as (out, in), y = W x, whatever way the model stores it. On one weight they add up to

    W_now = W_original * prod(scales) + sum(additions)

so the order in which changes come and go does not matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import BadInput

D = TypeVar("D", bound="Delta")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class Delta(ABC):
    """The change of one weight. A value: its tensors are never written."""

    kind: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    """Its tensors, by field name."""

    if TYPE_CHECKING:  # a field in some forms, so no descriptor may stand here at run time

        @property
        def shape(self) -> tuple[int, int]:
            """(out, in) of the weight it changes."""

    @abstractmethod
    def norm(self) -> float:
        """Frobenius norm of the change."""

    @abstractmethod
    def scaled(self: D, strength: float) -> D:
        """The change times ``strength``: 1 keeps every bit, 0 is no change."""

    @classmethod
    @abstractmethod
    def _build(cls: type[D], tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> D:
        """The constructor, given all it could need."""

    @classmethod
    def from_tensors(cls: type[D], tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> D:
        """The inverse of ``tensors()`` and ``shape``.

        Raises:
            BadInput: names, shapes, dtypes or indices do not make a change of that shape.
        """
        _need(set(tensors) == set(cls.names), f"{cls.kind} has tensors {sorted(tensors)}, not {sorted(cls.names)}")
        delta = cls._build(tensors, shape)
        _need(delta.shape == shape, f"{cls.kind} has shape {delta.shape}, not {shape}")
        return delta

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name."""
        return {name: getattr(self, name) for name in self.names}

    @property
    def nbytes(self) -> int:
        """Bytes its tensors take."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def label(self) -> str:
        """Its kind and how much of it there is: ``low_rank 3``, ``rows 5``, ``dense``."""
        index = self.tensors().get("index")
        return self.kind if index is None else f"{self.kind} {len(index)}"

    def to(self: D, device: torch.device | str, dtype: torch.dtype | None = None, *, copy: bool = False) -> D:
        """The same change elsewhere; ``dtype`` is for the floating tensors, an index stays int64."""

        def move(t: Tensor) -> Tensor:
            return t.detach().to(device, dtype if t.is_floating_point() else None, copy=copy).contiguous()

        return self._map(move)

    def is_finite(self) -> bool:
        """No entry is infinite or NaN."""
        return all(bool(torch.isfinite(t).all()) for t in self.tensors().values())

    def _map(self: D, f: Callable[[Tensor], Tensor]) -> D:
        return replace(self, **{name: f(t) for name, t in self.tensors().items()})


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
        first = self.tensors()[self.names[-1]]
        whole = torch.zeros(self.shape, dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
        self.to(whole.device, whole.dtype).add_to(whole)
        return whole


@dataclass(frozen=True, eq=False)
class LowRank(Addition):
    """ΔW = b @ a, r (out + in) numbers instead of out * in."""

    b: Tensor  # [out, r]
    a: Tensor  # [r, in]
    kind: ClassVar[str] = "low_rank"
    names: ClassVar[tuple[str, ...]] = ("b", "a")

    def __post_init__(self) -> None:
        _floats(self, 2, "b", "a")
        _need(self.b.shape[1] == self.a.shape[0], f"b is {_size(self.b)} and a is {_size(self.a)}: the ranks differ")

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Columns of ``b``."""
        return self.b.shape[1]

    @property
    def label(self) -> str:
        return f"{self.kind} {self.rank}"

    def norm(self) -> float:
        """Frobenius norm from the r x r Gram matrices, in fp64; b @ a is not formed."""
        b, a = self.b.double(), self.a.double()
        return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())

    def scaled(self, strength: float) -> LowRank:
        return replace(self, b=self.b * strength)

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

    @classmethod
    def _build(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> LowRank:
        return cls(tensors["b"], tensors["a"])


@dataclass(frozen=True, eq=False)
class Dense(Addition):
    """ΔW written out."""

    value: Tensor  # [out, in]
    kind: ClassVar[str] = "dense"
    names: ClassVar[tuple[str, ...]] = ("value",)

    def __post_init__(self) -> None:
        _floats(self, 2, "value")

    @property
    def shape(self) -> tuple[int, int]:
        return self.value.shape[0], self.value.shape[1]

    def norm(self) -> float:
        return _norm(self.value)

    def scaled(self, strength: float) -> Dense:
        return Dense(self.value * strength)

    def add_to(self, weight: Tensor) -> None:
        weight.add_(self.value)

    def times(self, x: Tensor) -> Tensor:
        return F.linear(x, self.value)

    @classmethod
    def _build(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Dense:
        return cls(tensors["value"])


@dataclass(frozen=True, eq=False)
class Sparse(Addition):
    """ΔW with few entries: ``value[i]`` at row ``index[i] // in``, column ``index[i] % in``."""

    index: Tensor  # [n] int64, each once
    value: Tensor  # [n]
    shape: tuple[int, int]
    kind: ClassVar[str] = "sparse"
    names: ClassVar[tuple[str, ...]] = ("index", "value")

    def __post_init__(self) -> None:
        _floats(self, 1, "value")
        _index(self, self.value, self.shape[0] * self.shape[1])

    def norm(self) -> float:
        return _norm(self.value)

    def scaled(self, strength: float) -> Sparse:
        return replace(self, value=self.value * strength)

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

    @classmethod
    def _build(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Sparse:
        return cls(tensors["index"], tensors["value"], shape)


@dataclass(frozen=True, eq=False)
class Rows(Addition):
    """ΔW with few rows: ``value[i]`` is added to row ``index[i]``."""

    index: Tensor  # [n] int64, each once
    value: Tensor  # [n, in]
    out: int
    kind: ClassVar[str] = "rows"
    names: ClassVar[tuple[str, ...]] = ("index", "value")

    def __post_init__(self) -> None:
        _floats(self, 2, "value")
        _index(self, self.value, self.out)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out, self.value.shape[1]

    def norm(self) -> float:
        return _norm(self.value)

    def scaled(self, strength: float) -> Rows:
        return replace(self, value=self.value * strength)

    def add_to(self, weight: Tensor) -> None:
        weight.index_add_(0, self.index, self.value)

    def times(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out).index_add(-1, self.index, F.linear(x, self.value).to(x.dtype))

    @classmethod
    def _build(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Rows:
        return cls(tensors["index"], tensors["value"], shape[0])


@dataclass(frozen=True, eq=False)
class Scale(Delta):
    """Columns of the original weight times a factor, one column per input; factor 0 mutes a neuron."""

    index: Tensor  # [n] int64 columns, each once
    factor: Tensor  # [n]
    shape: tuple[int, int]
    kind: ClassVar[str] = "scale"
    names: ClassVar[tuple[str, ...]] = ("index", "factor")

    def __post_init__(self) -> None:
        _floats(self, 1, "factor")
        _index(self, self.factor, self.shape[1])

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

    @classmethod
    def _build(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Scale:
        return cls(tensors["index"], tensors["factor"], shape)


Changes = tuple[tuple[int, Delta], ...]
"""What is on one weight: (number of the patch, its change), in the order the patches went on."""


def join(deltas: Sequence[LowRank]) -> LowRank:
    """The sum of low-rank changes, with the ranks side by side."""
    return LowRank(torch.cat([d.b for d in deltas], dim=1), torch.cat([d.a for d in deltas]))


KINDS: dict[str, type[Delta]] = {cls.kind: cls for cls in (LowRank, Dense, Sparse, Rows, Scale)}


def _need(ok: bool, complaint: str) -> None:
    if not ok:
        raise BadInput(f"not a change of a weight: {complaint}.")


def _floats(delta: Delta, dims: int, *names: str) -> None:
    for name in names:
        t = getattr(delta, name)
        _need(t.ndim == dims, f"{delta.kind}.{name} has {t.ndim} dimensions, it must have {dims}")
        _need(t.dtype in FLOATS, f"{delta.kind}.{name} is {t.dtype}, it must be floating")


def _index(delta: Sparse | Rows | Scale, values: Tensor, end: int) -> None:
    index = delta.index
    _need(index.dtype == torch.int64 and index.ndim == 1, f"{delta.kind}.index must be int64 with one dimension")
    _need(len(index) == len(values), f"{delta.kind} has {len(index)} indices for {len(values)} values")
    if len(index):
        low, high = torch.stack(index.aminmax()).tolist()
        _need(low >= 0 and high < end, f"{delta.kind}.index runs from {low} to {high}, it must be in 0..{end - 1}")
        _need(bool((index.sort().values.diff() > 0).all()), f"{delta.kind}.index names an entry twice")


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)))


def _size(t: Tensor) -> str:
    return "x".join(map(str, t.shape))
