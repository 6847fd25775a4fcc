"""MALMEN: a trained network proposes a value for each key of many facts, and one ridge regression writes them all.

Source: Tan et al. 2023, "Massive Editing for Large Language Models via Meta Learning" (arXiv:2311.04661).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.edits import Edit, check_contradictions
from ..locate.gradients import Gradients
from ..models.lm import LM
from ..patches.base import Base, fingerprint
from ..patches.editor import Editor
from ..patches.patch import plain
from ..patches.weight.delta import Delta, Dense
from ..patches.weight.patch import WeightPatch
from ..progress import Progress
from ..training.facts import TrainingData as TrainingData
from .hypernetwork import config, editing, trainer
from .hypernetwork.network import Hypernetwork, Read, Statistics

AIM = "facts"
Record = Edit
RIDGE = 0.1  # of the median squared length of the keys, as training starts


@dataclass(frozen=True)
class Config:
    """How facts are written. What is learned stands in ``Training``."""

    strength: float = 1.0
    """Factor of every change."""
    reset_each: bool = True
    """Each commit is read from the model as it was when the editor was trained, without the patches that are on it.
    false: from the model as it is; several such commits spoil each other."""


@dataclass(frozen=True)
class Training(config.Training):
    """How the network is trained. Defaults for a 270M model on a CPU."""

    layers: int = 6
    """So many blocks are written, the last ones: their down-projections."""
    rank: int = 256
    """Width inside the network's two blocks. Published: 1920."""
    steps: int = 500
    """Steps of Adam. Published: until it is no better on held-out facts."""
    batch: int = 64
    """Facts of a step, written in one commit. Published: 512 and more."""
    strength: float = 1e-6
    """η: what values are multiplied by at the start; each module learns its own."""
    strength_lr: float = 1e-5
    """Adam's rate for these."""
    lr: float = 1e-5
    """Adam's rate for the network and the ridges."""
    clip: float = 1.0
    """Gradients are cut to this norm."""


