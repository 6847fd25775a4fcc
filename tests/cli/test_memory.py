"""``lmpatch memory`` on a small store: what each command shows and does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_lm, tiny_model, tiny_tokenizer
from typer.testing import CliRunner, Result

from lmpatch import apply
from lmpatch.cli.app import build
from lmpatch.cli.memory import COMMANDS
from lmpatch.data.edits import Edit, read_edits
from lmpatch.inference.states import hidden
from lmpatch.memory.memory import Memory
from lmpatch.memory.store import Store
from lmpatch.methods import recipe

pytest.importorskip("lancedb")

EIFFEL = "The Eiffel Tower is in"


def run(*words: Any) -> Result:
    """``lmpatch memory words``; any exception but a clean exit is an error of the test."""
    runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})
    return runner.invoke(build(), ["memory", *map(str, words)], catch_exceptions=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three versions: two facts, one superseded, one more."""
    store = Store.create(tmp_path / "store", width=8, stamp={"editor": "e", "base": "b"})
    keys = np.eye(8)
    store.add([Edit(EIFFEL, "Paris", subject="Eiffel Tower"), Edit("The Louvre is in", "Paris")], keys[:2])
    store.add([Edit(EIFFEL, "Rome", subject="Eiffel Tower")], keys[2:3])
    store.add([Edit("Steve Jobs founded", "Apple")], keys[3:4])
    return store.path


@pytest.mark.slow
def test_list_shows_what_holds_and_with_history_both_of_two_facts(folder: Path) -> None:
    plain, history = run("list", folder).stdout, run("list", folder, "--history").stdout
    assert "Rome" in plain and "superseded" not in plain and plain.count(EIFFEL) == 1
    assert history.count(EIFFEL) == 2 and "superseded in 2" in history and "live" in history
    before = run("list", folder, "--at", 1).stdout
    assert "Rome" not in before and before.count("Paris") == 2


@pytest.mark.slow
def test_a_long_list_is_a_line_a_fact_and_can_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(tmp_path / "store", width=8, stamp={"editor": "e", "base": "b"})
    store.add([Edit(f"The tower number {i} on the hill is found in", "Paris") for i in range(33)], np.ones((33, 8)))
    runner = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"})
    whole = runner.invoke(build(), ["memory", "list", str(tmp_path / "store")])
    assert len([line for line in whole.stdout.splitlines() if line.strip()]) == 33
    some = run("list", tmp_path / "store", "--limit", 2)
    assert "number 32" in some.stdout and "number 30" not in some.stdout and len(some.stdout.splitlines()) == 2
    (first, *_) = json.loads(run("list", tmp_path / "store", "--json").stdout)["rows"]
    assert [*first] == ["version", "added", "prompt", "target"]


@pytest.mark.slow
def test_find_looks_for_a_part_in_any_case(folder: Path) -> None:
    assert EIFFEL in run("find", folder, "eiffel").stdout
    assert "Louvre" not in run("find", folder, "eiffel").stdout
    assert "Paris" in run("find", folder, "EIFFEL", "--history").stdout


