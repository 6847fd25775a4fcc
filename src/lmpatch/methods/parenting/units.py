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

from ...distributed import SINGLE, World
from ...inference.forward import nll
from ...inference.tokens import Row
from ...models.hooks import Hook, hooked
from ...models.lm import LM
from ...patches.weight.delta import Delta
from ...training import adapter
from ...training.losses import answer_loss, answer_states

Units = Literal["matrix", "factor", "lora_rank", "full_matrix"]
Mean = Literal["tokens", "examples"]
Type = Literal["entangled", "adherence", "robustness", "others"]
TYPES: tuple[Type, ...] = ("entangled", "adherence", "robustness", "others")


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
        return torch.Size(self.shape).numel()


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


def cut(lm: LM, kind: Units, rank: int, modules: adapter.Modules) -> list[Unit]:
    """All units, in the order of layers and projections."""
    return [
        Unit(f"{module}{suffix}", layer, module.removeprefix(f"{lm.layout.blocks[layer]}."), pieces)
        for layer, names in enumerate(adapter.projections(lm, modules))
        for module in names
        for suffix, pieces in _pieces(module, kind, rank, *adapter.shape(lm, module)).items()
    ]


def _pieces(module: str, kind: Units, rank: int, out: int, width: int) -> dict[str, tuple[Piece, ...]]:
    """Suffix of the unit's name → its pieces."""
    a, b = Piece(module, "a", (rank, width)), Piece(module, "b", (out, rank))
    if kind == "full_matrix":
        return {"": (Piece(module, "w", (out, width)),)}
    if kind == "lora_rank":
        return {f"[{r}]": (Piece(module, "a", (width,), r), Piece(module, "b", (out,), r)) for r in range(rank)}
    return {"": (a, b)} if kind == "matrix" else {".a": (a,), ".b": (b,)}


class Adapter:
    """Values of all units, one flat fp32 tensor per type, and the change of weights they make.

    Untyped, all units are ``entangled``: everything trains on everything.
    """

    def __init__(
        self, lm: LM, units: Sequence[Unit], scale: float, seed: int, types: Sequence[Type] | None = None
    ) -> None:
        self.units, self.scale = list(units), scale
        start = _start(units, seed)
        self.flat: dict[Type, Tensor] = {}
        self.pieces: dict[Type, list[Piece]] = {}  # in the order of the flat tensor
        for i, unit in enumerate(units):
            self.pieces.setdefault(types[i] if types else "entangled", []).extend(unit.pieces)
        for t in TYPES:
            if t in self.pieces:
                values = torch.cat([start[piece].reshape(-1) for piece in self.pieces[t]])
                self.flat[t] = values.to(lm.device).requires_grad_(t != "others")

    @property
    def leaves(self) -> dict[Type, Tensor]:
        """The tensors that train."""
        return {t: flat for t, flat in self.flat.items() if t != "others"}

    def factors(self, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
        """Module → its factors ``a`` [r, in] and ``b`` [out, r], or ``w`` [out, in]."""
        factors: dict[str, dict[str, Tensor]] = {}
        ranks: dict[tuple[str, str], dict[int, Tensor]] = {}
        for t, flat in self.flat.items():
            # split, not slices: its gradient is one concatenation instead of one full-size tensor a piece
            parts = flat.to(dtype).split([p.size for p in self.pieces[t]])
            for piece, part in zip(self.pieces[t], parts, strict=True):
                if piece.rank is None:
                    factors.setdefault(piece.module, {})[piece.factor] = part.view(piece.shape)
                else:
                    ranks.setdefault((piece.module, piece.factor), {})[piece.rank] = part
        for (module, factor), rows in ranks.items():
            ordered = [rows[r] for r in sorted(rows)]
            factors.setdefault(module, {})[factor] = torch.stack(ordered, 0 if factor == "a" else 1)
        return factors

    def hooks(self, lm: LM) -> list[Hook]:
        """Hooks that add the change to each projection's output."""
        return adapter.hooks(lm, self.factors(lm.dtype), self.scale)

    def loss(self, lm: LM, rows: Sequence[Row], world: World = SINGLE, mean: Mean = "tokens") -> Tensor:
        """``answer_loss`` of the rows under the change, or the mean over rows of what each has alone."""
        with lm.lock, hooked(*self.hooks(lm)):
            if mean == "tokens":
                return answer_loss(lm, rows, world)
            states, labels, places = answer_states(lm, rows, world)
            shares = [1 / (len(rows) * (len(row.ids) - row.target)) for row in rows]
            losses = nll(lm, states, labels)
            return (losses * losses.new_tensor([shares[i] for i in places])).sum()

    def deltas(self, lm: LM) -> dict[str, Delta]:
        """The change by parameter name; matrices that are exactly zero are left out."""
        moved = {
            module: own for module, own in self.factors().items() if bool((own["w"] if "w" in own else own["b"]).any())
        }
        return adapter.deltas(lm, moved, self.scale)


def _start(units: Sequence[Unit], seed: int) -> dict[Piece, Tensor]:
    """A drawn with spread 1/√in, B and W zero: the same numbers however units are cut or typed."""
    pieces = [piece for unit in units for piece in unit.pieces]
    ranks = Counter(piece.module for piece in pieces if piece.factor == "a" and piece.rank is not None)
    start = {piece: torch.zeros(piece.shape) for piece in pieces}
    drawn: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for piece in pieces:
        if piece.factor == "a":
            if piece.module not in drawn:
                rank = ranks[piece.module] or piece.shape[0]
                drawn[piece.module] = adapter.drawn(rank, piece.shape[-1], generator)
            start[piece] = drawn[piece.module] if piece.rank is None else drawn[piece.module][piece.rank]
    return start
