"""``lmpatch data``: what it writes and shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rag_files import squad
from typer.testing import CliRunner, Result

from lmpatch.cli.app import build
from lmpatch.data.rag.reader import read_built


def run(*words: Any) -> Result:
    """``lmpatch data words``; any exception but a clean exit is an error of the test."""
    runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})
    return runner.invoke(build(), ["data", *map(str, words)], catch_exceptions=False)


@pytest.mark.slow
def test_rag_writes_both_sides_and_a_manifest(tmp_path: Path) -> None:
    source, out = squad(tmp_path / "s.jsonl"), tmp_path / "sets"
    done = run("rag", source, "-o", out, "--set", "words=8", "--set", "held_out=0.5")
    assert done.exit_code == 0 and "substituted" in done.stdout
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["words"] == 8 and sum(manifest["counts"].values()) == sum(
        len(read_built(out / name)) for name in ("train.jsonl", "dev.jsonl", "held_out.jsonl")
    )
    assert "train/adherence: asked for 300, built" in done.stdout
    again = run("rag", source, "-o", out)
    assert again.exit_code == 2 and "exists" in again.output


@pytest.mark.slow
def test_show_gives_counts_and_examples_as_the_model_reads_them(tmp_path: Path) -> None:
    source, out = squad(tmp_path / "s.jsonl"), tmp_path / "sets"
    run("rag", source, "-o", out)
    shown = run("show", out / "train.jsonl").stdout
    first = next(r for r in read_built(out / "train.jsonl") if r.variant == "substituted")
    assert first.prompt + first.answer in shown and "the model's own answer" in shown
    assert "[Question]" not in run("show", out / "train.jsonl", "-n", 0).stdout
    assert "is a source" in run("show", source, "-n", 0).stdout


def test_bad_lines_are_one_line_on_stderr(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"question": "Who?", "answer": "Anna"}\n{"question": "Who?", "documents": ["x"]}\n')
    done = run("rag", path, "-o", tmp_path / "sets")
    assert done.exit_code == 2 and "line 1" in done.stderr and "line 2" in done.stderr
    assert not (tmp_path / "sets").exists()