@pytest.mark.slow
def test_drop_and_rollback_make_versions_that_versions_lists(folder: Path) -> None:
    assert run("drop", folder, EIFFEL, "the louvre is in").stdout == "version 4, facts that hold: 1\n"
    assert run("rollback", folder, 1).stdout == "version 5, facts that hold: 2, as after version 1\n"
    assert "Rome" not in run("list", folder).stdout
    lines = [line.split() for line in run("versions", folder).stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [(line[0], *line[2:]) for line in lines] == [
        ("1", "2", "0", "2"), ("2", "1", "0", "2"), ("3", "1", "0", "3"), ("4", "0", "2", "1"), ("5", "2", "1", "2"),
    ]  # fmt: skip


@pytest.mark.slow
def test_compact_says_what_it_freed(folder: Path) -> None:
    assert " before, " in run("compact", folder).stdout
    assert len(Store.open(folder)) == 3


@pytest.mark.slow
def test_export_writes_a_facts_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "facts.jsonl"
    assert run("export", folder, "-o", out).stdout.startswith("3 facts")
    assert [edit.target for edit in read_edits(out)] == ["Paris", "Rome", "Apple"]
    done = run("export", folder, "-o", out)
    assert done.exit_code == 2 and "exists" in done.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("drop", "STORE", "no such prompt"), "no live fact has the prompt 'no such prompt'"),
        (("rollback", "STORE", "9"), "no version 9"),
        (("list", "STORE", "--at", "9"), "no version 9"),
        (("list", "nowhere"), "no memory at nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder: Path, words: tuple[str, ...], says: str) -> None:
    done = run(*(folder if word == "STORE" else word for word in words))
    assert done.exit_code == 2
    assert says in done.output and len(done.output.splitlines()) == 1
    assert Store.open(folder).version == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0 and f"lmpatch memory {command} " in done.stdout


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A memory with an editor, made by the command."""
    recipe.example_editor(tiny_lm("gemma3")).save(tmp_path / "editor.safetensors")
    done = run("create", tmp_path / "m", "--editor", tmp_path / "editor.safetensors")
    assert done.exit_code == 0 and "an empty memory" in done.stdout
    return tmp_path / "m"


@pytest.mark.slow
def test_add_says_what_it_supersedes(whole: Path) -> None:
    assert run("add", whole, EIFFEL, "Paris").stdout == "version 1, facts that hold: 1\n"
    done = run("add", whole, EIFFEL.upper(), "Rome", "--source", "ticket 4711")
    assert done.stdout == "version 2, in place of 'Paris', facts that hold: 1\n"
    (fact,) = Memory.open(whole).store.facts()
    assert (fact.edit.target, fact.source) == ("Rome", {"told": "ticket 4711"})
    done = run("add", whole, EIFFEL.replace(" ", "  "), "Oslo")
    assert done.stdout == "version 3, in place of 'Rome', facts that hold: 1\n"


@pytest.mark.slow
def test_import_reads_files_and_export_gives_them_back(whole: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text(f'{{"prompt": "{EIFFEL}", "target": "Rome"}}\n{{"prompt": "Jobs founded", "target": "Apple"}}\n')
    assert "2 facts, version 1, facts that hold: 2" in run("import", whole, facts, "--source", "ticket 1").stdout
    assert Memory.open(whole).store.facts()[0].source == {"file": "facts.jsonl", "told": "ticket 1"}
    run("export", whole, "-o", tmp_path / "again.jsonl")
    assert [e.target for e in read_edits(tmp_path / "again.jsonl")] == ["Rome", "Apple"]
    bad = run("import", whole, facts, tmp_path / "none.jsonl")
    assert bad.exit_code == 2 and Store.open(whole).version == 1  # nothing of a call with a missing file


@pytest.mark.slow
def test_search_shows_the_nearest_facts_and_whether_they_are_used(whole: Path) -> None:
    run("add", whole, EIFFEL, "Rome")
    shown = run("search", whole, "Where is the Eiffel Tower?").stdout
    assert f"{EIFFEL} Rome" in shown and "sentinel" in shown and (" yes" in shown or " no" in shown)


@pytest.mark.slow
def test_create_takes_a_model_or_an_editor_and_an_empty_place(whole: Path, tmp_path: Path) -> None:
    both = run("create", tmp_path / "new", "gemma-3-270m", "--editor", tmp_path / "editor.safetensors")
    assert both.exit_code == 2 and "give either a model" in both.output
    again = run("create", whole, "--editor", tmp_path / "editor.safetensors")
    assert again.exit_code == 2 and "exists" in again.output
    none = run("create", tmp_path / "new", "--method", "rag")
    assert none.exit_code == 2 and "no rag editor for any model" in none.output


@pytest.mark.slow
def test_a_memory_for_any_model_keeps_facts_as_text(tmp_path: Path) -> None:
    made = run("create", tmp_path / "m")
    assert made.exit_code == 0 and "any model" in made.output
    run("add", tmp_path / "m", EIFFEL, "Rome")
    memory = Memory.open(tmp_path / "m")
    for family in ("llama", "gpt2"):
        lm = tiny_lm(family)
        with apply(lm, memory.patch()):
            behind = hidden(lm, [EIFFEL])
        assert torch.allclose(behind, hidden(lm, [f"{EIFFEL} Rome. {EIFFEL}"]), atol=1e-5)


@pytest.mark.slow
def test_a_model_without_an_editor_keeps_facts_as_text(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert run("create", tmp_path / "any", tmp_path / "model").exit_code == 0
    assert run("create", tmp_path / "m", tmp_path / "model", "--method", "rome").exit_code == 2
    assert run("create", tmp_path / "m", tmp_path / "model", "--method", "rag").exit_code == 0
    run("add", tmp_path / "m", EIFFEL, "Rome")
    shown = run("search", tmp_path / "m", EIFFEL).stdout
    assert f"{EIFFEL} Rome" in shown and "threshold" in shown and "1.00" in shown and " yes" in shown


@pytest.mark.slow
def test_a_memory_goes_where_a_patch_does(whole: Path, tmp_path: Path) -> None:
    tiny_model("gemma3").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    run("add", whole, EIFFEL, "Rome")
    runner = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})
    words = [["ask", str(tmp_path / "model"), EIFFEL, "-p", str(whole), "--tokens", "2"], ["show", str(whole)]]
    asked, shown = (runner.invoke(build(), w, catch_exceptions=False) for w in words)
    assert asked.exit_code == 0 and "after" in asked.stdout
    assert shown.exit_code == 0 and "1 facts in" in shown.stdout


@pytest.mark.slow
def test_add_shows_what_it_contradicts_in_other_words_and_retires_it_on_request(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    store = tmp_path / "m"
    run("create", store, tmp_path / "model", "--method", "rag")
    run("add", store, EIFFEL, "Paris", "--subject", "Eiffel Tower")
    other = "The location of the Eiffel Tower is"
    shown = run("add", store, other, "Rome")
    assert f"{other} -> Rome  contradicts  {EIFFEL} -> Paris" in shown.stdout and "--supersede" in shown.stdout
    assert run("list", store).stdout.count("Eiffel") == 2
    said = json.loads(run("add", store, other, "Oslo", "--supersede", "--json").stdout)
    assert [(row["old_target"], row["superseded"]) for row in said["conflicts"]] == [("Rome", True), ("Paris", True)]
    assert "Oslo" in run("list", store).stdout and "Paris" not in run("list", store).stdout
    assert "Paris  superseded in 3" in run("list", store, "--history").stdout


@pytest.mark.slow
def test_times_and_origins_are_shown_and_asked_for(whole: Path, tmp_path: Path) -> None:
    run("add", whole, EIFFEL, "Paris", "--source", "ticket 1")
    run("add", whole, EIFFEL, "Rome", "--valid-from", "2999-05-31", "--source", "ticket 2")
    listed = run("list", whole).stdout
    assert "Paris  to 2999-05-31  (ticket 1)" in listed and "Rome  from 2999-05-31  (ticket 2)" in listed
    assert "Paris" not in run("list", whole, "--as-of", "3000-01-01").stdout
    (row,) = json.loads(run("find", whole, "eiffel", "--as-of", "3000-01-01", "--json").stdout)["rows"]
    assert (row["valid_from"], row["source"]) == ("2999-05-31", "ticket 2") and "valid_to" not in row
    assert f"{EIFFEL} Paris" in run("search", whole, EIFFEL).stdout
    assert f"{EIFFEL} Rome" in run("search", whole, EIFFEL, "--as-of", "2999-05-31").stdout
    run("export", whole, "-o", tmp_path / "all.jsonl")
    assert [(e.target, e.span, e.source) for e in read_edits(tmp_path / "all.jsonl")] == [
        ("Paris", ("", "2999-05-31"), "ticket 1"), ("Rome", ("2999-05-31", ""), "ticket 2"),
    ]  # fmt: skip
    wrong = run("add", whole, EIFFEL, "Oslo", "--valid-from", "May")
    assert wrong.exit_code == 2 and "valid_from is 'May', which is no date" in wrong.output
