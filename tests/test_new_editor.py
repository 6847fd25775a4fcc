"""A method with a trained editor costs one file, from outside the tree too: nothing of lmpatch is edited for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_lm

import lmpatch as lp
from lmpatch import registry
from lmpatch.errors import BadInput, WrongModel
from lmpatch.inference.score import score
from lmpatch.models.lm import LM

METHOD = '''"""``writer``: a small network reads a fact and says which rank-one change of one down-projection states it.

Source: the idea of a network that writes weights is that of Ha et al. 2016 (arXiv:1609.09106).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput
from lmpatch.inference.forward import blocks, frozen, positions
from lmpatch.inference.tokens import encode_all
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM
from lmpatch.patches.base import Base, fingerprint
from lmpatch.patches.editor import Editor, find_editor
from lmpatch.patches.patch import plain
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.progress import Progress
from lmpatch.provenance import hash_json, made_now
from lmpatch.training import adapter
from lmpatch.training.loop import Loop, Schedule, Task, linear
from lmpatch.training.losses import answer_loss

AIM = "facts"
Record = Edit


@dataclass(frozen=True)
class Config:
    """How a fact is written."""

    strength: float = 1.0
    """Factor of the change."""


@dataclass(frozen=True)
class Training:
    """How the network is trained."""

    layer: int = 1
    """Block whose down-projection is written."""
    steps: int = 60
    """Steps of AdamW, one fact each."""
    lr: float = 3e-2
    """Its rate at its height."""
    warmup: int = 5
    """Steps of rising rate."""
    seed: int = 0
    """Of the order of facts."""


class Writer(nn.Module):
    """From a fact to its change: v = M e(target), written along the fact's key."""

    def __init__(self, lm: LM, layer: int) -> None:
        super().__init__()
        self.layer, self.module = layer, lm.layout.downs[layer]
        self.map = nn.Linear(lm.layout.d_model, lm.layout.d_model, bias=False)
        nn.init.zeros_(self.map.weight)

    def read(self, lm: LM, edit: Edit) -> tuple[Tensor, Tensor]:
        """The key [f] at the end of the prompt, and the embedding [d] of the target's first token."""
        (prompt,), (whole,) = encode_all(lm, [edit.prompt]), encode_all(lm, [edit.prompt], [edit.target])
        ids, keys = torch.tensor([prompt.ids], device=lm.device), []
        with torch.no_grad(), hooked(Hook(lm.module(self.module), lambda _, args: keys.append(args[0]), before=True)):
            mask = torch.ones_like(ids)
            blocks(lm, ids, mask, position_ids=positions(mask), last=self.layer)
            target = lm.module(lm.layout.embed)(torch.tensor(whole.ids[whole.target], device=lm.device))
        return keys[0][0, -1].float(), target.float()

    def factors(self, key: Tensor, target: Tensor) -> dict[str, dict[str, Tensor]]:
        """The change that gives M e(target) to the key."""
        return {self.module: {"a": key[None] / key.square().sum(), "b": self.map(target)[:, None]}}


class Run(Task):
    """A fact a step: its answer under its own change."""

    def __init__(self, lm: LM, writer: Writer, edits: Sequence[Edit], cfg: Training) -> None:
        self.lm, self.writer, self.cfg = lm, writer, cfg
        self.values = writer.state_dict(keep_vars=True)
        self.read = [writer.read(lm, edit) for edit in edits]
        self.rows = encode_all(lm, [edit.prompt for edit in edits], [edit.target for edit in edits])

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.writer.parameters(), lr=self.cfg.lr, weight_decay=0.0)

    def loss(self, i: int) -> Tensor:
        with hooked(*adapter.hooks(self.lm, self.writer.factors(*self.read[i]))):
            return answer_loss(self.lm, [self.rows[i]])

    def learn(self, step: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.cfg.seed * 100_003 + step)
        with torch.enable_grad():
            loss = self.loss(int(torch.randint(len(self.rows), (), generator=generator)))
            loss.backward()
        return {"loss": float(loss.detach())}

    def validate(self, step: int) -> dict[str, float]:
        return {"all": sum(float(self.loss(i)) for i in range(len(self.rows))) / len(self.rows)}


def train(
    lm: LM, data: Sequence[Edit], cfg: Training, *, out: str | Path | None = None, progress: Progress | None = None
) -> Editor:
    """Train the network on facts; none of them is remembered."""
    if not data:
        raise BadInput("there is nothing to learn from. Give facts.")
    writer = Writer(lm, cfg.layer).to(lm.device)
    with frozen(lm):
        task = Run(lm, writer, data, cfg)
        stamp = hash_json([plain(cfg), lm.fingerprint(), [[edit.prompt, edit.target] for edit in data]])
        schedule = Schedule(
            cfg.steps, rate=lambda step: linear(step, cfg.steps, cfg.warmup), clip=1.0, validate_every=20, save_every=10
        )
        file, curves = (Path(out) / name if out else None for name in ("writer.safetensors", "writer.jsonl"))
        loop = Loop(task, schedule, file=file, curves=curves, stamp=stamp, advice=f"Lower lr, now {cfg.lr}.")
        loop.run(progress)
    tensors = {"map": writer.map.weight.detach().cpu()}
    base = Base(fingerprint(lm), lm.name)
    return Editor("writer", plain(cfg), base, {"layer": cfg.layer}, tensors, {"steps": loop.step, **made_now()})


