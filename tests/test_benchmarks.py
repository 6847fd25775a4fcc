"""Every script of benchmarks/ can be imported and says how it is called."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
SLOW = ("exposure", "factor")
"""They import more than the others."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SCRIPTS]
)
def test_a_script_imports_and_help_does_nothing_else(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))  # as when it runs as a script
    before = {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*") if path.is_file()}
    known = set(sys.modules)
    try:
        script = importlib.import_module(name)
        assert Path(script.__file__ or "").parent == FOLDER
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit) as end:
            script.main()
    finally:
        for module in set(sys.modules) - known:  # names such as `facts` are another module's elsewhere
            if not module.startswith("lmpatch") and str(FOLDER) in str(getattr(sys.modules[module], "__file__", "")):
                del sys.modules[module]
                parent, _, child = module.rpartition(".")
                vars(sys.modules[parent]).pop(child, None) if parent in sys.modules else None
    assert not end.value.code
    assert f"{name}.py" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*") if path.suffix != ".pyc" and path.is_file()}
    assert {path: time for path, time in before.items() if path.suffix != ".pyc"} == after


def test_no_usage_line_names_a_folder_that_only_one_machine_has() -> None:
    for name in SCRIPTS:
        assert "../" not in (FOLDER / f"{name}.py").read_text(encoding="utf-8").split('"""')[1], name
