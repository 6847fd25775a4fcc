"""FT: gradient descent on one weight, plain, norm-limited, or as a LoRA. The baseline every editor must beat.

"FT" in papers means different losses and limits; the settings are stored with the patch, so a table can say which.

Each epoch goes through all facts. With ``end="eos"`` that is LocFT-BF (arXiv:2509.22072), whose default layer, rate and
epochs these are; its mini-batches are of 100 facts. Fitting fact after fact, each on top of the last, is what it finds
to be the reason why fine-tuning was called a weak editor.

Source: Zhu et al. 2020, "Modifying Memories in Transformer Models" (arXiv:2012.00363).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from ..data.edits import Edit, check_contradictions
from ..errors import BadInput, Diverged
from ..inference.forward import HEAD_CHUNK, frozen, nll
from ..inference.replay import Recording, record
from ..inference.tokens import End, Row, batches_of_rows, encode_all, ended
from ..models.hooks import hooked
from ..models.lm import LM
from ..patches.weight.patch import WeightPatch
from ..progress import Progress
from ..training import adapter
from ..training.loop import Loop, Schedule, Task

TOKENS = 32  # of a long fact, for the estimate of memory
SKIP = 1e-2  # nats; a batch below this makes no step, an epoch below this ends the run

AIM = "facts"
Record = Edit


@dataclass(frozen=True)
class Config:
    """Fine-tuning on the facts. The default is FT-M; ``limit`` makes FT-L, ``rank`` a LoRA."""

    layer: int | None = None
    """Block whose down-projection is trained, 0-based. None: two thirds of the depth."""
    loss: Literal["target", "prompt_last"] = "target"
    """``target``: cross-entropy of the target tokens (FT-M). ``prompt_last``: all target tokens scored on the one
    distribution after the prompt, as some released code does; wrong for targets of several tokens."""
    end: End | None = None
    """What is trained behind the target, so that an answer ends with it. ``answer``: a new line, or of a chat model the
    end of its turn. ``eos``: the end-of-sequence token."""
    epochs: int = 25
    """Passes over the facts at most."""
    lr: float = 5e-4
    """Adam's rate."""
    batch: int = 16
    """Facts per step."""
    limit: float | None = None
    """FT-L: no entry of the weight moves further than this, for example 2e-3. None: no limit."""
    rank: int | None = None
    """Train B A of this rank on every linear projection of every block instead of one full weight. None: off."""
    seed: int = 0
    """Seed of the order of facts and of A."""


def fit(lm: LM, edits: Sequence[Edit], cfg: Config, *, progress: Progress | None = None) -> WeightPatch:
    """Train a weight change until the model states the facts.

    The model itself is not written: the change acts as a hook on the projection's output, and what no change
    can reach (everything below the trained block) runs once.

    Args:
        edits: subjects are not needed.
    Returns:
        one Dense(out, in), or with ``rank`` one LowRank per projection.
    Raises:
        BadInput: both ``limit`` and ``rank``, or ``end`` with ``prompt_last``.
        Contradiction: one prompt is asked to have two targets.
        Diverged: the loss left the finite numbers.
    Source: Zhu et al. 2020 (arXiv:2012.00363) for ``limit``; Hu et al. 2021 (arXiv:2106.09685) for ``rank``.
    """
    if cfg.batch < 1 or (cfg.limit or 0) < 0:
        raise BadInput(f"batch is {cfg.batch} and limit {cfg.limit}. Give a batch from 1 and no limit below 0.")
    if cfg.limit is not None and cfg.rank is not None:
        raise BadInput("limit holds for a full weight and rank for a LoRA. Set one of them.")
    if cfg.end and cfg.loss == "prompt_last":
        raise BadInput("prompt_last scores all tokens at one place, where none ends. Leave end out.")
    check_contradictions(edits)
    start = time.perf_counter()
    with frozen(lm):
        task = _Tuning(lm, edits, cfg)
        steps = cfg.epochs * len(task.batches)
        Loop(task, Schedule(steps), name="fine-tuning", advice=f"Lower lr, now {cfg.lr}.").run(progress)
    notes = {"epochs": task.epoch, "loss": round(task.mean, 5), "layer": task.lowest}
    seconds = time.perf_counter() - start
    deltas = adapter.deltas(lm, task.factors)
    return WeightPatch.make(lm, deltas, method="finetune", config=cfg, edits=edits, seconds=seconds, notes=notes)


