"""What lmpatch writes and reads back: an original of each kind, and what proves that it was read right."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_lm

import lmpatch as lp
from lmpatch import registry
from lmpatch.benches import memotrap
from lmpatch.benches.core import runner
from lmpatch.data.context import ContextRecord
from lmpatch.errors import LmpatchError
from lmpatch.patches import format
from lmpatch.patches.editor import Editor, load_editor
from lmpatch.patches.file import load_patch
from lmpatch.patches.ledger import applied
from lmpatch.patches.patch import Patch, plain
from lmpatch.provenance import hash_tensors
from lmpatch.training.loop import Loop, Schedule, Task

from .mutate import BYTES, FILES, Files, bend, damage, read, write
from .tally import Wrong

EVERY_WAY = (*BYTES, "json", "json", "json", *FILES)


@dataclass(frozen=True)
class Subject:
    """One original, and how it is read."""

    name: str
    files: Files
    check: Callable[[Path], None]
    """Reads the folder: ``LmpatchError`` where it refuses, ``Wrong`` where what it read is not what was written."""
    ways: tuple[str, ...] = EVERY_WAY
    other: Files | None = None
    """Of another of the kind, for files that change places."""
    forge: Callable[[random.Random, Path], str] | None = None
    """Change the folder as one could who can compute its hashes: then it must be usable or refused, no more."""

    def attack(self, draw: random.Random, folder: Path) -> tuple[str, Callable[[], None]]:
        """A damaged copy in the folder: what was done, and the call that reads it."""
        while True:
            shutil.rmtree(folder, ignore_errors=True)
            write(folder, self.files)
            if self.forge and draw.random() < 0.2:
                what = self.forge(draw, folder)
                return f"{self.name}, {what}", lambda: self.check_forged(folder)
            done = [damage(draw, folder, self.other or {}, self.ways) for _ in range(draw.choice((1, 1, 1, 2)))]
            swapped = [what for what in done if what and what.endswith(": swap")]
            if any(done) and len(swapped) < 2:  # all files of another are that other one
                return f"{self.name}, " + " and ".join(filter(None, done)), lambda: self.check(folder)

    def check_forged(self, folder: Path) -> None:
        """A forged folder says what it says: reading it may succeed."""
        with suppress(Wrong):
            self.check(folder)


def same(read_it: Callable[[Path], Any], original: Any) -> Callable[[Path], None]:
    """A check for files with a hash: whatever is accepted is the original."""

    def check(folder: Path) -> None:
        found = read_it(folder)
        if found != original:
            names = [str(i) for i, (a, b) in enumerate(zip(found, original, strict=True)) if a != b]
            raise Wrong(f"accepted, and fields {', '.join(names)} differ from what was written")

    return check


def folder_of(save: Callable[[Path], object], room: Path) -> Files:
    """The files that ``save`` writes into a folder, or as one file."""
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    save(room / "x")
    return read(room)


# Patches and editors


def patches(room: Path) -> list[Subject]:
    """A patch of each kind."""
    lm = tiny_lm("llama")
    made: list[Patch] = []
    for name in ("rome", "finetune", "param_mute", "iti", "coiecd", "recipe", "rag"):
        module = registry.get("methods", name)
        records, config = module.example(lm)
        editor = {"editor": module.example_editor(lm)} if hasattr(module, "example_editor") else {}
        made.append(module.fit(lm, records, config, **editor))
    files = [folder_of(patch.save, room) for patch in made]

    def fields(folder: Path) -> list[Any]:
        patch = load_patch(folder / "x")
        return [patch.kind, patch.hash(), patch.method, patch.base, patch.config, patch.edits, patch.made, patch.notes,
                patch.parts()]  # fmt: skip

    def used(original: list[Any]) -> Callable[[Path], None]:
        compare = same(fields, original)

        def check(folder: Path) -> None:
            patch = load_patch(folder / "x")
            if any(not text.isprintable() for text in patch.summary().splitlines()):
                raise RuntimeError("control characters of a file reach the terminal")
            repr(patch), patch._repr_html_()
            try:
                with lp.apply(lm, patch, strict=False):
                    lp.hidden(lm, ["The Eiffel Tower is in"]) if patch.kind != "decode" else None
            except LmpatchError:
                if fields(folder) == original:
                    raise Wrong("the patch as it was written was not taken on") from None
            assert not applied(lm)
            compare(folder)

        return check

    subjects = []
    for i, (patch, own) in enumerate(zip(made, files, strict=True)):
        write(room / "read", own)
        original = fields(room / "read")
        shutil.rmtree(room / "read")
        subjects.append(
            Subject(f"{patch.method} patch", own, used(original), other=files[(i + 1) % len(files)], forge=reseal)
        )
    return subjects


def reseal(draw: random.Random, folder: Path) -> str:
    """Bend a value of ``patch.json`` and hash it anew."""
    path = folder / "x" / format.HEADER
    header, what = bend(draw, json.loads(path.read_bytes()))
    try:
        path.write_bytes(format.sealed(header))
    except (ValueError, AttributeError, TypeError, RecursionError):  # no hash can be computed of it
        path.write_bytes(json.dumps(header).encode())
    return f"resealed, {what}"


def editors(room: Path) -> list[Subject]:
    """An editor file."""
    module = registry.get("methods", "recipe")
    lms = [tiny_lm("llama"), tiny_lm("llama", seed=1)]
    first, second = (module.example_editor(lm) for lm in lms)
    files = [folder_of(editor.save, room) for editor in (first, second)]

    def fields(folder: Path) -> list[Any]:
        editor = load_editor(folder / "x")
        editor.summary()
        tensors = hash_tensors(sorted(editor.tensors.items()), exact=True)
        return [editor.method, editor.config, editor.base, editor.parts, editor.made, tensors]

    def forge(draw: random.Random, folder: Path) -> str:
        name = draw.choice(("config", "parts", "made"))
        value, what = bend(draw, getattr(first, name))
        parts = {"config": first.config, "parts": first.parts, "made": first.made, name: value}
        try:
            Editor(first.method, parts["config"], first.base, parts["parts"], first.tensors, parts["made"]).save(
                folder / "x"
            )
        except (LmpatchError, ValueError, TypeError, AttributeError, UnicodeError):
            return "not writable"  # the file is as it was
        return f"resealed, {name}: {what}"

    def check(folder: Path) -> None:
        same(fields, original)(folder)

    def used(folder: Path) -> None:
        records, config = module.example(lms[0])
        module.fit(lms[0], records, config, editor=load_editor(folder / "x"))
        check(folder)

    write(room / "read", files[0])
    original = fields(room / "read")
    shutil.rmtree(room / "read")
    return [Subject("recipe editor", files[0], used, other=files[1], forge=forge)]


# Checkpoints and bench folders


class Fit(Task):
    """A vector that learns another one; each step draws its own noise."""

    def __init__(self) -> None:
        self.x = torch.zeros(9, requires_grad=True)
        self.values = {"x": self.x}

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        return torch.optim.AdamW([self.x], lr=0.1)

    def learn(self, step: int) -> Mapping[str, float]:
        noise = torch.randn(9, generator=torch.Generator().manual_seed(step))
        loss = (self.x - 3 + 0.1 * noise).square().sum()
        loss.backward()
        return {"loss": float(loss.detach())}

    def validate(self, step: int) -> Mapping[str, float]:
        return {"distance": float((self.x - 3).norm().detach())}


def checkpoints(room: Path) -> list[Subject]:
    """A checkpoint of the training loop that every trained method shares."""

    def loop(stamp: str, file: Path) -> Loop:
        made = Loop(Fit(), Schedule(5, validate_every=4, save_every=3), file=file, stamp=stamp)
        made.run()
        return made

    def resumed(folder: Path) -> list[Any]:
        if not (folder / "x").exists():
            raise LmpatchError("a checkpoint that is not there begins anew")
        on = Loop(Fit(), Schedule(7, validate_every=4, save_every=3), file=folder / "x", stamp="a")
        begun = on.step
        on.run()
        values = on.task.values["x"].detach()
        return [begun, on.step, values.tolist(), on.losses, [{**point, "seconds": 0} for point in on.curve]]

    files = [folder_of(partial(loop, stamp), room) for stamp in ("a", "b")]
    write(room / "read", files[0])
    original = resumed(room / "read")
    shutil.rmtree(room / "read")
    return [Subject("checkpoint", files[0], same(resumed, original), other=files[1])]


def records(count: int) -> list[ContextRecord]:
    """Questions with contexts."""
    towns = ("Paris", "Rome", "Tokyo", "Oslo", "Cairo", "Lima", "Quito", "Bonn")
    return [
        ContextRecord(f"Since {1900 + i} the tower of {t} stands in Bern.", f"Where is the tower of {t}?", "Bern", t)
        for i, t in enumerate(towns[:count])
    ]


def bench_folders(room: Path) -> list[Subject]:
    """The folder of a bench with two runs in several chunks, plain and packed."""
    runner.BLOCK = 2
    lm, data = tiny_lm("llama"), records(4)
    cfg = memotrap.Config(max_new_tokens=2, bootstrap=0, baselines=())
    patch = lp.fit(lm, "finetune", [lp.Edit("The tower is in", "Rome")], layer=1, epochs=1)

    def run(folder: Path) -> Any:
        return memotrap.run(lm, data, cfg, patch=patch, out=folder)

    def rows(report: Any) -> dict[str, list[Any]]:
        return {each.name: [plain(row) for row in each.rows] for each in report.runs}

    files = folder_of(run, room)
    whole = rows(memotrap.read_report(_put(room / "whole", files) / "x"))
    shutil.rmtree(room / "whole")
    packed = {(f"{name}.gz" if name.endswith("rows.jsonl") else name): (gzip.compress(data, mtime=0) if name.endswith(
        "rows.jsonl") else data) for name, data in files.items()}  # fmt: skip

    def check(folder: Path) -> None:
        report = memotrap.read_report(folder / "x")
        for each in report.runs:
            own, known = [plain(row) for row in each.rows], whole.get(each.name, [])
            if any(row not in known for row in own):
                raise Wrong(f"rows of the run {each.name} are not what was written")
            if len(own) != len(known) and "not finished" not in each.title:
                raise Wrong(f"the run {each.name} has {len(own)} of {len(known)} rows and counts as whole")
        if len(report.runs) < len(whole):
            return  # a run that is missing altogether is asked again
        if (again := rows(run(folder / "x"))) != whole:
            raise Wrong(f"gone on with, the runs {', '.join(n for n in whole if again.get(n) != whole[n])} differ")

    return [Subject("bench folder", files, check), Subject("packed bench folder", packed, check)]


def _put(folder: Path, files: Files) -> Path:
    write(folder, files)
    return folder
