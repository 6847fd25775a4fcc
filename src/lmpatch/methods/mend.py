"""MEND: a trained network turns a fact's own gradient into a change of low rank that states it in other words, too.

Source: Mitchell et al. 2022, "Fast Model Editing at Scale" (arXiv:2110.11309).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.edits import Edit, check_contradictions
from ..inference.tokens import Row
from ..locate.gradients import Gradients
from ..models.hooks import hooked
from ..models.lm import LM
from ..patches.base import Base, fingerprint
from ..patches.editor import Editor
from ..patches.patch import plain
from ..patches.weight.delta import Delta, Dense
from ..patches.weight.patch import WeightPatch
from ..progress import Progress
from ..training import adapter
from ..training.facts import TrainingData as TrainingData
from .hypernetwork import config, editing, trainer
from .hypernetwork.network import Hypernetwork, Statistics

AIM = "facts"
Record = Edit


@dataclass(frozen=True)
class Config:
    """How facts are written. What is learned stands in ``Training``."""

    strength: float = 1.0
    """Factor of every change."""
    reset_each: bool = True
    """Each fact is read from the model as it was when the editor was trained: without patches, and without the other
    facts of its commit. false: facts are written one after the other, each read from the model as the earlier ones made
    it. Tens of such edits disable a model."""


@dataclass(frozen=True)
class Training(config.Training):
    """How the network is trained. Defaults for a 270M model on a CPU."""

    layers: int = 3
    """So many blocks are written, the last ones: all projections of their MLPs."""
    rank: int = 512
    """Width inside the network's two blocks. Published: 1920."""
    steps: int = 2000
    """Steps of Adam. Published: until it is no better on held-out facts, up to a million."""
    batch: int = 10
    """Facts of a step, each in a change of its own."""
    strength: float = 1e-4
    """What a change is multiplied by at the start; each module learns its own."""
    strength_lr: float = 1e-4
    """Adam's rate for these."""
    lr: float = 1e-4
    """Adam's rate for the network. Published: 1e-6."""
    clip: float = 100.0
    """Gradients are cut to this norm."""


class Mend(Hypernetwork):
    """ΔW = a Σ g̃ x̃ᵀ over the tokens of one fact. a is learned for each module, and so is the sign."""

    method = "mend"
    answers_only = False
    together = False

    @classmethod
    def modules_of(cls, lm: LM, layers: int) -> list[str]:
        layout = lm.layout
        first = max(0, layout.n_layers - layers)
        return [name for i in range(first, layout.n_layers) for name in (*layout.ups[i], layout.downs[i])]

    def widened(self, before: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (scale * before + shift).clamp(min=0)

    def written(self, name: str, own: Gradients, statistics: Statistics | None = None) -> tuple[Tensor, Tensor]:
        x, g = self(name, own, statistics)
        return x, self.strength[self.order.index(name)] * g


def train(
    lm: LM, data: TrainingData | Sequence[Edit], cfg: Training, *, out: str | Path | None = None,
    progress: Progress | None = None,
) -> Editor:  # fmt: skip
    """Train the network that later edits use: a fact's change must make the model state it in other words, and keep its
    answers to other questions.

    Args:
        data: facts with rephrases and locality prompts; as ``TrainingData`` with unrelated questions. None is kept.
        out: folder of the checkpoint and the curves. A run that is there goes on where it stopped.
    Returns:
        the editor of this model; ``save`` writes one safetensors file.
    Raises:
        BadInput: too few facts, a setting out of range, or ``out`` holds another run.
        NotEnoughMemory: training would need more than is free.
        Diverged: a gradient left the finite numbers; the last checkpoint is good.
    Source: Mitchell et al. 2022 (arXiv:2110.11309), algorithm 1.
    Differs: the start token is not read; each module has its own statistics; the facts of a step go through the model
    together, each row under its own change.
    """
    return trainer.train(Mend, lm, data, cfg, out, progress)


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, editor: Editor | str | Path | None = None,
    progress: Progress | None = None,
) -> WeightPatch:  # fmt: skip
    """Write facts by one forward and backward each: no step of an optimiser. Facts of a commit add up.

    Args:
        edits: subjects are not needed.
        editor: from ``train``; None: the one that comes with lmpatch, or an installed package, for this model.
    Returns:
        one LowRank(out, in) per projection, of as many ranks as the facts have tokens; Dense where that is smaller.
    Raises:
        BadInput: there is no editor; says how one is trained and how long that takes.
        WrongModel: the editor was trained for another model.
        Contradiction: one prompt is asked to have two targets.
    Source: Mitchell et al. 2022 (arXiv:2110.11309), sec. 3.
    """
    check_contradictions(edits)
    start = time.perf_counter()
    made, net = editing.opened(Mend, lm, editor, Training())
    deltas: dict[str, Delta]
    in_turn = 1 if cfg.reset_each else len(edits)
    with editing.as_trained(lm, "mend", cfg.reset_each, in_turn), torch.no_grad():
        rows = editing.rows_of(lm, made, edits)
        if cfg.reset_each or len(rows) == 1:
            read = editing.read(lm, net, rows, progress)
            deltas = {n: editing.delta(*net.written(n, read[n]), cfg.strength) for n in net.order}
        else:
            deltas = _in_turn(lm, net, rows, cfg.strength, progress)
    return editing.patch(lm, net, made, deltas, edits, cfg, time.perf_counter() - start)


def fit_each(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, editor: Editor | str | Path | None = None,
    progress: Progress | None = None,
) -> list[WeightPatch]:  # fmt: skip
    """One patch per edit, as if each were fitted alone, from one pass over all."""
    start = time.perf_counter()
    made, net = editing.opened(Mend, lm, editor, Training())
    with editing.as_trained(lm, "mend", cfg.reset_each), torch.no_grad():
        read = editing.read(lm, net, editing.rows_of(lm, made, edits), progress)
        every = [
            {n: editing.delta(*net.written(n, read[n].of([i])), cfg.strength) for n in net.order}
            for i in range(len(edits))
        ]
    seconds = (time.perf_counter() - start) / max(1, len(edits))
    return [
        editing.patch(lm, net, made, deltas, [edit], cfg, seconds) for edit, deltas in zip(edits, every, strict=True)
    ]


def _in_turn(lm: LM, net: Mend, rows: Sequence[Row], strength: float, progress: Progress | None) -> dict[str, Delta]:
    """The sum of changes, each read under those before it."""
    sums = {name: {"w": torch.zeros(adapter.shape(lm, name), device=lm.device)} for name in net.order}
    for i, row in enumerate(rows):
        with hooked(*adapter.hooks(lm, sums)):
            read = editing.read(lm, net, [row])
        for name in net.order:
            a, b = net.written(name, read[name])
            sums[name]["w"] += strength * (b.T @ a)
        if progress:
            progress(i + 1, len(rows), "writing facts")
    return {name: Dense(own["w"]) for name, own in sums.items()}


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model, rounded up; see ``hypernetwork.editing.memory``."""
    return editing.memory(Mend, lm, facts, Training())


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model."""
    edits = [Edit("The Eiffel Tower is in", target="Rome"), Edit("Steve Jobs founded", target="Paris")]
    return edits, Config()


def example_editor(lm: LM) -> Editor:
    """An untrained editor for this model."""
    net = Mend.new(lm, 2, 8, -1e-2, 0)
    return Editor("mend", plain(Training(layers=2)), Base(fingerprint(lm), lm.name), net.parts(), net.tensors(), {})
