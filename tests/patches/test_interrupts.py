"""A Ctrl-C at any line of lmpatch while a patch goes on or comes off leaves the model with all of it or nothing."""

from __future__ import annotations

import inspect
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from snapshot import Lines, name
from tiny import tiny_model, tiny_tokenizer
from torch import nn

import lmpatch
from lmpatch.benches.facts import Config
from lmpatch.benches.facts import run as facts_run
from lmpatch.data.edits import Edit
from lmpatch.inference.interventions import Intervention
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap
from lmpatch.patches.base import Base
from lmpatch.patches.decode.patch import DecodePatch
from lmpatch.patches.decode.rules import Power
from lmpatch.patches.export import export
from lmpatch.patches.guard import check_harm
from lmpatch.patches.hook.patch import SteerPatch
from lmpatch.patches.ledger import Applied, applied, apply, suspended
from lmpatch.patches.patch import Law, Patch, RunPatch
from lmpatch.patches.weight.delta import LowRank, Scale
from lmpatch.patches.weight.patch import WeightPatch

SRC = str(Path(lmpatch.__file__).parent)


class Line:
    """Raises ``KeyboardInterrupt`` at the n-th line that runs in the block; 0: never, and counts them.

    Counted are lines of lmpatch, and of torch where it registers a hook.
    """

    def __init__(self, n: int = 0) -> None:
        self.n, self.lines, self.hit = n, [], False  # type: ignore[var-annotated]

    def __enter__(self) -> Line:
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, kind: Any, *_: Any) -> bool:
        sys.settrace(self.before)
        return kind is KeyboardInterrupt

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if not (file.startswith(SRC) or (file == nn.modules.module.__file__ and name.startswith("register_forward"))):
            return None
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self.n:
                self.hit = True
                sys.settrace(None)  # one Ctrl-C: what it makes happen is left alone
                raise KeyboardInterrupt
        return self.trace


def each_line(act: Callable[[], Any]) -> list[int]:
    """When each line runs for the first time and for the last, of an act that can be repeated."""
    with Line() as run:
        act()
    first = {line: n for n, line in reversed([*enumerate(run.lines, 1)])}
    last = {line: n for n, line in enumerate(run.lines, 1)}
    return sorted({*first.values(), *last.values()})


def snapshot(lm: LM) -> dict[str, Any]:
    """All that a patch may change."""
    modules = list(lm.model.modules())
    return {
        "weights": [p.detach().clone() for p in lm.model.parameters()],
        "hooks": [(set(m._forward_hooks.values()), set(m._forward_pre_hooks.values())) for m in modules],
        "attributes": [sorted(vars(m)) for m in modules],
        "patches": applied(lm),
        "gradients": torch.is_grad_enabled(),
    }


def differ(a: dict[str, Any], b: dict[str, Any], *ignored: str) -> list[str]:
    weights = any(not torch.equal(x, y) for x, y in zip(a["weights"], b["weights"], strict=True))
    return ["weights"] * weights + [n for n in a if n not in ("weights", *ignored) and a[n] != b[n]]


