"""Whatever stands on the command line, in a name or a file: one line, nothing that steers a terminal, no lost work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_lm, tiny_model, tiny_tokenizer
from typer.testing import CliRunner, Result

from lmpatch.cli import screen
from lmpatch.cli.app import build
from lmpatch.cli.options import writable
from lmpatch.errors import BadInput
from lmpatch.methods.recipe.method import example_editor
from lmpatch.models.load import load
from lmpatch.patches.file import load_patch

ESCAPE = "\x1b[31mred\x9b\u202e"
FACT = {"prompt": f"Beyoncé {ESCAPE} wohnt in", "target": "東京"}


def run(*words: Any, charset: str = "utf-8", columns: int = 160) -> Result:
    """``lmpatch words``; any exception but a clean exit is an error of the test."""
    runner = CliRunner(charset=charset, env={"COLUMNS": str(columns), "TERM": "dumb"})
    return runner.invoke(build(), [str(word) for word in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a fact with letters of all kinds and escapes, a patch and an editor."""
    path = tmp_path_factory.mktemp("hostile")
    tiny_model("llama").save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    (path / "facts.jsonl").write_text(json.dumps(FACT), encoding="utf-8")
    example_editor(tiny_lm("llama")).save(path / "editor.safetensors")
    assert fit(path, path / "patch").exit_code == 0
    return path


def fit(folder: Path, out: Any, **options: Any) -> Result:
    settings = ("--set", "epochs=1", "--set", "layer=1")
    return run("fit", folder / "model", "finetune", folder / "facts.jsonl", "-o", out, *settings, **options)


def one_line(done: Result) -> str:
    """The line that a command which refuses says."""
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("loading ")]
    assert line.startswith("lmpatch: ") and done.stdout == ""
    return line


# Output that is not UTF-8


@pytest.mark.slow
@pytest.mark.parametrize("charset", ["cp1252", "ascii", "latin-1"])
def test_letters_that_the_output_lacks_are_replaced(folder: Path, tmp_path: Path, charset: str) -> None:
    assert fit(folder, tmp_path / "new", charset=charset).exit_code == 0
    assert load_patch(tmp_path / "new").hash() == load_patch(folder / "patch").hash()
    for words in (("show", folder / "patch"), ("methods", "rome"), ("methods",), ("fit", "--help"), ("doctor", "-h")):
        done = run(*words, charset=charset)
        assert done.exit_code == 0 and "Traceback" not in done.output
    assert "?" in run("show", folder / "patch", charset=charset).stdout
    words = ("ask", folder / "model", "東京", "-p", folder / "patch", "--tokens", 2)
    assert run(*words, charset=charset).exit_code == 0
    rows = json.loads(run(*words, "--json", charset=charset).stdout)["rows"]
    assert rows[0]["prompt"] == "東京"  # for a program nothing is lost


@pytest.mark.slow
def test_a_process_in_the_c_locale_writes_and_reads_any_letter(folder: Path) -> None:
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "lmpatch", "ask", str(folder / "model"), "Beyoncé", "--tokens", "2", "--json"]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["prompt"] == "Beyoncé"


# What steers a terminal


def steers(text: str) -> bool:
    return bool(screen.HIDDEN.search(text))


@pytest.mark.slow
def test_no_name_and_no_content_of_a_file_steers_the_terminal(folder: Path, tmp_path: Path) -> None:
    named = tmp_path / ESCAPE
    shutil.copytree(folder / "patch", named / "patch")
    shutil.copytree(folder / "model", named / "model")
    for words in (
        ("show", named / "patch"),
        ("ask", named / "model", FACT["prompt"], "-p", named / "patch", "--tokens", 2),
        ("fit", named / "model", "finetune", folder / "facts.jsonl", "-o", named / "new", "--set", "epochs=1"),
        ("ask", named / "nowhere", "x"),
        ("ask", named / "model", "x", "-p", named / "nowhere"),
        ("show", named),
        ("fit", folder / "model", ESCAPE, folder / "facts.jsonl", "-o", named / "more"),
        ("fit", folder / "model", "rome", folder / "facts.jsonl", "-o", named / "patch"),
        ("ask", folder / "model", "x", "--tokens", ESCAPE),
        ("ask", folder / "model", "x", f"--{ESCAPE}"),
        (ESCAPE,),
        ("methods", ESCAPE),
        ("doctor", named / "model"),
        ("bench", named / "model", "facts", folder / "facts.jsonl", "-p", named / "patch", "--set", "latency=false"),
    ):
        assert not steers(run(*words).output), words
        assert not steers(run(*words, "--json").output), words
    assert json.loads(run("show", named / "patch", "--json").stdout)["edits"][0]["prompt"] == FACT["prompt"]


@pytest.mark.slow
def test_square_brackets_in_a_name_are_no_markup(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "a[" / "red]")
    assert "red]" in run("doctor", tmp_path / "a[" / "red]").stdout