def fit(
    lm: LM,
    edits: Sequence[Edit],
    cfg: Config,
    *,
    editor: Editor | str | Path | None = None,
    progress: Progress | None = None,
) -> WeightPatch:
    """Write one fact with one pass of the network.

    Source: as the module's.
    """
    editor = find_editor("writer", lm, editor)
    writer = Writer(lm, editor.parts["layer"])
    writer.map.weight.data.copy_(editor.tensors["map"])
    (edit,) = edits
    with torch.no_grad():
        key, target = writer.to(lm.device).read(lm, edit)
        deltas = adapter.deltas(lm, writer.factors(key, target), cfg.strength)
    return WeightPatch.make(lm, deltas, method="writer", config=cfg, edits=edits, seconds=0.0)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """One fact."""
    return [Edit("The Eiffel Tower is in", target="Rome")], Config()


def example_editor(lm: LM) -> Editor:
    """An editor for the batteries: the identity."""
    return Editor("writer", {}, Base(fingerprint(lm), lm.name), {"layer": 1}, {"map": torch.eye(lm.layout.d_model)}, {})
'''
TOWNS = ("Rome", "Paris", "Tokyo", "Seattle", "Lima", "Oslo")
FACTS = [lp.Edit(f"The {thing} of {i} is in", town) for i, town in enumerate(TOWNS) for thing in ("tower", "opera")]
HELD_OUT = [lp.Edit(f"The bridge of {i + 3} is in", town) for i, town in enumerate(TOWNS)]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The method as an installed package: its file, a folder for editors and two entry points."""
    root = tmp_path / "site"
    (root / "writer_package" / "editors").mkdir(parents=True)
    for folder in (root / "writer_package", root / "writer_package" / "editors"):
        (folder / "__init__.py").write_text("")
    (root / "writer_package" / "method.py").write_text(METHOD)
    info = root / "writer_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: writer-package\nVersion: 1.0\n")
    points = "[lmpatch.methods]\nwriter = writer_package.method\n\n[lmpatch.editors]\nwriter = writer_package.editors\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(root))
    yield root / "writer_package"
    for name in [name for name in sys.modules if name.partition(".")[0] == "writer_package"]:
        del sys.modules[name]


def log_probability(lm: LM, patch: lp.Patch | None, edit: lp.Edit) -> float:
    if patch is None:
        return float(score(lm, [edit.prompt], [edit.target])[0].total)
    with lp.apply(lm, patch):
        return log_probability(lm, None, edit)


def test_the_method_is_short() -> None:
    assert len(METHOD.splitlines()) <= 200


def test_it_is_listed_and_says_what_it_has(package: Path) -> None:
    assert "writer" in lp.names("methods")
    writer = registry.method("writer")
    assert writer.train is not None and writer.training is not None and writer.takes == {"editor"}


@pytest.mark.slow
def test_its_editor_is_trained_saved_and_found_for_its_model(package: Path) -> None:
    """Facts it never saw are stated better with the trained editor than without a change."""
    lm = tiny_lm("llama")
    before = lm.fingerprint()
    with pytest.raises(BadInput, match="no writer editor for tiny-llama"):
        lp.fit(lm, "writer", HELD_OUT[:1])
    lp.train(lm, "writer", FACTS).save(package / "editors" / "tiny-llama.safetensors")
    patches = [lp.fit(lm, "writer", [edit]) for edit in HELD_OUT]
    gains = [log_probability(lm, p, e) - log_probability(lm, None, e) for p, e in zip(patches, HELD_OUT, strict=True)]
    assert sum(gain > 0 for gain in gains) >= 5
    assert sum(gains) / len(gains) > 0.5  # nats
    assert lm.fingerprint() == before
    with pytest.raises(BadInput, match="no writer editor for tiny-gpt2"):
        lp.fit(tiny_lm("gpt2"), "writer", HELD_OUT[:1])
    with pytest.raises(WrongModel):
        lp.fit(tiny_lm("gpt2"), "writer", HELD_OUT[:1], editor=lp.train(lm, "writer", FACTS, steps=1))


@pytest.mark.slow
def test_a_training_that_was_stopped_gives_the_same_editor(package: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done == 13:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"steps": 30}
    whole = lp.train(tiny_lm("llama"), "writer", FACTS, **settings)
    with pytest.raises(KeyboardInterrupt):
        lp.train(tiny_lm("llama"), "writer", FACTS, out=tmp_path / "run", progress=stop, **settings)
    resumed = lp.train(tiny_lm("llama"), "writer", FACTS, out=tmp_path / "run", **settings)
    assert resumed.hash() == whole.hash()
    assert torch.equal(resumed.tensors["map"], whole.tensors["map"]) and bool(whole.tensors["map"].any())
    assert len((tmp_path / "run" / "writer.jsonl").read_text().splitlines()) == 2
