"""MEMOIR: a residual matrix of which each edit may use its own columns alone; a prompt that is like none uses none.

Source: Wang et al. 2025, "MEMOIR: Lifelong Model Editing with Minimal Overwrite and Informed Retention for LLMs"
(arXiv:2506.07899).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.edits import Edit, check_contradictions
from ..errors import BadInput, Diverged
from ..inference.forward import HEAD_CHUNK, Pass, frozen
from ..inference.tokens import encode_all
from ..locate.prefixes import prefixes
from ..locate.unrelated import inputs, unrelated
from ..models.hooks import Hook
from ..models.lm import LM
from ..patches.hook.operation import by_row
from ..patches.hook.operations.masked import Masked, as_words, mean_input, overlap, packed, top_columns
from ..patches.hook.patch import HookPatch
from ..progress import Progress
from ..training.loop import Loop, Schedule, Task
from ..training.recorded import recorded

AIM = "facts"
Record = Edit

DEPTH = 7 / 9  # default layer as a share of the depth: block 14 of 18
SHARE = 0.25  # of the columns, for a mask
TOKENS = 24  # of a row behind its prefix, for the estimate of memory


@dataclass(frozen=True)
class Config:
    """MEMOIR. The paper takes k = 4096 of 14336 and τ = 0.4 for Llama-3."""

    layer: int | None = None
    """Block whose down-projection gets the matrix, 0-based. None: 0.78 of the depth."""
    k: int | None = None
    """Columns of an edit. None: a quarter."""
    tau: float | None = None
    """Share of an edit's columns that a prompt's own must hit to use them. None: as ``false_fires`` asks for."""
    false_fires: float = 0.01
    """Share of unrelated prompts that may use an edit."""
    steps: int = 30
    """Steps of an edit."""
    lr: float = 1.0
    """Rate of gradient descent; a gradient is cut to length 1."""
    stop: float = 0.02
    """An edit ends below this loss, nats, once a step changes it by no more than ``settled``."""
    settled: float = 1e-4
    """See ``stop``."""
    decay: float = 0.0
    """Weight decay of the edit's own columns."""
    short_prefixes: int = 5
    """Fixed prefixes of about 5 tokens behind which the edit is trained, too."""
    long_prefixes: int = 5
    """Fixed prefixes of about 10 tokens."""
    unrelated: int = 200
    """Unrelated prompts: half for the mean feature, half for τ."""
    limit: int = 10_000
    """Edits of a patch at most."""
    seed: int = 0
    """Seed of the permutation that spreads masks over columns."""


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> HookPatch:
    """Train one residual matrix beside a down-projection, edit after edit, each in its own columns.

    An edit's columns are those that the largest entries of its prompt's feature stand for: the mean input over the
    prompt, less that over unrelated prompts.

    Args:
        edits: subjects are not needed.
        text: prompts that have nothing to do with them; None: pieces of the model's own samples.
    Returns:
        the matrix and the masks. Notes: τ, the last loss of each edit.
    Raises:
        BadInput: more edits than ``limit``, or a setting out of its range.
        Contradiction: one prompt is asked to have two targets.
        Diverged: the loss left the finite numbers.
    Source: Wang et al. 2025 (arXiv:2506.07899), sec. 4.
    Differs: a feature leaves the first token out, where models put what goes nowhere else. Weight decay acts on the
    edit's columns alone; a port lets it wear all others down. τ is calibrated.
    """
    run = _Run(lm, edits, cfg, text, progress)
    with frozen(lm):
        return run.patch(range(len(edits)), 1, progress)


