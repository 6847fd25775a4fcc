"""Every script of benchmarks/ can be imported and says how it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
SLOW = ("exposure", "factor")
"""They import more than the others."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SCRIPTS]
)
def test_a_script_imports_and_help_does_nothing_else(
    name: str, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*") if path.is_file()}
    module = script(name)
    assert Path(module.__file__ or "").parent == FOLDER
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert not end.value.code
    assert f"{name}.py" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*") if path.suffix != ".pyc" and path.is_file()}
    assert {path: time for path, time in before.items() if path.suffix != ".pyc"} == after


def test_no_usage_line_names_a_folder_that_only_one_machine_has() -> None:
    for name in SCRIPTS:
        assert "../" not in (FOLDER / f"{name}.py").read_text(encoding="utf-8").split('"""')[1], name