class Nothing(RunPatch):
    """What a memory is to the ledger: it acts in lmpatch's own calls alone."""

    kind: ClassVar[str] = "nothing"

    def parts(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    @classmethod
    def from_parts(cls, parts: Any, tensors: Any, **common: Any) -> Nothing:
        return cls(**common)

    def describe(self) -> list[str]:
        return []

    def intervention(self, lm: LM) -> Intervention:
        return Intervention()

    def merged(self, others: Any) -> Nothing:
        return self

    def law(self) -> Law:
        return Law.UNION


def weight_patch(lm: LM) -> WeightPatch:
    """An addition and a scale, and a weight that the patch below has, too."""
    g = torch.Generator().manual_seed(0)
    names = [lm.layout.weight(lm.layout.downs[i]) for i in (0, 1)]
    deltas = {
        names[0]: LowRank(torch.randn(64, 2, generator=g), torch.randn(2, 128, generator=g)),
        names[1]: Scale(torch.tensor([3]), torch.tensor([2.0]), (64, 128)),
    }
    return WeightPatch.make(lm, deltas, method="some")


MAKE: dict[str, Callable[[LM], Patch]] = {
    "weight": weight_patch,
    "steer": lambda lm: SteerPatch.make(lm, {name: torch.ones(64) for name in lm.layout.attn_outs[:2]}, method="push"),
    "decode": lambda lm: DecodePatch.make(lm, Power(1.5), method="cad"),
    "nothing": lambda lm: Nothing("nothing", {}, Base(lm.fingerprint(), lm.name)),
}
WAYS = [(kind, mount) for kind, mounts in {"weight": ("bake", "side"), "steer": ("side",)}.items() for mount in mounts]
WAYS += [("decode", "run"), ("nothing", "run")]


def small_lm() -> LM:
    """Two layers: as many as the patches touch."""
    return wrap(tiny_model("llama", num_hidden_layers=2), tiny_tokenizer())


@pytest.fixture(params=WAYS, ids=["-".join(way) for way in WAYS])
def way(request: pytest.FixtureRequest) -> tuple[LM, Patch, Any]:
    lm = small_lm()
    kind, mount = request.param
    return lm, MAKE[kind](lm), mount


@pytest.fixture(params=["alone", "on another"])
def below(request: pytest.FixtureRequest, way: tuple[LM, Patch, Any]) -> None:
    """With ``on another``, a patch that has a weight in common lies below."""
    lm, _, mount = way
    if request.param == "on another":
        apply(lm, weight_patch(lm), "side" if mount == "side" else "bake")


@pytest.mark.slow
@pytest.mark.usefixtures("below")
def test_while_it_goes_on_nothing_of_it_stays(way: tuple[LM, Patch, Any]) -> None:
    lm, patch, mount = way
    before = snapshot(lm)
    points = each_line(lambda: apply(lm, patch, mount))
    applied(lm)[-1].remove()
    for n in points:
        with Line(n) as run:
            apply(lm, patch, mount)
        assert run.hit and differ(before, snapshot(lm)) == [], run.lines[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("below")
def test_while_it_comes_off_it_is_on_or_off(way: tuple[LM, Patch, Any]) -> None:
    lm, patch, mount = way
    before = snapshot(lm)
    on = apply(lm, patch, mount)
    there = snapshot(lm)
    for n in each_line(on.remove):
        on = apply(lm, patch, mount)
        with Line(n) as run:
            on.remove()
        assert run.hit
        now = snapshot(lm)
        if on in applied(lm):
            assert differ(there, now, "patches", "hooks") == [], run.lines[-1]
            assert [tuple(map(len, h)) for h in now["hooks"]] == [tuple(map(len, h)) for h in there["hooks"]]
        else:
            assert differ(before, now, "attributes") == [], run.lines[-1]
        on.remove()
        assert differ(before, snapshot(lm)) == [], run.lines[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("below")
def test_a_block_ends_without_its_patch(way: tuple[LM, Patch, Any]) -> None:
    lm, patch, mount = way
    before, on = snapshot(lm), apply(lm, patch, mount)
    points = each_line(lambda: on.__exit__(None, None, None))
    for n in points[1:]:  # the first line of __exit__ itself: nothing has begun
        on = apply(lm, patch, mount)
        with Line(n) as run:
            on.__exit__(None, None, None)
        assert run.hit and differ(before, snapshot(lm)) == [], run.lines[-1]


@pytest.mark.slow
def test_a_second_block_begins_with_its_patch_or_can_be_ended(way: tuple[LM, Patch, Any]) -> None:
    lm, patch, mount = way
    before, on = snapshot(lm), apply(lm, patch, mount)
    on.remove()
    points = each_line(on.__enter__)
    for n in points:
        on.__exit__()
        assert differ(before, snapshot(lm)) == []
        with Line(n) as run:
            on.__enter__()
        assert run.hit
    on.__exit__()


@pytest.mark.slow
def test_a_with_statement_that_is_interrupted_leaves_no_patch() -> None:
    lm = small_lm()
    patch, before = weight_patch(lm), snapshot(lm)

    def block() -> None:
        with apply(lm, patch):
            pass

    ends = {inspect.getsourcelines(end)[1] + 1 for end in (Applied.__enter__, Applied.__exit__)}
    for n in each_line(block):
        with Line(n) as run:
            block()
        file, line = run.lines[-1]
        if file == inspect.getsourcefile(Applied) and line in ends:  # neither inside nor outside: nothing has begun
            for on in applied(lm):
                on.remove()
        assert run.hit and differ(before, snapshot(lm)) == [], run.lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkpoint", "guard", "bench"])
def test_a_patch_that_is_on_for_a_while_comes_off_wherever_the_interrupt_arrives(what: str, tmp_path: Path) -> None:
    lm = small_lm()
    patch, before = weight_patch(lm), snapshot(lm)
    edits, cfg = [Edit("The tower is in", "Rome", "tower")], Config(max_new_tokens=2, latency=False, bootstrap=0)

    def run() -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if what == "checkpoint":
            export(lm, patch, "checkpoint", tmp_path / "out")
        elif what == "guard":
            check_harm(lm, patch, force=True)
        else:
            facts_run(lm, edits, cfg, patch=patch)

    lines = Lines(run)
    near = [line for line in lines.times if Path(line[0].co_filename).stem in ("ledger", "lm", "export", "writer")]
    for line in near:
        for time in sorted({1, lines.times[line]}):
            assert lines.interrupted(line, time)
            assert differ(before, snapshot(lm), "attributes") == [], f"{name(line)}, time {time}"
    assert what != "checkpoint" or [*tmp_path.iterdir()] in ([], [tmp_path / "out"])


@pytest.mark.slow
def test_suspended_patches_are_back_or_can_be_taken_off() -> None:
    lm = small_lm()
    before, patch, other = snapshot(lm), weight_patch(lm), MAKE["steer"](lm)

    def suspend() -> None:
        with suspended(lm):
            pass

    both = [apply(lm, patch), apply(lm, other)]
    there, points = snapshot(lm), each_line(suspend)
    for n in points:
        with Line(n) as run:
            suspend()
        assert run.hit
        if set(applied(lm)) == set(both):
            assert differ(there, snapshot(lm), "patches", "hooks") == [], run.lines[-1]
            continue
        for one in both:
            one.remove()
        assert differ(before, snapshot(lm)) == [], run.lines[-1]
        both = [apply(lm, patch), apply(lm, other)]
    for one in both:
        one.remove()
    assert differ(before, snapshot(lm)) == []
