"""The training loop: a run that was stopped is the run that was not, steps are what the optimiser makes by hand."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from snapshot import Lines, name
from torch import Tensor

from lmpatch import tensor_file
from lmpatch.errors import BadInput, Diverged, LmpatchError
from lmpatch.training.loop import Loop, Schedule, Task, linear

TARGET = torch.tensor([1.0, -2.0, 3.0])


class Fit(Task):
    """A vector that learns another one; each step draws its own noise."""

    def __init__(self, spoil: int | None = None) -> None:
        self.x = torch.zeros(3, requires_grad=True)
        self.values = {"x": self.x}
        self.spoil, self.made = spoil, list[int]()

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        self.made.append(step)
        return torch.optim.AdamW([{"params": [self.x], "lr": 0.1}], weight_decay=0.0)

    def learn(self, step: int) -> dict[str, float]:
        noise = torch.randn(3, generator=torch.Generator().manual_seed(step))
        loss = (self.x - TARGET + 0.1 * noise).square().sum() * (float("nan") if step == self.spoil else 1.0)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": float(loss.detach())}

    def validate(self, step: int) -> dict[str, float]:
        return {"distance": float((self.x - TARGET).norm())}


def run(task: Task, schedule: Schedule, out: Path | None = None, stop: int | None = None, stamp: str = "a") -> Loop:
    def progress(done: int, total: int, what: str) -> None:
        if done == stop:
            raise KeyboardInterrupt

    file, curves = (out / name if out else None for name in ("run.safetensors", "run.jsonl"))
    loop = Loop(task, schedule, file=file, curves=curves, stamp=stamp, advice="Lower lr.")
    loop.run(progress)
    return loop


PLAN = Schedule(12, rate=lambda step: linear(step, 12, 3), clip=1.0, validate_every=4, save_every=5)


def test_steps_are_those_of_the_optimiser_by_hand() -> None:
    task, x = Fit(), torch.zeros(3, requires_grad=True)
    run(task, PLAN)
    adam = torch.optim.AdamW([x], weight_decay=0.0)
    for step in range(12):
        noise = torch.randn(3, generator=torch.Generator().manual_seed(step))
        (x - TARGET + 0.1 * noise).square().sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([x], 1.0)
        adam.param_groups[0]["lr"] = 0.1 * min(1.0, (step + 1) / 3) * (1 - step / 12)
        adam.step()
        adam.zero_grad()
    assert torch.allclose(task.x, x, atol=1e-7) and task.x.grad is None


@pytest.mark.parametrize("stop", [1, 4, 6, 12])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits_and_curve(stop: int, tmp_path: Path) -> None:
    whole = Fit()
    loop = run(whole, PLAN, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Fit(), PLAN, tmp_path / "cut", stop)
    resumed = Fit()
    again = run(resumed, PLAN, tmp_path / "cut")
    assert torch.equal(resumed.x, whole.x)
    assert [{**point, "seconds": 0} for point in again.curve] == [{**point, "seconds": 0} for point in loop.curve]
    lines = [json.loads(line) for line in (tmp_path / "cut" / "run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12] and lines[-1]["distance"] < lines[0]["distance"]


def test_an_optimiser_made_anew_at_a_step_is_also_new_after_a_stop_there(tmp_path: Path) -> None:
    plan = Schedule(10, renew=frozenset({5}))
    whole, first, second = Fit(), Fit(), Fit()
    run(whole, plan)
    with pytest.raises(KeyboardInterrupt):
        run(first, plan, tmp_path, stop=5)
    run(second, plan, tmp_path)
    assert (whole.made, first.made, second.made) == ([0, 5], [0], [5])
    assert torch.equal(second.x, whole.x)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(Fit(), PLAN, tmp_path)
    with pytest.raises(BadInput, match="another run"):
        run(Fit(), PLAN, tmp_path, stamp="b")


def refusal(out: Path) -> str:
    """What going on from the damaged checkpoint says; the task that was given stays as it was."""
    task = Fit()
    with pytest.raises(BadInput) as caught:
        run(task, PLAN, out)
    assert not task.x.any() and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_damaged_checkpoint_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    run(Fit(), PLAN, tmp_path)
    file = tmp_path / "run.safetensors"
    whole = file.read_bytes()
    head, tensors = tensor_file.read(file)
    hostile = [whole[:n] for n in (0, 7, 8, 100, len(whole) // 2, len(whole) - 4)]
    hostile += [
        whole + b"x",
        b"\xff" * 8 + whole[8:],
        pickle.dumps({"x": 1}),
        b"version https://git-lfs.github.com/spec/v1",
    ]
    hostile += [save({"x": torch.zeros(1)}), save(tensors, {key: value for key, value in head.items()})]  # no hash
    for data in hostile:
        file.write_bytes(data)
        assert re.search("run.safetensors.*Remove it|run.safetensors.*Without the file", refusal(tmp_path))


@pytest.mark.slow
def test_no_bit_of_a_checkpoint_can_be_another_one(tmp_path: Path) -> None:
    run(Fit(), PLAN, tmp_path)
    file = tmp_path / "run.safetensors"
    whole = file.read_bytes()
    places = random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        data[places.randrange(len(data))] ^= 1 << places.randrange(8)
        file.write_bytes(data)
        refusal(tmp_path)


def test_what_is_no_file_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.safetensors")
    assert "no ordinary file" in refusal(tmp_path)
    (tmp_path / "run.safetensors").unlink()
    (tmp_path / "run.safetensors").mkdir()
    assert "no ordinary file" in refusal(tmp_path)
    (tmp_path / "run.safetensors").rmdir()
    (tmp_path / "run.safetensors").symlink_to(tmp_path / "lost")  # not the same as no checkpoint at all
    assert "no such file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "forged",
    [
        lambda head, tensors: tensors.pop("value/x"),
        lambda head, tensors: tensors.update({"value/x": torch.ones(1)}),
        lambda head, tensors: tensors.update({"value/x": torch.ones(3, dtype=torch.float64)}),
        lambda head, tensors: tensors.update({"value/y": torch.ones(3)}),
        lambda head, tensors: tensors.update({"good/x": torch.ones(1)}),
        lambda head, tensors: tensors.update({"moment/exp_avg/x": torch.ones(1)}),
        lambda head, tensors: tensors.update({"moment/exp_avg/y": torch.ones(3)}),
        lambda head, tensors: tensors.update({"other": torch.ones(3)}),
        lambda head, tensors: head.pop("state"),
        lambda head, tensors: head.update(state="[1, 2]"),
        lambda head, tensors: head.update(state="[" * 9000),
        lambda head, tensors: head.update(state='["1", 0.0, {}, []]'),
        lambda head, tensors: head.update(state="[-1, 0.0, {}, []]"),
        lambda head, tensors: head.update(state="[1, 0.0, {}, [5]]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_task_is_refused_before_anything_is_taken(
    forged: Callable[[dict[str, str], dict[str, Tensor]], object], tmp_path: Path
) -> None:
    run(Fit(), PLAN, tmp_path)
    head, tensors = tensor_file.read(tmp_path / "run.safetensors")
    forged(head, tensors)
    tensor_file.write(tmp_path / "run.safetensors", head, tensors)
    assert "Without the file" in refusal(tmp_path)


def test_a_folder_that_cannot_be_written_is_said_before_the_first_step(tmp_path: Path) -> None:
    class Never(Fit):
        def learn(self, step: int) -> dict[str, float]:
            raise AssertionError("a step was made")

    (tmp_path / "plain").write_text("")
    for out in (tmp_path / "plain", tmp_path / ("a" * 300), Path("/proc/nothing")):
        with pytest.raises(LmpatchError, match="cannot be written"):
            run(Never(), PLAN, out)


@pytest.mark.slow
def test_an_interrupt_at_any_line_goes_on_to_the_same_bits_and_curve(tmp_path: Path) -> None:
    plan = Schedule(4, rate=lambda step: linear(step, 4, 2), clip=1.0, validate_every=2, save_every=1, worse=2.0)
    whole = Fit()
    curve = [{**point, "seconds": 0} for point in run(whole, plan).curve]
    folders = (tmp_path / str(n) for n in count())
    lines = Lines(lambda: run(Fit(), plan, next(folders)))
    for line, times in lines.times.items():
        for time in {1, times}:
            out = tmp_path / f"{line[0].co_name} {line[1]} {time}"
            lines.run = partial(run, Fit(), plan, out)
            assert lines.interrupted(line, time)
            task = Fit()
            again = run(task, plan, out)
            assert torch.equal(task.x, whole.x), name(line)
            assert [{**point, "seconds": 0} for point in again.curve] == curve, name(line)
            written = [json.loads(text) for text in (out / "run.jsonl").read_text().splitlines()]
            assert [{**point, "seconds": 0} for point in written] == curve, name(line)


def test_a_gradient_that_is_not_finite_ends_the_run_and_the_checkpoint_is_of_the_step_before(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"left the finite numbers at step 7. Lower lr"):
        run(Fit(spoil=7), PLAN, tmp_path)
    whole, resumed = Fit(), Fit()
    run(whole, PLAN)
    run(resumed, PLAN, tmp_path)
    assert torch.equal(resumed.x, whole.x)


def test_where_divergence_is_watched_the_last_good_state_is_kept() -> None:
    plan, good, task = Schedule(12, clip=1.0, validate_every=4, worse=2.0), Fit(), Fit(spoil=9)
    run(good, Schedule(8, clip=1.0))
    with pytest.warns(UserWarning, match=r"diverged by step 12.*kept is the state of step 8. Lower lr"):
        loop = run(task, plan)
    assert torch.equal(task.x, good.x)
    assert [point["step"] for point in loop.curve] == [0, 4, 8, 12] and loop.stopped
    with pytest.raises(Diverged, match="no earlier good state"):
        run(Fit(spoil=1), plan)


def test_a_task_may_end_the_run_and_may_leave_a_step_out() -> None:
    class Short(Fit):
        def learn(self, step: int) -> dict[str, float] | None:  # type: ignore[override]
            super().learn(step)
            self.finished = step == 6
            return None if step % 2 else {}

    class Even(Fit):
        def learn(self, step: int) -> dict[str, float]:
            return super().learn(2 * step)

    short, even = Short(), Even()
    assert run(short, Schedule(12)).step == 7
    run(even, Schedule(4))
    assert torch.equal(short.x, even.x)


def test_the_rate_rises_then_falls_in_a_line() -> None:
    assert [round(linear(step, 10, 4, 0.5), 3) for step in (0, 1, 4, 9)] == [0.25, 0.475, 0.8, 0.55]
    assert linear(3, 10, 0, 1.0) == 1.0


def test_values_reach_the_file_and_come_back(tmp_path: Path) -> None:
    class Two(Fit):
        def __init__(self) -> None:
            super().__init__()
            self.buffer = torch.zeros(1)
            self.values: dict[str, Tensor] = {"x": self.x, "buffer": self.buffer}

        def updated(self) -> None:
            assert self.x.grad is not None
            self.buffer += 1

    run(Two(), Schedule(3), tmp_path)
    task = Two()
    assert run(task, Schedule(3), tmp_path).step == 3 and float(task.buffer) == 3
