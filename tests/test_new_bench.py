"""A new bench costs one file and its test, from outside the tree too; nothing else is edited."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from rich.console import Console
from tiny import tiny_lm

import lmpatch as lp
from lmpatch import registry
from lmpatch.benches.core import runner
from lmpatch.config import describe_fields
from lmpatch.errors import BadInput

BENCH = '''"""``echo``: does the model say the last word of a line again?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmpatch.benches.core.asking import beyond_window
from lmpatch.benches.core.contract import Answer, Measure, Settings
from lmpatch.inference.generate import generate
from lmpatch.models.lm import LM


@dataclass(frozen=True)
class Config(Settings):
    """The echo bench."""

    max_new_tokens: int = 4
    """Length of an answer at most."""


METRICS = {"echo": Measure("answers that hold the last word", lambda row: row.hit, headline=True)}


def load(path: str | Path, *, limit: int | None = None, seed: int | None = None) -> list[str]:
    """The lines of a file."""
    return Path(path).read_text().splitlines()[:limit]


def ask(lm: LM, lines: Sequence[str], cfg: Config) -> list[Answer]:
    """One row a line."""
    flags = beyond_window(lm, lines, new_tokens=cfg.max_new_tokens)
    texts = iter(generate(lm, [x for x, flag in zip(lines, flags) if not flag], max_new_tokens=cfg.max_new_tokens))
    rows = []
    for line, flag in zip(lines, flags):
        word = line.split()[-1]
        text = None if flag else next(texts)
        hit = None if text is None else word in text
        rows.append(Answer(id=line, prompt=line[:80], wanted=(word,), text=text, hit=hit, flag=flag))
    return rows
'''
LINES = [f"The tower number {i} is in {place}" for i, place in enumerate(("Paris", "Rome", "Tokyo", "Oslo", "Japan"))]


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package elsewhere that announces its bench; and a file for it to read."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "echo.py").write_text(BENCH)
    monkeypatch.syspath_prepend(str(tmp_path / "outside"))
    points = [EntryPoint("echo", "echo", "lmpatch.benches")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "lmpatch.benches" else [])
    monkeypatch.setattr(runner, "BLOCK", 2)
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    yield tmp_path / "lines.txt"
    sys.modules.pop("echo", None)


@pytest.mark.slow
def test_it_is_listed_run_resumed_and_reported(echo: Path, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    assert "echo" in registry.names("benches") and len(BENCH.splitlines()) <= 150
    assert "max_new_tokens" in {name for name, *_ in describe_fields(registry.get("benches", "echo").Config)}
    patch = lp.fit(lm, "finetune", [lp.Edit("The tower is in", "Rome")], layer=1, epochs=1)
    whole = lp.bench(lm, "echo", echo, patch=patch)
    calls: list[str] = []

    def stop(done: int, total: int, what: str) -> None:
        calls.append(what)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lp.bench(lm, "echo", echo, patch=patch, out=tmp_path / "out", progress=stop)
    report = lp.bench(lm, "echo", echo, patch=patch, out=tmp_path / "out")
    assert report.rows == whole.rows and len(report.rows) == 2 * len(LINES)
    number = report.run("finetune").metric("echo")
    assert number and number.n == len(LINES) and number.stderr is not None
    assert report.difference("finetune", "echo") and "repeats" in report.run("none").metrics()
    console = Console(width=150, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table())
    text = capture.get()
    assert "finetune against the unpatched model" in text and "answers that hold the last word" in text
    assert LINES[0] in report.save_html(tmp_path / "page.html").read_text()


def test_what_it_cannot_do_is_said(echo: Path) -> None:
    with pytest.raises(BadInput, match="echo makes no patches. Fit one with rome first"):
        lp.bench(tiny_lm("llama"), "echo", echo, method="rome")
    with pytest.raises(BadInput, match="echo reads no unrelated"):
        lp.bench(tiny_lm("llama"), "echo", echo, unrelated="x")