def test_a_bar_shows_a_hostile_name_as_text(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with screen.progress() as bar:
        bar(1, 2, "loading [/red]\x1b]0;title\x07")
    shown = capsys.readouterr().err
    assert "[/red]" in shown and "\x1b]0;" not in shown and "\x07" not in shown


# Where nothing can be written

LONG = ("x" * 250, "x/" * 2500)
NOWHERE = ["/proc/x", "/dev/null", "~nosuchuser/p", "{}/facts.jsonl/x", "{}/\0", *(f"{{}}/{name}" for name in LONG)]


@pytest.mark.slow
@pytest.mark.parametrize("out", NOWHERE, ids=lambda out: repr(out[-12:]))
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    folder: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmpatch.models.load.load", lambda *_, **__: pytest.fail("a model was loaded"))
    model, facts, patch, before = folder / "model", folder / "facts.jsonl", folder / "patch", [*folder.rglob("*")]
    out = out.replace("{}", str(folder))
    for words in (
        ("fit", model, "rome", facts),
        ("train", model, "recipe", facts),
        ("probe", model, "causal_trace", facts),
        ("probe", model, "integrated_gradients", facts),
        ("bench", model, "facts", facts, "-p", patch),
        ("merge", patch, patch),
        ("export", model, "-p", patch),
        ("demo",),
        ("example",),
        ("data", "rag", facts),
        ("memory", "export", folder),
    ):
        line = one_line(run(*words, "-o", out))
        assert re.search("Give another|null byte", line) and len(line) < 300, words
    for words in (("memory", "create", out, model), ("fit", model, "rome", facts, "-o", folder / "new", "--work", out)):
        assert re.search("Give another|null byte", one_line(run(*words)))
    assert [*folder.rglob("*")] == before


@pytest.mark.slow
def test_a_trial_leaves_no_trace_and_folders_on_the_way_are_made_at_the_end(folder: Path, tmp_path: Path) -> None:
    assert writable(tmp_path / "a" / "b" / "c") == tmp_path / "a" / "b" / "c"
    assert [*tmp_path.iterdir()] == []
    assert fit(folder, tmp_path / "a" / "b" / "c").exit_code == 0 and load_patch(tmp_path / "a" / "b" / "c")


def test_a_folder_without_leave_to_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(BadInput, match="cannot be written .Permission denied."):
        writable(tmp_path / "new")


# Hostile words


@pytest.mark.parametrize(
    "words",
    [
        ("ask", "model", "x", "--tokens", "nan"),
        ("ask", "model", "x", "--tokens", "0"),
        ("ask", "model", "x", "--tokens", str(10**400)),
        ("ask", "model", "x", "--mount", ""),
        ("ask", "model", "x", "-p", ""),
        ("ask", "model", "x", "-p", "editor.safetensors"),
        ("ask", "model", "x", "-p", "model"),
        ("ask", "model", "x", "-p", "x" * 5000),
        ("ask", "model", "x", "--context", "@"),
        ("ask", "model", "x", "--context", "@a\0b"),
        ("ask", "model", "\udcff"),
        ("ask", "x" * 5000, "x"),
        ("ask", "a\0b", "x"),
        ("ask", "~nosuchuser/p", "x"),
        ("ask", "", "x"),
        ("ask", "patch", "x"),
        ("show", "editor.safetensors"),
        ("show", "a\0b"),
        ("fit", "model", "rome", "facts.jsonl", "-o", "new", "--set", "lr=nan"),
        ("fit", "model", "rome", "facts.jsonl", "-o", "new", "--set", f"steps={10**400}"),
        ("fit", "model", "rome", "facts.jsonl", "-o", "new", "--set", "="),
        ("fit", "model", "rome", "patch", "-o", "new"),
        ("fit", "model", "recipe", "facts.jsonl", "-o", "new", "--editor", "patch"),
        ("fit", "model", "", "facts.jsonl", "-o", "new"),
        ("fit", "model", "rome", "facts.jsonl", "-o", ""),
        ("probe", "model", "causal_trace", "facts.jsonl", "--set", f"samples={2**64}"),
        ("bench", "model", "facts", "facts.jsonl", "--limit", "-1"),
        ("memory", "list", "model"),
        ("memory", "compact", "/"),
        ("memory", "add", "patch", "", ""),
        ("data", "show", "editor.safetensors"),
        ("export", "model", "-p", "patch", "-o", "new", "--rank", str(-(10**400))),
        ("nothing",),
        ("--nothing",),
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_a_hostile_word_gets_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.chdir(folder)
    line = one_line(run(*words))
    assert len(line) < 700 and not (folder / "new").exists()


def test_stdin_that_is_no_text_gets_one_line(folder: Path) -> None:
    words = ["ask", str(folder / "model"), "-"]
    done = CliRunner().invoke(build(), words, input=b"\xff\xfe\x00x", catch_exceptions=False)
    assert "stdin" in one_line(done)


TOO_LARGE = [MemoryError(), OverflowError("too large"), RuntimeError("can't allocate memory")]


@pytest.mark.slow
@pytest.mark.parametrize("error", TOO_LARGE)
def test_too_large_a_number_gets_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("lmpatch.inference.generate.generate", fail)
    assert "more than the machine has room for" in one_line(run("ask", folder / "model", "x"))


# --partial


@pytest.mark.slow
@pytest.mark.parametrize(("words", "given"), [((), {}), (("--partial",), {"partial": True})])
def test_partial_is_handed_on_only_where_it_was_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], given: dict[str, bool]
) -> None:
    seen = []

    def spy(*args: Any, **options: Any) -> Any:
        seen.append({name: value for name, value in options.items() if name == "partial"})
        return load(*args, **{name: value for name, value in options.items() if name != "partial"})

    monkeypatch.setattr("lmpatch.models.load.load", spy)
    assert run("ask", folder / "model", "x", "--tokens", 1, *words).exit_code == 0
    assert run("memory", "create", folder / "store", folder / "model", "--method", "rag", *words).exit_code == 0
    shutil.rmtree(folder / "store")
    assert seen == [given, given]
