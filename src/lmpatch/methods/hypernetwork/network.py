"""The network from a fact's gradient to its change, and the running statistics that its input is normalised by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import BadPatch, WrongModel
from ...locate.gradients import Gradients
from ...models.lm import LM
from ...patches.editor import Editor
from ...training import adapter
from ...training.adapter import Factors

BLOCKS = 2
FLOOR = 1e-3  # of a part's typical spread: entries that hardly vary are not blown up
Read = Mapping[str, Gradients]
Statistics = list[tuple[Tensor, Tensor, Tensor]]
"""Of each module: how many tokens, and mean and scatter [in + out] of inputs and gradients side by side, fp64."""


class Hypernetwork(nn.Module):
    """Residual blocks of low rank, one set for all modules of one shape, with a scale and a shift for each module.

    A method's own class says which modules are written (``modules_of``), which tokens are read (``answers_only``),
    where the shift stands (``widened``) and what a change is made of (``written``).

    Differs from both released codes: each module has statistics of its own.
    """

    method: ClassVar[str]
    answers_only: ClassVar[bool]
    """Tokens where an answer token is predicted are read, and no others."""
    together: ClassVar[bool]
    """All facts of a commit make one change; else each makes its own, and a commit is their sum."""
    own_rate: ClassVar[tuple[str, ...]] = ("strength",)
    """Parameters that learn at a rate of their own."""

    def __init__(self, sizes: Mapping[str, Sequence[int]], rank: int) -> None:
        """Nothing is drawn yet, see ``start``.

        Args:
            sizes: (in, out) of each module that is written, by its name.
        """
        super().__init__()
        self.sizes = {name: (int(size[0]), int(size[1])) for name, size in sizes.items()}
        self.rank = rank
        shapes = list(dict.fromkeys(self.sizes.values()))
        members = [[n for n, own in self.sizes.items() if own == size] for size in shapes]
        self.place = {n: (k, i) for k, names in enumerate(members) for i, n in enumerate(names)}
        self.order = list(self.sizes)

        def each(make: Any) -> Any:
            return [make(len(names), sum(size)) for names, size in zip(members, shapes, strict=True)]

        def trained(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*size))

        self.inner = nn.ParameterList(each(lambda _, w: trained(BLOCKS, rank, w)))  # V
        self.outer = nn.ParameterList(each(lambda _, w: trained(BLOCKS, w, rank)))  # U
        self.bias = nn.ParameterList(each(lambda _, w: trained(BLOCKS, w)))
        self.scale = nn.ParameterList(each(lambda n, w: trained(n, BLOCKS, w)))
        self.shift = nn.ParameterList(each(lambda n, w: trained(n, BLOCKS, w)))
        self.strength = trained(len(self.sizes))
        """Alpha of MEND, η of MALMEN: what a module's change is multiplied by."""
        for i, size in enumerate(self.sizes.values()):
            self.register_buffer(f"count{i}", torch.zeros((), dtype=torch.float64))
            self.register_buffer(f"mean{i}", torch.zeros(sum(size), dtype=torch.float64))
            self.register_buffer(f"scatter{i}", torch.zeros(sum(size), dtype=torch.float64))

    @classmethod
    def modules_of(cls, lm: LM, layers: int) -> list[str]:
        """The projections that are written."""
        raise NotImplementedError

    @classmethod
    def new(cls, lm: LM, layers: int, rank: int, strength: float, seed: int) -> Hypernetwork:
        """A network as it starts: it gives inputs and gradients as they are, normalised."""
        net = cls({name: adapter.shape(lm, name)[::-1] for name in cls.modules_of(lm, layers)}, rank)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in [*net.outer, *net.bias, *net.shift]:
                p.zero_()
            for p in net.scale:
                p.fill_(1.0)
            for p in net.inner:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
            net.strength.fill_(strength)
        return net

    def begin(self, read: Read) -> None:
        """Set what depends on how large the model's own numbers are, from the first facts."""

    def statistics(self) -> Statistics:
        """As they are."""
        return [
            (getattr(self, f"count{i}"), getattr(self, f"mean{i}"), getattr(self, f"scatter{i}"))
            for i in range(len(self.order))
        ]

    @torch.no_grad()
    def keep(self, statistics: Statistics) -> None:
        """Have these statistics."""
        for mine, new in zip(self.statistics(), statistics, strict=True):
            for own, value in zip(mine, new, strict=True):
                own.copy_(value)

    def joined(self, read: Read) -> Statistics:
        """The statistics with these tokens among them; the network keeps those it has until ``keep``."""
        return [
            joined(*own, torch.cat([read[name].inputs, read[name].gradients], 1))
            for name, own in zip(self.order, self.statistics(), strict=True)
        ]

    def forward(self, name: str, own: Gradients, statistics: Statistics | None = None) -> tuple[Tensor, Tensor]:
        """A module's pseudo-inputs [N, in] and pseudo-gradients [N, out] of N tokens.

        Args:
            statistics: None: those the network has.
        """
        k, i = self.place[name]
        known = (statistics or self.statistics())[self.order.index(name)]
        size = self.sizes[name]
        z = torch.cat(
            [
                normalised(part, known[0], mean, scatter)
                for part, mean, scatter in zip(
                    (own.inputs, own.gradients), known[1].split(size), known[2].split(size), strict=True
                )
            ],
            1,
        )
        for block in range(BLOCKS):
            low = F.linear(z, self.inner[k][block])
            before = F.linear(low, self.outer[k][block], self.bias[k][block])
            z = z + self.widened(before, self.scale[k][i, block], self.shift[k][i, block])
        x, g = z.split(size, 1)
        return x, g

    def widened(self, before: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """What a block adds. A clamp and no relu: its gradient at 0 is 1, and a fresh network stands at 0."""
        raise NotImplementedError

    def written(self, name: str, own: Gradients, statistics: Statistics | None = None) -> tuple[Tensor, Tensor]:
        """A module's change as factors a [N, in] and b [N, out] of N tokens: ΔW is the sum of b aᵀ."""
        raise NotImplementedError

    def factors(self, read: Read, facts: int, statistics: Statistics | None = None) -> dict[str, Factors]:
        """The change of each module for hooks, see ``training.adapter``: one for all facts, or one for each."""
        changes = {name: self.written(name, read[name], statistics) for name in self.order}
        if self.together:
            return {name: {"a": a, "b": b.T} for name, (a, b) in changes.items()}
        return {
            name: {"a": _by_fact(a, read[name].row, facts), "b": _by_fact(b, read[name].row, facts).mT}
            for name, (a, b) in changes.items()
        }

    def parts(self) -> dict[str, Any]:
        """Enough to build it again."""
        return {"sizes": {name: list(size) for name, size in self.sizes.items()}, "rank": self.rank}

    def tensors(self) -> dict[str, Tensor]:
        """For a file: the two large matrices in bf16, all else as it is."""
        kept = {name: t.detach().cpu() for name, t in self.state_dict().items()}
        large = ("inner.", "outer.")
        return {n: (t.to(torch.bfloat16) if n.startswith(large) else t).contiguous() for n, t in kept.items()}

    @classmethod
    def of(cls, editor: Editor, lm: LM) -> Hypernetwork:
        """The network of an editor, fp32, on the device of the model.

        Raises:
            BadPatch: the editor's tensors are not those of such a network.
            WrongModel: it writes modules that the model does not have.
        """
        try:
            sizes, rank = editor.parts["sizes"], editor.parts["rank"]
            with torch.device("meta"):  # nothing is allocated for a shape that the tensors do not have
                net = cls(sizes, rank)
            tensors = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in editor.tensors.items()}
            net.load_state_dict(tensors, assign=True)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise BadPatch(
                f"this editor's parts are not those of a {cls.method} network ({str(error)[:200]}). Take a fresh copy, "
                "or train one."
            ) from None
        for name, size in net.sizes.items():
            try:
                there = adapter.shape(lm, name)[::-1]
            except AttributeError:
                there = None
            if there != size:
                raise WrongModel(f"the editor writes {name}, {size[0]} to {size[1]}, and {lm.name} has no such module.")
        return net.to(lm.device)


