"""One training loop: warm-up, clipping, checkpoints to go on from, curves, divergence, several processes.

Whatever is random in a task must depend on its seed and the step alone: a run that was stopped and goes on is then the
same run, to the bit.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import tensor_file
from ..distributed import world
from ..errors import BadInput, Diverged
from ..files import outside, replacing
from ..progress import Progress
from ..provenance import hash_json

FORM = 3  # of the checkpoint; one of another form is of another run


class Task:
    """What is trained, and how it learns. A method's own class fills this in; ``Loop`` runs it."""

    values: Mapping[str, Tensor]
    """Name -> tensor: all that training changes, leaves of autograd and buffers alike."""
    finished = False
    """Set by the task to end the run behind this step."""

    def optimiser(self, step: int) -> Optimizer:
        """The optimiser from this step on. Called at the first step of a sitting and at ``Schedule.renew``."""
        raise NotImplementedError

    def learn(self, step: int) -> Mapping[str, float] | None:
        """Leave the step's gradients in ``.grad``. With several processes: of all together (``World.mean``, ``sum``).

        Returns:
            losses for the curves, if they are at hand; None: the optimiser makes no step this time.
        """
        raise NotImplementedError

    def updated(self) -> None:
        """Called after the optimiser's step, with the gradients it took still there."""

    def validate(self, step: int) -> Mapping[str, float]:
        """What the curves say of the state behind that many steps."""
        return {}


@dataclass(frozen=True)
class Schedule:
    """When what happens. Steps are counted from 0."""

    steps: int
    rate: Callable[[int], float] = lambda _: 1.0
    """Share of each group's own rate at a step."""
    clip: float | None = None
    """Gradients are cut to this norm. None: they are taken as they are."""
    validate_every: int | None = None
    """Steps between validations; the last step has one too. None: none at all."""
    save_every: int | None = None
    """Steps between checkpoints. None: only when the run ends or is stopped."""
    renew: frozenset[int] = frozenset()
    """Steps before which the optimiser is made anew."""
    worse: float | None = None
    """Times the first validation loss, plus 1: from there a run counts as divergent, stops and goes back to its last
    good state. Validation is then of losses, and starts before the first step. None: a run ends with an error at the
    first gradient that is not finite."""


def linear(step: int, steps: int, warmup: int, final: float = 0.0) -> float:
    """Share of the rate: up in a line over the warm-up, down in a line to ``final`` at ``steps``."""
    warm = min(1.0, (step + 1) / max(1, warmup))
    return warm * (1 - (1 - final) * step / max(1, steps))