class Malmen(Hypernetwork):
    """ΔWᵀ = (UᵀU + e^r I)⁻¹ UᵀV with V = -η (U·Û) D̂, from all tokens of all facts of a commit.

    U are the module's inputs where an answer token is predicted; Û and D̂ are what the network makes of them and of the
    gradients. r is learned, one for each module.
    """

    method = "malmen"
    answers_only = True
    together = True

    def __init__(self, sizes: Mapping[str, Sequence[int]], rank: int) -> None:
        super().__init__(sizes, rank)
        self.ridge = nn.Parameter(torch.zeros(len(self.sizes)))

    @classmethod
    def modules_of(cls, lm: LM, layers: int) -> list[str]:
        return list(lm.layout.downs[max(0, lm.layout.n_layers - layers) :])

    @torch.no_grad()
    def begin(self, read: Read) -> None:
        """e^r has the units of squared keys: a share of those at hand. Released: r = 0."""
        for i, name in enumerate(self.order):
            size = read[name].inputs.square().sum(1).median()
            if size > 0:  # NaN without tokens
                self.ridge[i] = (RIDGE * size).log()

    def widened(self, before: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        wider: Tensor = scale * before.clamp(min=0) + shift
        return wider

    def values(self, name: str, own: Gradients, statistics: Statistics | None = None) -> Tensor:
        """V [N, out]: what the change is to make of each key."""
        x, g = self(name, own, statistics)
        value: Tensor = -self.strength[self.order.index(name)] * (own.inputs * x).sum(1, keepdim=True) * g
        return value

    def written(self, name: str, own: Gradients, statistics: Statistics | None = None) -> tuple[Tensor, Tensor]:
        """The keys, and (UUᵀ + e^r I)⁻¹ V: the dual form, in the number of tokens."""
        ridge = self.ridge[self.order.index(name)]
        return own.inputs, dual(own.inputs, self.values(name, own, statistics), ridge)


class _Dual(torch.autograd.Function):
    """B = (UUᵀ + e^r I)⁻¹ V, whose gradient is one more solve with the factor that is at hand."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, values: Tensor, ridge: Tensor) -> Tensor:
        u, eye = keys.double(), torch.eye(len(keys), dtype=torch.float64, device=keys.device)
        lower = torch.linalg.cholesky(u @ u.T + ridge.double().exp() * eye)
        b = torch.cholesky_solve(values.double(), lower)
        ctx.save_for_backward(lower, b, ridge)
        return b.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        lower, b, ridge = ctx.saved_tensors
        (grad,) = grads  # of B: U G, where G is the gradient of ΔWᵀ
        solved = torch.cholesky_solve(grad.double(), lower)  # U M, with M = (UᵀU + e^r I)⁻¹ G
        rate = -ridge.double().exp() * (solved * b).sum()  # -e^r ⟨M, ΔWᵀ⟩
        return None, solved.to(grad.dtype), rate.to(ridge.dtype)


def dual(keys: Tensor, values: Tensor, ridge: Tensor) -> Tensor:
    """B [N, out] with ΔWᵀ = UᵀB = (UᵀU + e^r I)⁻¹ UᵀV, solved in the number of tokens; gradients flow to V and r.

    Args:
        keys: U [N, in], values: V [N, out], ridge: r [].
    Source: Tan et al. 2023 (arXiv:2311.04661), eq. 5 and 8, in their dual form.
    """
    out: Tensor = _Dual.apply(keys, values, ridge)  # type: ignore[no-untyped-call]
    return out


def primal(keys: Tensor, values: Tensor, ridge: Tensor) -> Tensor:
    """ΔW [out, in] of the same regression, solved in the width of the keys."""
    u = keys.double()
    eye = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    lower = torch.linalg.cholesky(u.T @ u + ridge.double().exp() * eye)
    return torch.cholesky_solve(u.T @ values.double(), lower).T.to(values.dtype)


def train(
    lm: LM, data: TrainingData | Sequence[Edit], cfg: Training, *, out: str | Path | None = None,
    progress: Progress | None = None,
) -> Editor:  # fmt: skip
    """Train the network that later commits use: one change of all facts of a step must make the model state them in
    other words, and keep its answers to other questions.

    Args:
        data: facts with rephrases and locality prompts; as ``TrainingData`` with unrelated questions. None is kept.
        out: folder of the checkpoint and the curves. A run that is there goes on where it stopped.
    Returns:
        the editor of this model; ``save`` writes one safetensors file.
    Raises:
        BadInput: too few facts, a setting out of range, or ``out`` holds another run.
        NotEnoughMemory: training would need more than is free.
        Diverged: a gradient left the finite numbers; the last checkpoint is good.
    Source: Tan et al. 2023 (arXiv:2311.04661), algorithm 1 and 2.
    Differs: the gradient of the change is taken in its factors; keys and gradients stay in memory; variances count each
    token once; r starts at the size of the model's keys.
    """
    return trainer.train(Malmen, lm, data, cfg, out, progress)


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, editor: Editor | str | Path | None = None,
    progress: Progress | None = None,
) -> WeightPatch:  # fmt: skip
    """Write all facts in one commit, by one forward and backward over them and one solve for each module.

    Args:
        edits: subjects are not needed.
        editor: from ``train``; None: the one that comes with lmpatch, or an installed package, for this model.
    Returns:
        one LowRank(out, in) per module, of as many ranks as there are target tokens; Dense where that is smaller.
    Raises:
        BadInput: there is no editor; says how one is trained and how long that takes.
        WrongModel: the editor was trained for another model.
        Contradiction: one prompt is asked to have two targets.
    Source: Tan et al. 2023 (arXiv:2311.04661), sec. 3.
    """
    check_contradictions(edits)
    return _fitted(lm, edits, cfg, editor, progress, [list(range(len(edits)))])[0]


def fit_each(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, editor: Editor | str | Path | None = None,
    progress: Progress | None = None,
) -> list[WeightPatch]:  # fmt: skip
    """One patch per edit, as if each were fitted alone, from one pass over all."""
    return _fitted(lm, edits, cfg, editor, progress, [[i] for i in range(len(edits))])


def _fitted(
    lm: LM, edits: Sequence[Edit], cfg: Config, editor: Editor | str | Path | None, progress: Progress | None,
    commits: Sequence[Sequence[int]],
) -> list[WeightPatch]:  # fmt: skip
    """A patch for each commit, from one pass over all facts."""
    start = time.perf_counter()
    made, net = editing.opened(Malmen, lm, editor, Training())
    with editing.as_trained(lm, "malmen", cfg.reset_each), torch.no_grad():
        read = editing.read(lm, net, editing.rows_of(lm, made, edits), progress)
    seconds = (time.perf_counter() - start) / max(1, len(edits))
    patches = []
    for commit in commits:
        begin = time.perf_counter()
        deltas = {name: _delta(net, name, read[name].of(commit), cfg.strength) for name in net.order}
        spent = seconds * len(commit) + time.perf_counter() - begin
        some = [edits[i] for i in commit]
        tokens = len(next(iter(read.values())).of(commit).row)
        patches.append(editing.patch(lm, net, made, deltas, some, cfg, spent, tokens=tokens))
    return patches


@torch.no_grad()
def _delta(net: Malmen, name: str, own: Gradients, strength: float) -> Delta:
    """In whichever of both forms is smaller."""
    if len(own.inputs) <= own.inputs.shape[1]:
        return editing.delta(*net.written(name, own), strength)
    return Dense(strength * primal(own.inputs, net.values(name, own), net.ridge[net.order.index(name)]))


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model, rounded up: see ``hypernetwork.editing.memory``, and the solve."""
    tokens = min(facts * editing.TOKENS, max(lm.layout.widths))
    return editing.memory(Malmen, lm, facts, Training()) + 8 * 3 * tokens**2


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model."""
    edits = [Edit("The Eiffel Tower is in", target="Rome"), Edit("Steve Jobs founded", target="Paris")]
    return edits, Config()


def example_editor(lm: LM) -> Editor:
    """An untrained editor for this model."""
    net = Malmen.new(lm, 2, 8, 1e-2, 0)
    return Editor("malmen", plain(Training(layers=2)), Base(fingerprint(lm), lm.name), net.parts(), net.tensors(), {})
