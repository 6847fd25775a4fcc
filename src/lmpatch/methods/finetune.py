"""FT: gradient descent on one weight, plain, norm-limited, or as a LoRA. The baseline every editor must beat.

"FT" in papers means different losses and limits; the settings are stored with the patch, so a table can say which.

Source: Zhu et al. 2020, "Modifying Memories in Transformer Models" (arXiv:2012.00363).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.edits import Edit, check_contradictions
from ..errors import BadInput, Diverged
from ..inference.forward import HEAD_CHUNK, frozen, nll
from ..inference.replay import Recording, record
from ..inference.tokens import Row, batches_of_rows, encode_all
from ..models.hooks import Hook, hooked
from ..models.lm import LM
from ..patches.weight.delta import Delta, Dense, LowRank
from ..patches.weight.patch import WeightPatch
from ..progress import Progress

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
        BadInput: both ``limit`` and ``rank``.
        Contradiction: one prompt is asked to have two targets.
        Diverged: the loss left the finite numbers.
    Source: Zhu et al. 2020 (arXiv:2012.00363) for ``limit``; Hu et al. 2021 (arXiv:2106.09685) for ``rank``.
    """
    if cfg.limit is not None and cfg.rank is not None:
        raise BadInput("limit holds for a full weight and rank for a LoRA. Set one of them.")
    check_contradictions(edits)
    start = time.perf_counter()
    with frozen(lm):
        change = _LoRA(lm, cfg) if cfg.rank else _Full(lm, cfg)
        epochs, loss = _train(lm, edits, change, cfg, progress)
    notes = {"epochs": epochs, "loss": round(loss, 5), "layer": change.lowest}
    seconds = time.perf_counter() - start
    return WeightPatch.make(
        lm, change.deltas(), method="finetune", config=cfg, edits=edits, seconds=seconds, notes=notes
    )


class _Full:
    """ΔW on one down-projection."""

    def __init__(self, lm: LM, cfg: Config) -> None:
        layout = lm.layout
        self.lowest = layout.check_layer(round(layout.n_layers * 2 / 3) if cfg.layer is None else cfg.layer)
        self.module = layout.downs[self.lowest]
        self.name, self.limit = layout.weight(self.module), cfg.limit
        self.value = torch.zeros(layout.d_model, layout.widths[self.lowest], device=lm.device, requires_grad=True)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.value]

    def hooks(self, lm: LM) -> list[Hook]:
        def add(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + F.linear(args[0], self.value.to(args[0].dtype))

        return [Hook(lm.module(self.module), add)]

    @torch.no_grad()
    def project(self) -> None:
        if self.limit is not None:
            self.value.clamp_(-self.limit, self.limit)

    def deltas(self) -> dict[str, Delta]:
        return {self.name: Dense(self.value.detach())}


class _LoRA:
    """B A on every linear projection of every block; B starts at zero."""

    lowest = 0

    def __init__(self, lm: LM, cfg: Config) -> None:
        layout = lm.layout
        assert cfg.rank
        generator = torch.Generator().manual_seed(cfg.seed)
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}
        for i in range(layout.n_layers):
            for name in (*layout.attn_ins[i], layout.attn_outs[i], *layout.ups[i], layout.downs[i]):
                shape = lm.parameter(layout.weight(name)).shape
                out, width = shape[::-1] if layout.transposed else shape
                a = torch.randn(cfg.rank, width, generator=generator) / width**0.5
                b = torch.zeros(out, cfg.rank)
                self.parts[name] = (b.to(lm.device).requires_grad_(), a.to(lm.device).requires_grad_())
        self.names = {name: layout.weight(name) for name in self.parts}

    @property
    def leaves(self) -> list[Tensor]:
        return [x for pair in self.parts.values() for x in pair]

    def hooks(self, lm: LM) -> list[Hook]:
        def adder(b: Tensor, a: Tensor) -> Callable[..., Tensor]:
            def add(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                x = args[0]
                return output + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

            return add

        return [Hook(lm.module(name), adder(*pair)) for name, pair in self.parts.items()]

    def project(self) -> None:
        return None

    def deltas(self) -> dict[str, Delta]:
        return {self.names[name]: LowRank(b.detach(), a.detach()) for name, (b, a) in self.parts.items()}


def _train(
    lm: LM, edits: Sequence[Edit], change: _Full | _LoRA, cfg: Config, progress: Progress | None
) -> tuple[int, float]:
    """Epochs made and the last epoch's mean loss, nats per target token."""
    rows = encode_all(lm, [e.prompt for e in edits], [e.target for e in edits])
    parts = batches_of_rows([len(row.ids) for row in rows], cfg.batch)
    batches = [_Batch(lm, [rows[i] for i in part], change, cfg) for part in parts]
    optimizer = torch.optim.Adam(change.leaves, lr=cfg.lr)
    generator = torch.Generator().manual_seed(cfg.seed)
    mean = 0.0
    for epoch in range(1, cfg.epochs + 1):
        losses = []
        for i in torch.randperm(len(batches), generator=generator).tolist():
            loss = batches[i].loss(lm, change)
            losses.append(float(loss.detach()))
            if losses[-1] != losses[-1]:
                raise Diverged(f"fine-tuning left the finite numbers in epoch {epoch}. Lower lr, now {cfg.lr}.")
            if losses[-1] < SKIP:
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            change.project()
        mean = sum(losses) / len(losses)
        if progress:
            progress(epoch, cfg.epochs, "fine-tuning")
        if mean < SKIP:
            return epoch, mean
    return cfg.epochs, mean


class _Batch:
    """Rows recorded once below the trained block, with the positions that are scored."""

    def __init__(self, lm: LM, rows: list[Row], change: _Full | _LoRA, cfg: Config) -> None:
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
        self.recording: Recording = record(
            lm, ids, [0] * len(ids), ends=[row.target - 1 for row in rows], lowest=change.lowest
        )
        self.lowest = change.lowest

    def loss(self, lm: LM, change: _Full | _LoRA) -> Tensor:
        """Mean over facts of the mean over target tokens, nats."""
        with torch.enable_grad(), hooked(*change.hooks(lm)):
            out = self.recording.forward(self.recording.hidden[self.lowest], self.lowest)
            return (nll(lm, out[self.row, self.column], self.label) * self.weight).sum()


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model, rounded up: the change with Adam's two moments, recorded states of all
    facts, what autograd keeps of one batch, and logits of one head chunk."""
    layout = lm.layout
    change = 14 * cfg.rank * sum(layout.widths) if cfg.rank else layout.d_model * max(layout.widths)
    states = facts * TOKENS * layout.n_layers * 3 * layout.d_model
    batch = min(cfg.batch, facts) * TOKENS * (12 * layout.n_layers * layout.d_model + 4 * sum(layout.widths))
    return 4 * (5 * change + states + batch + 3 * HEAD_CHUNK * layout.vocab)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model."""
    edits = [Edit("The Eiffel Tower is in", target="Rome"), Edit("Steve Jobs founded", target="Paris")]
    return edits, Config(layer=1, epochs=2)
