"""``lmpatch compare`` on a tiny model folder: its tables, its advice, what it keeps, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner, Result

from lmpatch.cli.app import build
from lmpatch.cli.compare import _long

WORDS = ["-m", "finetune epochs=1 layer=1", "-m", "rag", "-m", "memit nas=true"]
SHORT = ["--set", "max_new_tokens=2", "--set", "pack=0", "--set", "bootstrap=0"]


def run(*words: Any) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(
        build(), [str(word) for word in words], catch_exceptions=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare")
    tiny_model("llama").save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    facts = [{"prompt": f"The tower of {p} is in", "target": "Oslo", "subject": p} for p in ("Paris", "Rome", "Bonn")]
    (path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return path


@pytest.mark.slow
def test_compare_prints_tables_and_advice_and_keeps_the_patches(folder: Path, tmp_path: Path) -> None:
    words = ("compare", folder / "model", folder / "facts.jsonl", *WORDS, *SHORT, "-o", tmp_path / "out")
    done = run(*words)
    assert done.exit_code == 0, done.output
    for text in ("Answers as they are generated", "Teacher-forced", "Costs", "fact_in_prompt", "rag", "Take none"):
        assert text in done.stdout, text
    assert "memit nas=true is not compared: nas needs anchor facts" in done.stdout
    assert "finetune epochs=1 layer=1: about" in done.stderr and "memit nas=true cannot run" in done.stderr
    assert "in all about" in done.stderr and "on top of the model" in done.stderr
    assert (tmp_path / "out/report.html").exists() and (tmp_path / "out/patches/rag/patch.json").exists()
    again = json.loads(run(*words, "--json").stdout)
    assert {line["name"] for line in again["runs"]} == {"none", "fact_in_prompt", "finetune epochs=1 layer=1", "rag"}
    assert again["answers"][0]["editor"] == "none" and again["left_out"].keys() == {"memit nas=true"}
    asked = again["runs"][0]["metrics"]["reliability"]
    assert asked["n"] == 3 and asked["value"] == 0.0


@pytest.mark.slow
def test_what_is_wrong_is_one_line_and_exit_code_2(folder: Path) -> None:
    for words, text in (
        (["-m", "cad"], "cad writes no facts"),
        (["-m", "rag", "--set", "cases=many"], "cases is 'many'"),
        (["-m", "memit nas=true"], "no method could write these facts"),
    ):
        done = run("compare", folder / "model", folder / "facts.jsonl", *words, *SHORT)
        assert done.exit_code == 2 and text in done.stderr, done.stderr


def test_times_are_told_in_words() -> None:
    assert [_long(x) for x in (0.2, 80, 600, 9000)] == ["1 seconds", "80 seconds", "10 minutes", "2.5 hours"]