def joined(count: Tensor, mean: Tensor, scatter: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and scatter about it [k] with rows [n, k] among them, as if all had come at once.

    Source: Chan, Golub and LeVeque 1979. MALMEN's released code adds the unbiased variance times n, which counts too
    much, and is undefined for one row.
    """
    if not len(rows):
        return count, mean, scatter
    x = rows.double()
    own, total = x.mean(0), count + len(rows)
    off = own - mean
    between = off.square() * (count * len(rows) / total)
    return total, mean + off * (len(rows) / total), scatter + (x - own).square().sum(0) + between


def normalised(rows: Tensor, count: Tensor, mean: Tensor, scatter: Tensor) -> Tensor:
    """(x - mean) over the spread, [N, k] fp32; entries that do not vary are near zero. Less than two rows: as it is."""
    variance = scatter / (count - 1).clamp(min=1)
    variance = variance.clamp(min=FLOOR**2 * variance.mean())
    spread = torch.where((count > 1) & (variance > 0), variance, 1.0).sqrt()
    return ((rows.double() - mean) / spread).float()


def _by_fact(rows: Tensor, fact: Tensor, facts: int) -> Tensor:
    """Tokens [N, k], sorted by fact, as [facts, most tokens of a fact, k]; zeros fill short ones."""
    counts = torch.bincount(fact, minlength=facts)
    place = torch.arange(len(fact), device=fact.device) - (counts.cumsum(0) - counts)[fact]
    whole = rows.new_zeros(facts, int(counts.max()), rows.shape[1])
    return whole.index_put((fact, place), rows)
