"""Facts in, editor out; and how long that takes on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter

import torch

from ...data.edits import Ask, Edit
from ...errors import BadInput
from ...inference.forward import HEAD_CHUNK, attention_to_train, frozen
from ...models.lm import LM
from ...patches.base import Base, fingerprint
from ...patches.editor import Editor
from ...patches.ledger import suspended
from ...patches.patch import plain
from ...progress import Progress
from ...provenance import hash_json, made_now
from ...resources import require_memory
from ...training import adapter
from ...training.facts import Split, TrainingData, usable, without
from ...training.loop import Loop, Schedule
from .config import Training, check
from .network import Hypernetwork
from .task import BATCH_TOKENS, MOST, Meta

TOKENS = 24  # of a row, for the estimate of memory


def train(
    form: type[Hypernetwork], lm: LM, data: TrainingData | Sequence[Edit], cfg: Training, out: str | Path | None,
    progress: Progress | None,
) -> Editor:  # fmt: skip
    """Train the network of a method for a model, whose patches are off meanwhile. See the methods' ``train``."""
    check(cfg)
    data = data if isinstance(data, TrainingData) else TrainingData(data)
    edits = usable(without(data.edits, ()), data.unrelated)
    unrelated = [ask for ask in data.unrelated if ask.answers]
    split = Split.of(edits, unrelated, cfg.validate, cfg.seed, cfg.batch)
    rows = (2 + 2 * MOST) * len(edits) + len(unrelated)
    require_memory(_memory(form, lm, rows, cfg), lm.device, f"training {form.method} on {len(edits)} facts")
    stamp = [asdict(cfg), [asdict(e) for e in edits], [asdict(ask) for ask in unrelated], lm.fingerprint()]
    folder = Path(out) if out is not None else None
    file, curves = (folder / f"{form.method}{end}" if folder else None for end in (".safetensors", ".jsonl"))
    with suspended(lm), frozen(lm), attention_to_train(lm):
        task = _task(form, lm, split, cfg, progress)
        schedule = Schedule(
            cfg.steps, rate=task.rate, clip=cfg.clip, validate_every=cfg.validate_every, save_every=cfg.save_every
        )
        advice = f"Lower lr, now {cfg.lr}, or strength_lr, now {cfg.strength_lr}."
        loop = Loop(
            task, schedule, name=form.method, file=file, curves=curves, stamp=hash_json([stamp, str(lm.dtype)]),
            advice=advice,
        )  # fmt: skip
        loop.run(progress)
    lm_dtype = str(lm.dtype).removeprefix("torch.")
    made = {"steps": loop.step, "facts": len(split.edits), "lm_dtype": lm_dtype, **made_now(loop.seconds)}
    base = Base(fingerprint(lm), lm.name)
    return Editor(form.method, plain(cfg), base, task.net.parts(), task.net.tensors(), made)


def _task(form: type[Hypernetwork], lm: LM, split: Split, cfg: Training, progress: Progress | None) -> Meta:
    """The run before its first step."""
    net = form.new(lm, cfg.layers, cfg.rank, cfg.strength, cfg.seed).to(lm.device)
    task = Meta(lm, net, split, cfg, progress)
    net.begin(task.gradients(task.samples(0)))
    return task


def seconds_of(form: type[Hypernetwork], lm: LM, cfg: Training) -> float:
    """About how long this training takes here, from one of its steps on a made-up fact."""
    other = {"same_relation": [Ask("The Louvre is in", ("Paris",))]}
    fact = Edit("The Eiffel Tower is in", "Rome", rephrases=["You find the Eiffel Tower in"], locality=other)
    with suspended(lm), frozen(lm), attention_to_train(lm):
        task = _task(form, lm, Split([fact] * cfg.batch, [], ()), replace(cfg, end=None), None)
        start = perf_counter()
        task.learn(0)
        return (perf_counter() - start) * cfg.steps


def _memory(form: type[Hypernetwork], lm: LM, rows: int, cfg: Training) -> int:
    """Bytes a training takes on top of the model, rounded up: states of all rows, the network with Adam's moments and
    gradients, factors with theirs, what autograd keeps of a batch, and logits of head chunks."""
    layout = lm.layout
    with torch.device("meta"):
        net = form({name: adapter.shape(lm, name)[::-1] for name in form.modules_of(lm, cfg.layers)}, cfg.rank)
    size = sum(p.numel() for p in net.parameters())
    factors = cfg.batch * TOKENS * sum(sum(size) for size in net.sizes.values())
    batch = BATCH_TOKENS * cfg.layers * (12 * layout.d_model + 4 * max(layout.widths))
    states = rows * TOKENS * layout.d_model
    return 4 * (5 * size + 8 * factors + batch + states + 3 * HEAD_CHUNK * layout.vocab)


def how_to(form: type[Hypernetwork], lm: LM, cfg: Training, error: BadInput) -> BadInput:
    """The error of a missing editor, with how long it takes to train one."""
    minutes = seconds_of(form, lm, cfg) / 60
    long = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
    return BadInput(
        f"{error} Its {cfg.steps} steps take about {long} on this machine, after one pass over the facts; "
        "fewer: --set steps=."
    )