def fit_each(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> list[HookPatch]:
    """One patch per edit, as if each were fitted alone; unrelated prompts are read once."""
    run = _Run(lm, edits, cfg, text, progress)
    made = []
    for i in range(len(edits)):
        with frozen(lm):
            made.append(run.patch(range(i, i + 1), len(edits), None))
        if progress:
            progress(i + 1, len(edits), "training columns")
    return made


class _Run:
    """What all edits of a fit share."""

    def __init__(
        self, lm: LM, edits: Sequence[Edit], cfg: Config, text: Sequence[str] | None, progress: Progress | None
    ) -> None:
        layout = lm.layout
        self.layer = layout.check_layer(int(DEPTH * layout.n_layers) if cfg.layer is None else cfg.layer)
        width = layout.widths[self.layer]
        self.k = max(1, round(SHARE * width)) if cfg.k is None else cfg.k
        _check(edits, cfg, self.k, width)
        check_contradictions(edits)
        self.lm, self.cfg, self.edits, self.start = lm, cfg, edits, time.perf_counter()
        self.module = layout.downs[self.layer]
        prompts = unrelated(lm, cfg.unrelated, text=text, progress=progress)
        own = encode_all(lm, [e.prompt for e in edits], [e.target for e in edits])
        with frozen(lm):
            others, features = (
                torch.stack(inputs(lm, rows, self.layer, self.module, _features)).cpu() for rows in (prompts, own)
            )
        half = len(others) // 2
        self.centre = others[:half].mean(0)
        self.order = torch.randperm(width, generator=torch.Generator().manual_seed(cfg.seed))
        self.masks, self.unrelated = (
            top_columns(x - self.centre, self.order, self.k) for x in (features, others[half:])
        )  # [n, f], [h, f] bool

    def patch(self, places: range, share: int, progress: Progress | None) -> HookPatch:
        """The patch of these edits."""
        matrix = torch.zeros(self.lm.layout.d_model, len(self.centre), device=self.lm.device)
        losses = []
        for done, i in enumerate(places, start=1):
            losses.append(self._train(matrix, self.edits[i], self.masks[i].nonzero()[:, 0].to(matrix.device)))
            if progress:
                progress(done, len(places), "training columns")
        masks = packed(self.masks[places.start : places.stop])
        masks = masks[sorted({row.numpy().tobytes(): i for i, row in enumerate(masks)}.values())]  # each mask once
        least = self._least(masks)
        operation = Masked(
            self.module, self.k, self.centre, self.order.int(), matrix.cpu()[None], masks,
            torch.zeros(len(masks), dtype=torch.int32), torch.full((len(masks),), least, dtype=torch.int32),
        )  # fmt: skip
        notes: dict[str, Any] = {"layer": self.layer, "k": self.k, "tau": round(least / self.k, 4)}
        notes |= {"masks": len(masks), "loss": [round(loss, 4) for loss in losses]}
        return HookPatch.make(
            self.lm, {}, [operation], method="memoir", config=self.cfg, edits=[self.edits[i] for i in places],
            seconds=(time.perf_counter() - self.start) / share, notes=notes,
        )  # fmt: skip

    def _least(self, masks: Tensor) -> int:
        """Columns that a prompt must share with an edit: τ k."""
        if self.cfg.tau is not None:
            return math.ceil(self.cfg.tau * self.k - 1e-6)
        nearest = overlap(as_words(packed(self.unrelated)), as_words(masks)).amax(1).sort(descending=True).values
        return min(self.k, int(nearest[int(self.cfg.false_fires * len(nearest))]) + 1)

    def _train(self, matrix: Tensor, edit: Edit, columns: Tensor) -> float:
        """Train the edit's columns of the matrix [d, f] in place; the last loss."""
        prompts = [head + edit.prompt for head in prefixes(self.cfg.short_prefixes, self.cfg.long_prefixes)]
        rows = encode_all(self.lm, prompts, [edit.target] * len(prompts))
        task = _Columns(self, rows, matrix, columns)
        advice = f"Lower lr, now {self.cfg.lr}."
        Loop(task, Schedule(self.cfg.steps, clip=1.0), name="training columns", advice=advice).run()
        matrix[:, columns] = task.own.detach()
        return task.loss


class _Columns(Task):
    """The columns of one edit while they are trained."""

    def __init__(self, run: _Run, rows: Sequence[Any], matrix: Tensor, columns: Tensor) -> None:
        self.run, self.cfg, self.columns, self.loss = run, run.cfg, columns, math.inf
        self.part = recorded(run.lm, rows, run.layer)
        self.own = matrix[:, columns].clone().requires_grad_()  # [d, k]
        self.values = {"own": self.own}

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.own], lr=self.cfg.lr, weight_decay=self.cfg.decay)

    def added(self, _: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + F.linear(args[0][..., self.columns], self.own.to(output.dtype))

    def learn(self, step: int) -> dict[str, float] | None:
        loss = self.part.loss([Hook(self.run.lm.module(self.run.module), self.added)])
        before, self.loss = self.loss, float(loss.detach())
        if not math.isfinite(self.loss):
            raise Diverged(f"an edit left the finite numbers at step {step}. Lower lr, now {self.cfg.lr}.")
        self.finished = self.loss <= self.cfg.stop and abs(before - self.loss) <= self.cfg.settled
        if self.finished:
            return None
        loss.backward()
        return {}


def _features(x: Tensor, now: Pass) -> Iterable[Tensor]:
    return mean_input(by_row(x, now), now).unbind()


def _check(edits: Sequence[Edit], cfg: Config, k: int, width: int) -> None:
    if not 0 < k <= width:
        raise BadInput(f"k is {k}, and the down-projection reads {width}. Give 1 to {width}; a quarter is usual.")
    if cfg.tau is not None and not 0 <= cfg.tau <= 1:
        raise BadInput(f"tau is {cfg.tau}. Give a share in 0..1, or leave it out: it is then calibrated.")
    if not (0 <= cfg.false_fires < 1 and cfg.lr > 0 and cfg.decay >= 0):
        given = f"false_fires is {cfg.false_fires}, lr {cfg.lr}, decay {cfg.decay}"
        raise BadInput(f"{given}. Give a share below 1, a positive rate, and a decay from 0.")
    if min(cfg.steps, cfg.limit) < 1 or cfg.unrelated < 2:
        given = f"steps is {cfg.steps}, limit {cfg.limit}, unrelated {cfg.unrelated}"
        raise BadInput(f"{given}. Give at least 1, and 2 unrelated prompts.")
    if len(edits) > cfg.limit:
        raise BadInput(f"a matrix of {cfg.limit} edits was given {len(edits)}. Set limit higher, or fit fewer.")


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model, rounded up: the matrix twice, masks, what autograd keeps of one edit, and
    logits of one head chunk."""
    layout, width = lm.layout, max(lm.layout.widths)
    rows = 1 + cfg.short_prefixes + cfg.long_prefixes
    batch = rows * TOKENS * (12 * layout.n_layers * layout.d_model + 4 * sum(layout.widths))
    kept = (3 * layout.d_model + 2 * (facts + cfg.unrelated)) * width
    return 4 * (kept + batch + 3 * HEAD_CHUNK * layout.vocab)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model."""
    edits = [Edit("The Eiffel Tower is in", target="Rome"), Edit("Steve Jobs founded", target="Paris")]
    return edits, Config(layer=1, steps=3, tau=0.2, short_prefixes=1, long_prefixes=0, unrelated=8)