@dataclass(eq=False)
class Loop:
    """One run of a task.

    Raises:
        BadInput: the checkpoint is of another run, altered, or not the one that other processes see.
    """

    task: Task
    schedule: Schedule
    _: KW_ONLY
    name: str = "training"
    """For progress and messages."""
    file: Path | None = None
    """The checkpoint. One that is there is gone on from."""
    curves: Path | None = None
    """JSON lines, one for each validation."""
    stamp: str = ""
    """What identifies the run; a checkpoint of another one is refused."""
    advice: str = ""
    """What to do about divergence."""

    def __post_init__(self) -> None:
        self.world = world()
        self.step, self.seconds = 0, 0.0
        self.losses: dict[str, float] = {}  # smoothed
        self.curve: list[dict[str, Any]] = []
        """One point for each validation: ``step``, smoothed losses, what was validated, ``seconds``."""
        self.good: dict[str, Tensor] = {}
        self.stopped = ""
        """Why a divergent run ended early."""
        self.optimiser: Optimizer | None = None
        self._whole = True  # no step is half done
        self._moments: dict[str, dict[str, Tensor]] = {}  # of the checkpoint
        self.stamp = f"{self.stamp}/{self.name}/{FORM}"
        if self.file is None:
            return
        if found := os.path.lexists(self.file):
            self._resume(self.file)
        device = next(iter(self.task.values.values())).device
        own = torch.tensor([[self.step, int(hash_json(self.stamp)[:12], 16)]], device=device)
        if len(self.world.gathered(own, self.world.size).unique(dim=0)) > 1:
            raise BadInput(
                f"the processes see different checkpoints in {self.file.parent}. Give a folder that all of them share."
            )
        if not found:
            self.save()  # a folder that cannot be written is said before the first step

    def run(self, progress: Progress | None = None) -> None:
        """Train to the last step. An interrupt leaves a checkpoint of the last whole step.

        Raises:
            Diverged: the run left the finite numbers, or diverged before its first good state.
        """
        begun, plan = perf_counter() - self.seconds, self.schedule
        try:
            if self._due() and (not self.curve or self.curve[-1]["step"] < self.step):
                self._validate(begun)
            while self.step < plan.steps and not self.stopped and not self.task.finished:
                if self.optimiser is None or self.step in plan.renew:
                    self.optimiser = self._new_optimiser()
                self._update(self.optimiser)
                if self._due():
                    self._validate(begun)
                if plan.save_every and self.step % plan.save_every == 0:
                    self.seconds = perf_counter() - begun
                    self.save()
                if progress and self.world.is_main:
                    progress(self.step, plan.steps, self.name)
        finally:
            self.seconds = perf_counter() - begun
            if self._whole:
                self.save()
        if self.stopped:
            self._go_back()

    def _due(self) -> bool:
        """Whether the state as it is has a point on the curve."""
        plan = self.schedule
        if not plan.validate_every or (self.step == 0 and plan.worse is None):
            return False
        return self.step == plan.steps or self.step % plan.validate_every == 0

    def _new_optimiser(self) -> Optimizer:
        optimiser = self.task.optimiser(self.step)
        if self.step in self.schedule.renew:
            return optimiser  # a checkpoint here has the state of the one before
        trained = {id(parameter) for parameter in _trained(optimiser)}
        for name, parameter in self.task.values.items():
            if name in self._moments and id(parameter) in trained:
                moments = self._moments[name].items()
                optimiser.state[parameter] = {k: t if k == "step" else t.to(parameter.device) for k, t in moments}
        return optimiser

    def _update(self, optimiser: Optimizer) -> None:
        """One step of the optimiser."""
        plan, losses = self.schedule, self.task.learn(self.step)
        if losses is not None:
            if plan.clip is not None:
                norm = torch.nn.utils.clip_grad_norm_(_trained(optimiser), plan.clip)
                if plan.worse is None and not norm.isfinite():
                    raise Diverged(f"{self.name} left the finite numbers at step {self.step}. {self.advice}".rstrip())
            for group in optimiser.param_groups:
                group["lr"] = group.setdefault("rate", group["lr"]) * plan.rate(self.step)
        self._whole = False  # until the step is counted
        if losses is not None:
            optimiser.step()
            self.task.updated()
            self.losses = {k: 0.9 * self.losses.get(k, v) + 0.1 * v for k, v in losses.items()}
        self.step += 1
        self._whole = True
        for tensor in self.task.values.values():
            tensor.grad = None

    @torch.no_grad()  # as a decorator: an interrupt at the end of a with would leave it on
    def _validate(self, begun: float) -> None:
        """Add a point to the curve; where divergence is watched, keep the state if it is good, else stop."""
        values = dict(self.task.validate(self.step))
        losses = {name: round(value, 4) for name, value in self.losses.items()}
        point = {"step": self.step, **losses, **values, "seconds": round(perf_counter() - begun)}
        good = self.good if self.schedule.worse is None else self._judged(values, self.schedule.worse)
        self._whole = False  # until point and state are both kept
        self.curve.append(point)
        self.good = good
        self._whole = True

    def _judged(self, values: Mapping[str, float], worse: float) -> dict[str, Tensor]:
        """The last good state: this one, unless its loss is divergent."""
        total = sum(values.values())
        first = sum(self.curve[0][name] for name in values) if self.curve else total
        if math.isfinite(total) and total <= worse * first + 1:
            return {name: tensor.detach().clone() for name, tensor in self.task.values.items()}
        self.stopped = f"{self.name} diverged by step {self.step}: validation loss {total:.3g}, at first {first:.3g}"
        return self.good

    @torch.no_grad()
    def _go_back(self) -> None:
        """To the last good state."""
        last = [point["step"] for point in self.curve[:-1]]
        if not last or last[-1] == 0:
            raise Diverged(f"{self.stopped}. There is no earlier good state. {self.advice}".rstrip())
        for name, tensor in self.task.values.items():
            tensor.copy_(self.good[name])
        self.stopped += f"; kept is the state of step {last[-1]}"
        warnings.warn(f"{self.stopped}. {self.advice}".rstrip(), stacklevel=4)

    def save(self) -> None:
        """Write the checkpoint and the curves. A divergent state is not written.

        Raises:
            LmpatchError: they cannot be written; those before are whole.
        """
        if self.stopped or not self.world.is_main:
            return
        if self.file is not None:
            tensors = {f"value/{name}": tensor for name, tensor in self.task.values.items()}
            tensors |= {f"good/{name}": tensor for name, tensor in self.good.items()}
            for name, tensor in self.task.values.items():
                state = self.optimiser.state.get(tensor, {}) if self.optimiser else self._moments.get(name, {})
                tensors |= {f"moment/{key}/{name}": value for key, value in state.items()}
            state = json.dumps([self.step, self.seconds, self.losses, self.curve])
            tensor_file.write(self.file, {"stamp": self.stamp, "state": state}, tensors)
        if self.curves is not None and self.curve:
            with replacing(self.curves) as work:
                work.write_text("".join(json.dumps(point) + "\n" for point in self.curve), encoding="utf-8")

    @torch.no_grad()
    def _resume(self, file: Path) -> None:
        """Go on from the file; nothing is taken from one that does not fit."""
        try:
            head, tensors = tensor_file.read(file, BadInput)
            if head.get("stamp") != self.stamp:
                raise BadInput(f"{file} is of another run: other settings, data or model. Give another folder.")
            with outside(str(file)):
                self._take(head, tensors)
        except BadInput as error:
            raise BadInput(
                f"{error} Without the file training starts anew. (An earlier lmpatch wrote none with a hash.)"
            ) from error

    def _take(self, head: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
        values, good, moments = self.task.values, dict[str, Tensor](), dict[str, dict[str, Tensor]]()
        step, seconds, losses, curve = json.loads(head["state"])
        if not step >= max([0, *(point["step"] for point in curve)]):
            raise ValueError("its curve is longer than its training")
        for path, tensor in tensors.items():
            part, _, name = path.partition("/")
            key, _, name = name.partition("/") if part == "moment" else (part, "", name)
            if key != "step" and (tensor.shape, tensor.dtype) != (values[name].shape, values[name].dtype):
                raise ValueError(f"{path} does not fit what is trained")
            if part == "moment":
                moments.setdefault(name, {})[key] = tensor
            elif part == "good":
                good[name] = tensor.to(values[name].device)
        new = {name: tensors[f"value/{name}"] for name in values}
        for name, tensor in new.items():
            values[name].copy_(tensor)
        self.step, self.seconds, self.losses, self.curve = step, float(seconds), losses, curve
        self.good, self._moments = good, moments


def _trained(optimiser: Optimizer) -> Sequence[Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]