class _Tuning(Task):
    """ΔW on one down-projection, or with ``rank`` B A on every linear projection of every block."""

    def __init__(self, lm: LM, edits: Sequence[Edit], cfg: Config) -> None:
        self.lm, self.cfg, layout = lm, cfg, lm.layout
        self.factors: dict[str, dict[str, Tensor]]
        if cfg.rank:
            self.lowest = 0
            self.factors = adapter.low_rank(lm, chain(*adapter.projections(lm)), cfg.rank, cfg.seed)
        else:
            self.lowest = layout.check_layer(round(layout.n_layers * 2 / 3) if cfg.layer is None else cfg.layer)
            module = layout.downs[self.lowest]
            whole = torch.zeros(adapter.shape(lm, module), device=lm.device, requires_grad=True)
            self.factors = {module: {"w": whole}}
        self.values = {f"{module}.{k}": x for module, own in self.factors.items() for k, x in own.items()}
        rows = ended(lm, encode_all(lm, [e.prompt for e in edits], [e.target for e in edits]), cfg.end)
        parts = batches_of_rows([len(row.ids) for row in rows], cfg.batch)
        self.batches = [_Batch(lm, [rows[i] for i in part], self.lowest, cfg) for part in parts]
        self.generator = torch.Generator().manual_seed(cfg.seed)
        self.order: list[int] = []  # of the epoch's batches
        self.losses: list[float] = []  # of the epoch so far
        self.epoch, self.mean = 0, 0.0

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        return torch.optim.Adam(list(self.values.values()), lr=self.cfg.lr)

    def learn(self, step: int) -> dict[str, float] | None:
        """The next batch of the epoch. One that is learned already makes no step; an epoch of such ends the run."""
        epoch, place = divmod(step, len(self.batches))
        if place == 0:
            self.order, self.losses = torch.randperm(len(self.batches), generator=self.generator).tolist(), []
        loss = self.batches[self.order[place]].loss(self.lm, self.factors)
        self.losses.append(float(loss.detach()))
        if self.losses[-1] != self.losses[-1]:
            raise Diverged(f"fine-tuning left the finite numbers in epoch {epoch + 1}. Lower lr, now {self.cfg.lr}.")
        if place + 1 == len(self.batches):
            self.epoch, self.mean = epoch + 1, sum(self.losses) / len(self.losses)
            self.finished = self.mean < SKIP
        if self.losses[-1] < SKIP:
            return None
        loss.backward()
        return {}

    @torch.no_grad()
    def updated(self) -> None:
        """FT-L: no entry goes further than the limit."""
        if self.cfg.limit is not None:
            for value in self.values.values():
                value.clamp_(-self.cfg.limit, self.cfg.limit)


class _Batch:
    """Rows recorded once below the trained block, with the positions that are scored."""

    def __init__(self, lm: LM, rows: list[Row], lowest: int, cfg: Config) -> None:
        last = cfg.loss == "prompt_last"
        ids = [row.ids[: row.target] if last else row.ids[:-1] for row in rows]
        spots = [
            (i, row.target - 1 if last else t - 1, row.ids[t], 1 / (len(row.ids) - row.target) / len(rows))
            for i, row in enumerate(rows)
            for t in range(row.target, len(row.ids))
        ]
        self.row, self.column, self.label = (
            torch.tensor(c, device=lm.device) for c in list(zip(*spots, strict=True))[:3]
        )
        self.weight = torch.tensor([s[3] for s in spots], device=lm.device)
        ends = [row.target - 1 for row in rows]
        recording = record(lm, ids, [0] * len(ids), ends=ends, lowest=lowest)
        self.hidden = recording.hidden[lowest]  # the states above it are computed again at each step
        self.recording: Recording = recording.bare()
        self.lowest = lowest

    def loss(self, lm: LM, factors: Mapping[str, adapter.Factors]) -> Tensor:
        """Mean over facts of the mean over target tokens, nats."""
        with torch.enable_grad(), hooked(*adapter.hooks(lm, factors)):
            out = self.recording.forward(self.hidden, self.lowest)
            return (nll(lm, out[self.row, self.column], self.label) * self.weight).sum()


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model, rounded up: the change with Adam's two moments, recorded states of all
    facts, what autograd keeps of one batch, and logits of one head chunk."""
    layout = lm.layout
    change = 14 * cfg.rank * sum(layout.widths) if cfg.rank else layout.d_model * max(layout.widths)
    states = facts * TOKENS * 4 * layout.d_model  # what enters the trained block, and rotary tables
    batch = min(cfg.batch, facts) * TOKENS * (12 * layout.n_layers * layout.d_model + 4 * sum(layout.widths))
    return 4 * (5 * change + states + batch + 3 * HEAD_CHUNK * layout.vocab)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model."""
    edits = [Edit("The Eiffel Tower is in", target="Rome"), Edit("Steve Jobs founded", target="Paris")]
    return edits, Config(layer=1, epochs=2)
