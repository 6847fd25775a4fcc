"""``Masked``: a matrix beside a projection, of which each prompt uses the columns of the edit that it is most like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ....errors import CannotMerge
from ....inference.forward import Pass, current_pass
from ....models.hooks import Hook
from ....models.lm import LM
from ...patch import Law
from ..operation import Operation, by_row, check_widths, choose, need, prompt, ready

BITS = 8  # of a stored byte; the first coordinate is the lowest bit
WORD = 64  # bits that are counted at once


@dataclass(eq=False, frozen=True)
class Masked(Operation):
    """y = W x + M (s ⊙ x) at every token. s is the mask of the edit that shares most columns with the prompt's own;
    where those are too few, y = W x. The decision is made once a prompt and holds for its answer."""

    name: ClassVar[str] = "masked"
    law: ClassVar[Law] = Law.UNION
    module: str
    """The projection W."""
    k: int
    """Coordinates of a mask."""
    centre: Tensor
    """[f] μ, the mean feature of unrelated prompts."""
    order: Tensor
    """[f] int32 a permutation: coordinate i of a feature stands for column order[i]."""
    matrices: Tensor
    """[g, d, f] one M for each fit."""
    masks: Tensor
    """[n, f / 8] uint8: the columns of each edit, packed."""
    owner: Tensor
    """[n] int32 the matrix of each edit."""
    least: Tensor
    """[n] int32 columns that a prompt's mask must share with the edit's; τ k."""

    def parts(self) -> dict[str, Any]:
        return {"module": self.module, "k": self.k}

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("centre", "order", "matrices", "masks", "owner", "least")}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Masked:
        found = cls(**{**parts, **tensors})
        f, i = torch.float32, torch.int32
        forms = {name: (t.ndim, t.dtype) for name, t in tensors.items()}
        wanted = {"centre": (1, f), "order": (1, i), "matrices": (3, f), "masks": (2, torch.uint8)}
        need(forms == wanted | {"owner": (1, i), "least": (1, i)}, "its masks have no such tensors.")
        width = len(found.centre)
        need(type(found.module) is str and type(found.k) is int and 0 < found.k <= width, f"its k is {found.k}.")
        need(found.matrices.shape[2] == width and found.masks.shape[1] == -(-width // BITS), "its widths differ.")
        need(bool((found.order.sort().values == torch.arange(width)).all()), "its order is no permutation.")
        need(len(found.masks) == len(found.owner) == len(found.least), "an edit lacks a part.")
        need(bool(((found.owner >= 0) & (found.owner < len(found.matrices))).all()), "an edit's matrix is missing.")
        return found

    def __len__(self) -> int:
        """Edits whose masks differ."""
        return len(self.masks)

    def describe(self) -> str:
        return f"{self.module}: {len(self)} masks of {self.k} columns each in {len(self.matrices)} matrices"

    def check(self, lm: LM) -> None:
        check_widths(lm, self.module, len(self.centre), self.matrices.shape[1])

    def joined(self, others: Sequence[Masked]) -> Masked:
        """The masks of all, each with the matrix it was trained with; the same matrix is held once.

        Raises:
            CannotMerge: their masks are not made in one way.
        """
        ways = {(one.k, one.centre.numpy().tobytes(), one.order.numpy().tobytes()) for one in (self, *others)}
        if len(ways) > 1:
            raise CannotMerge("their masks are made of other features. Fit them with one k, seed and text.")
        matrices: dict[bytes, int] = {}
        kept, entries = list[Tensor](), dict[tuple[bytes, int], int]()
        for one in (self, *others):
            places = []
            for matrix in one.matrices:
                places.append(matrices.setdefault(matrix.numpy().tobytes(), len(matrices)))
                if places[-1] == len(kept):
                    kept.append(matrix)
            for mask, owner, least in zip(one.masks, one.owner.tolist(), one.least.tolist(), strict=True):
                entries.setdefault((mask.numpy().tobytes(), places[owner]), least)
        masks = torch.stack([torch.frombuffer(bytearray(mask), dtype=torch.uint8) for mask, _ in entries])
        owner = torch.tensor([place for _, place in entries], dtype=torch.int32)
        least = torch.tensor([*entries.values()], dtype=torch.int32)
        return replace(self, matrices=torch.stack(kept), masks=masks, owner=owner, least=least)

    def mask_of(self, feature: Tensor) -> Tensor:
        """[n, f] bool: the columns of prompts whose mean inputs are ``feature`` [n, f]."""
        return top_columns(feature - self.centre.to(feature.device), self.order.to(feature.device).long(), self.k)

    def hooks(self, lm: LM) -> list[Hook]:
        key, width = object(), len(self.centre)
        tensors, words = ready(self.matrices, self.masks, self.owner, self.least), ready(as_words(self.masks))

        def look(x: Tensor, now: Pass | None) -> Tensor:
            own = as_words(packed(self.mask_of(mean_input(x, now))))
            least = tensors(x.device, x.dtype)[3]
            count = overlap(own, words(x.device, x.dtype)[0])  # [n, edits]
            later = torch.arange(len(least), device=x.device)  # of two that are as near, the later edit
            best = torch.where(count >= least, count * len(least) + later, -1).max(1)
            return torch.where(best.values >= 0, best.indices, -1)

        def add(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            now = current_pass()
            x = by_row(args[0], now)
            chosen = choose(now, key, lambda: look(x, now))
            if chosen is None:
                return None
            matrices, masks, owner, _ = tensors(x.device, x.dtype)
            entry, out = chosen.clamp(min=0), by_row(output, now)
            mask = unpacked(masks[entry], width) & (chosen >= 0)[:, None]  # [n, f]
            for g, matrix in enumerate(matrices):
                own = mask if len(matrices) == 1 else mask & (owner[entry] == g)[:, None]
                out = out + F.linear(x * own[:, None], matrix)
            return out.reshape(output.shape)

        return [Hook(lm.module(self.module), add)]


@torch.no_grad()
def mean_input(x: Tensor, now: Pass | None) -> Tensor:
    """[n, f] fp32 the mean input over each prompt's tokens [n, t, f]. The first token stays out: it is where models put
    what goes nowhere else, and would say how long a prompt is. Of a prompt of one token that token is the mean."""
    here = prompt(x, now)  # [n, t]
    behind = here & (here.cumsum(1) > 1)
    weight = torch.where(behind.any(1, keepdim=True), behind, here).float()
    return torch.einsum("ntf,nt->nf", x.float(), weight) / weight.sum(1, keepdim=True).clamp(min=1)


def top_columns(feature: Tensor, order: Tensor, k: int) -> Tensor:
    """[n, f] bool: the columns that the k largest coordinates of |feature| [n, f] stand for."""
    places = order[feature.abs().topk(k, dim=-1).indices]
    return torch.zeros_like(feature, dtype=torch.bool).scatter_(-1, places, True)


def packed(mask: Tensor) -> Tensor:
    """[n, f / 8] uint8 of bool [n, f]."""
    whole = F.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % BITS)).unflatten(-1, (-1, BITS))
    shifted: Tensor = whole << torch.arange(BITS, dtype=torch.uint8, device=mask.device)
    return shifted.sum(-1).to(torch.uint8)


def unpacked(masks: Tensor, width: int) -> Tensor:
    """The inverse of ``packed``: [n, width] bool."""
    bits = masks[..., None] >> torch.arange(BITS, dtype=torch.uint8, device=masks.device)
    return (bits & 1).flatten(-2)[..., :width].bool()


def as_words(masks: Tensor) -> Tensor:
    """[n, f / 64] int64 of packed masks."""
    return F.pad(masks, (0, -masks.shape[-1] % (WORD // BITS))).contiguous().view(torch.int64)


def overlap(own: Tensor, others: Tensor) -> Tensor:
    """[n, m] columns that masks [n, w] and [m, w] of ``as_words`` share, each word's bits counted at once."""
    return torch.stack([_bits(row & others).sum(-1) for row in own]) if len(own) else own.new_zeros(0, len(others))


def _bits(x: Tensor) -> Tensor:
    """The number of ones in each int64, by adding neighbours: pairs, fours, eights, then all bytes."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56) & 0xFF


OPERATION = Masked
