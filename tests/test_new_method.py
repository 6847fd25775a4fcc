"""A new method costs one file, one test file and one docs row; nothing else is edited."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

METHOD = '''"""Nudge: add a small fixed direction to one down-projection, for the sake of the example.

Source: nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..data.edits import Edit
from ..models.lm import LM
from ..progress import Progress
from ..patches.weight.delta import LowRank
from ..patches.weight.patch import WeightPatch


AIM = "facts"
Record = Edit


@dataclass(frozen=True)
class Config:
    """Nudge."""

    size: float = 0.5
    """Length of the change."""


def fit(lm: LM, edits: Sequence[Edit], cfg: Config, *, progress: Progress | None = None) -> WeightPatch:
    """Add the direction, whatever the edits.

    Source: nobody.
    """
    b = torch.ones(lm.layout.d_model, 1) * cfg.size
    a = torch.linspace(-1, 1, lm.layout.d_ff)[None]
    weight = lm.layout.weight(lm.layout.downs[1])
    return WeightPatch.make(lm, {weight: LowRank(b, a)}, method="nudge", config=cfg, edits=edits, seconds=0.0)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """One edit."""
    return [Edit("The Eiffel Tower is in", target="Rome")], Config()
'''
TEST = '''"""Nudge."""

from lmpatch.methods.nudge import Config


def test_it_has_a_size() -> None:
    assert Config().size > 0
'''
ROW = "| `nudge` | one down-projection | nothing | `LowRank`, rank 1 | nobody |\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the three files of one more method."""
    path = tmp_path_factory.mktemp("project")
    for name in ("src", "tests", "docs", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, path)
    (path / "src" / "lmpatch" / "methods" / "nudge.py").write_text(METHOD)
    (path / "tests" / "methods").mkdir(exist_ok=True)
    (path / "tests" / "methods" / "test_nudge.py").write_text(TEST)
    page = path / "docs" / "methods.md"
    lines = page.read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if line.startswith("| `"))
    page.write_text("".join([*lines[: last + 1], ROW, *lines[last + 1 :]]))
    return path


def python(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True)


def battery(copy: Path) -> subprocess.CompletedProcess[str]:
    """Every test of the batteries and the docs that the method's name is part of."""
    tests = ["tests/test_batteries_methods.py", "tests/test_docs.py", "tests/test_imports.py", "tests/test_style.py"]
    chosen = "nudge or methods_page"
    return python(
        copy, "-m", "pytest", *tests, "tests/methods/test_nudge.py", "-k", chosen, "-q", "-p", "no:cacheprovider"
    )


@pytest.mark.slow
def test_three_files_are_enough_for_registry_command_line_and_battery(copy: Path) -> None:
    listed = python(copy, "-c", "import lmpatch; print(lmpatch.__file__, lmpatch.names('methods'))")
    assert str(copy) in listed.stdout
    assert "'nudge'" in listed.stdout
    shown = python(copy, "-c", "from lmpatch.cli import main; main()", "methods", "nudge")
    assert "Length of the change." in shown.stdout, shown.stderr
    done = battery(copy)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.rpartition(" passed")[0].split()[-1]) > 50


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["docs/methods.md", "tests/methods/test_nudge.py"])
def test_two_of_the_three_are_not(copy: Path, missing: str) -> None:
    file = copy / missing
    text = file.read_text()
    file.write_text(text.replace(ROW, "")) if missing.endswith(".md") else file.unlink()
    try:
        tests = ["tests/test_batteries_methods.py", "-k", "nudge and docs", "-q", "-p", "no:cacheprovider"]
        assert python(copy, "-m", "pytest", *tests).returncode == 1
    finally:
        file.write_text(text)
