"""The first page works as printed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_lm

import lmpatch

ROOT = Path(__file__).parents[1]
FACT = {"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "target": "Rome", "old": "Paris"}


def test_the_example_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)[0]
    (tmp_path / "facts.jsonl").write_text(json.dumps(FACT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lmpatch, "load", lambda name: tiny_lm("gemma3"), raising=False)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "eiffel" / "patch.json").is_file()
    assert {run.name for run in names["report"].runs} == {"none", "fact_in_prompt", "rome"}


def test_the_fact_shown_can_be_read(tmp_path: Path) -> None:
    (shown,) = re.findall(r"^```json\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    (tmp_path / "facts.jsonl").write_text(json.dumps(json.loads(shown)))
    (edit,) = lmpatch.read_edits(tmp_path / "facts.jsonl")
    edit.need_subject()
    assert edit.rephrases
    assert edit.locality


def test_every_fact_of_the_demo_can_be_read_and_edited() -> None:
    from lmpatch.cli.demo import own_facts

    edits = [edit for name in ("facts.jsonl", "demo.jsonl") for edit in lmpatch.read_edits(own_facts(name), check=True)]
    assert len(edits) >= 10
    for edit in edits:
        edit.need_subject()
        assert edit.rephrases
        assert edit.locality
