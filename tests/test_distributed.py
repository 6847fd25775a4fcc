"""Two processes that train together end where one ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_lm

from lmpatch import BadInput
from lmpatch.distributed import SINGLE, World, join, world
from lmpatch.methods.parenting import method as parenting
from lmpatch.methods.recipe import method as recipe
from lmpatch.models.sharding import shard
from lmpatch.patches.editor import load_editor
from lmpatch.patches.file import load_patch

TESTS = Path(__file__).parent
WORKER = """
import json, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from lmpatch.distributed import join
device = join()
from test_distributed import both
both({out!r}, {sharded!r}, device)
torch.distributed.destroy_process_group()
"""


def settings() -> tuple[Any, Any]:
    """Few steps of both trainings. Rates are low, since Adam makes steps of any size from gradients near zero."""
    from methods.test_recipe import QUICK

    training = replace(QUICK, adapt=2, dropout=0.0, bf16=False, other_share=1.0, lr=1e-3, prompt_lr=1e-3, seed=3)
    _, tuning = parenting.example(tiny_lm("llama"))
    return training, replace(tuning, lr=0.01, rows_adherence=3, rows_extraction=1)


def both(out: str, sharded: bool, device: str | None = None) -> None:
    """Train an editor and fit a patch on a tiny model; the first process writes them."""
    from methods.test_recipe import FACTS

    training, tuning = settings()
    lm = tiny_lm("llama")
    if sharded:
        shard(lm)
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in blocks_of(lm))
    editor = recipe.train(lm, FACTS, training, out=Path(out) / "work")
    patch = parenting.fit(lm, parenting.example(lm)[0], tuning, out=Path(out) / "parenting")
    if world().is_main:
        editor.save(Path(out) / "editor.safetensors")
        patch.save(Path(out) / "patch")
        (Path(out) / "held.json").write_text(json.dumps({"held": held, "device": device}))


def weights(folder: Path) -> torch.Tensor:
    """All that an editor has learned, fp32, from its checkpoints."""
    parts = [load_file(folder / f"{part}.safetensors") for part in ("retrieval", "prompts")]
    return torch.cat([part[name].flatten() for part in parts for name in sorted(part) if name.startswith("value/")])


def blocks_of(lm: Any) -> list[torch.nn.Parameter]:
    return [p for name in lm.layout.blocks for p in lm.module(name).parameters()]


def launched(out: Path, sharded: bool) -> dict[str, Any]:
    """The same in two processes."""
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = WORKER.format(tests=str(TESTS), out=str(out), sharded=sharded)
    here = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    here |= {"ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=here | {"RANK": str(i), "LOCAL_RANK": str(i)}, text=True,
                         stderr=subprocess.PIPE)
        for i in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors[0] + errors[1]
    found: dict[str, Any] = json.loads((out / "held.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "shards"])
def test_two_processes_train_what_one_trains(sharded: bool, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    both(str(tmp_path / "one"), False)
    found = launched(tmp_path / "two", sharded)
    assert found["device"] == "cpu"
    assert found["held"] == sum(p.numel() for p in blocks_of(tiny_lm("llama"))) // (2 if sharded else 1)

    from methods.test_recipe import FACTS

    still = replace(settings()[0], lr=0.0, encoder_lr=0.0, prompt_lr=0.0)
    recipe.train(tiny_lm("llama"), FACTS, still, out=tmp_path / "start")
    start, one, two = (weights(tmp_path / name) for name in ("start", "one/work", "two/work"))
    assert (two - one).norm() <= 0.02 * (one - start).norm() and (one - start).norm() > 0
    editor = load_editor(tmp_path / "two/editor.safetensors")
    assert editor.made["steps"] == settings()[0].prompt_steps
    assert (
        recipe.fit(tiny_lm("llama"), FACTS, recipe.Config(), editor=editor).base.fingerprint == editor.base.fingerprint
    )

    a, b = (load_patch(tmp_path / name / "patch") for name in ("one", "two"))
    for key, delta in a.deltas.items():  # type: ignore[attr-defined]
        ours, theirs = delta.dense(), b.deltas[key].dense()  # type: ignore[attr-defined]
        assert ours.norm() > 0 and (ours - theirs).norm() <= 1e-3 * ours.norm(), key


def test_every_item_belongs_to_one_process() -> None:
    items = list(range(7))
    parts = [World(i, 3).part(items) for i in range(3)]
    assert sorted(i for part in parts for i in part) == items and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_alone_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    x = torch.ones(3, 2)
    assert world() == SINGLE and join() is None
    assert SINGLE.gathered(x, 3) is x
    SINGLE.mean([x])
    assert torch.equal(x, torch.ones(3, 2))
    with pytest.raises(BadInput, match="accelerate launch"):
        shard(tiny_lm("llama"))
