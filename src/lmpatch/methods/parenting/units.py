"""The parameters Parenting trains, cut into units, and held as one flat tensor per type of unit.

What belongs to one type is one tensor: its gradient, its moments and its scores are one operation each, and a type that
is left out of a loss, or of the optimiser, is left out whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...models.hooks import Hook
from ...models.lm import LM
from ...patches.weight.delta import Delta
from ...training import adapter
from .config import Units

Type = Literal["entangled", "adherence", "robustness", "others"]
TYPES: tuple[Type, ...] = ("entangled", "adherence", "robustness", "others")


@dataclass(frozen=True)
class Unit:
    """What is scored, typed and trained as one."""

    name: str
    layer: int
    projection: str
    """The module's name inside its block."""
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Numbers in it."""
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class Piece:
    """A part of a factor: all of it, or for ``lora_rank`` one row of A or one column of B."""

    module: str
    factor: Literal["a", "b", "w"]
    shape: tuple[int, ...]
    rank: int | None = None

    @property
    def size(self) -> int:
        """Numbers in it."""
        return int(torch.Size(self.shape).numel())


def cut(lm: LM, kind: Units, rank: int, modules: adapter.Modules) -> list[Unit]:
    """All units, in the order of layers and projections."""
    units = []
    for layer, names in enumerate(adapter.projections(lm, modules)):
        for module in names:
            short = module.removeprefix(f"{lm.layout.blocks[layer]}.")
            for name, pieces in _pieces(module, kind, rank, *adapter.shape(lm, module)).items():
                units.append(Unit(f"{module}{name}", layer, short, pieces))
    return units


def _pieces(module: str, kind: Units, rank: int, out: int, width: int) -> dict[str, tuple[Piece, ...]]:
    """Suffix of the unit's name → its pieces."""
    a, b = Piece(module, "a", (rank, width)), Piece(module, "b", (out, rank))
    if kind == "full_matrix":
        return {"": (Piece(module, "w", (out, width)),)}
    if kind == "matrix":
        return {"": (a, b)}
    if kind == "factor":
        return {".a": (a,), ".b": (b,)}
    return {f"[{r}]": (Piece(module, "a", (width,), r), Piece(module, "b", (out,), r)) for r in range(rank)}


class Adapter:
    """Values of all units, one flat fp32 tensor per type, and the change of weights they make.

    Untyped, all units are ``entangled``: everything trains on everything.
    """

    def __init__(
        self, lm: LM, units: Sequence[Unit], scale: float, seed: int, types: Sequence[Type] | None = None
    ) -> None:
        self.units, self.scale = list(units), scale
        self.types: list[Type] = list(types) if types is not None else ["entangled"] * len(units)
        self.order = {t: [u for u, own in zip(self.units, self.types, strict=True) if own == t] for t in TYPES}
        start = initial(units, seed)
        self.flat: dict[Type, Tensor] = {}
        for t, members in self.order.items():
            if members:
                values = torch.cat([start[p].reshape(-1) for u in members for p in u.pieces])
                self.flat[t] = values.to(lm.device).requires_grad_(t != "others")

    @property
    def leaves(self) -> dict[Type, Tensor]:
        """The tensors that train."""
        return {t: flat for t, flat in self.flat.items() if t != "others"}

    def values(self, dtype: torch.dtype | None = None) -> dict[Piece, Tensor]:
        """Every piece by its place, views of the flat tensors."""
        found: dict[Piece, Tensor] = {}
        for t, flat in self.flat.items():
            pieces = [p for u in self.order[t] for p in u.pieces]
            # split, not slices: its gradient is one concatenation instead of one full-size tensor a piece
            parts = flat.to(dtype or flat.dtype).split([p.size for p in pieces])
            found |= {piece: part.view(piece.shape) for piece, part in zip(pieces, parts, strict=True)}
        return found

    def factors(self, dtype: torch.dtype | None = None) -> dict[str, dict[str, Tensor]]:
        """Module → its factors ``a`` [r, in] and ``b`` [out, r], or ``w`` [out, in]."""
        found: dict[str, dict[str, Tensor]] = {}
        ranks: dict[tuple[str, str], dict[int, Tensor]] = {}
        for piece, value in self.values(dtype).items():
            if piece.rank is None:
                found.setdefault(piece.module, {})[piece.factor] = value
            else:
                ranks.setdefault((piece.module, piece.factor), {})[piece.rank] = value
        for (module, factor), rows in ranks.items():
            ordered = [rows[r] for r in sorted(rows)]
            found.setdefault(module, {})[factor] = torch.stack(ordered, 0 if factor == "a" else 1)
        return found

    def hooks(self, lm: LM) -> list[Hook]:
        """Hooks that add the change to each projection's output."""
        return adapter.hooks(lm, self.factors(lm.dtype), self.scale)

    def deltas(self, lm: LM) -> dict[str, Delta]:
        """The change by parameter name; matrices that are exactly zero are left out."""
        factors = self.factors()
        moved = {module: own for module, own in factors.items() if bool((own["w"] if "w" in own else own["b"]).any())}
        return adapter.deltas(lm, moved, self.scale)


def initial(units: Sequence[Unit], seed: int) -> dict[Piece, Tensor]:
    """A drawn with spread 1/√in, B and W zero: the same numbers however units are cut or typed."""
    found: dict[Piece, Tensor] = {}
    drawn: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for unit in units:
        for piece in unit.pieces:
            if piece.factor != "a":
                found[piece] = torch.zeros(piece.shape)
                continue
            if piece.module not in drawn:
                rank = piece.shape[0] if piece.rank is None else _ranks(units, piece.module)
                width = piece.shape[-1]
                drawn[piece.module] = adapter.drawn(rank, width, generator)
            found[piece] = drawn[piece.module] if piece.rank is None else drawn[piece.module][piece.rank]
    return found


def _ranks(units: Sequence[Unit], module: str) -> int:
    return sum(p.module == module and p.factor == "a" for u in units for p in u.pieces)


def counted(types: Sequence[Type]) -> dict[str, int]:
    """How many units of each type."""
    found = Counter(types)
    return {t: found[t] for t in TYPES}
