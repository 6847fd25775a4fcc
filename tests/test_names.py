"""The public names: sorted, documented, quick to import; every name the docs use exists."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lmpatch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", lmpatch.__all__)
def test_a_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(lmpatch, name)
    assert (inspect.getdoc(value) or "").strip(), f"lmpatch.{name} has no docstring"


@pytest.mark.parametrize("name", [name for name in lmpatch.__all__ if name[0].islower()])
def test_a_public_function_documents_every_argument_it_lists(name: str) -> None:
    value = getattr(lmpatch, name)
    section = re.search(r"Args:\n(.*?)(\n\S|\n    \S+:\n|\Z)", inspect.getdoc(value) or "", re.S)
    listed = re.findall(r"^    (\w+):", section.group(1), re.M) if section else []
    assert set(listed) <= set(inspect.signature(value).parameters), f"lmpatch.{name} documents what it does not take"


def test_the_three_lists_of_names_agree_and_are_sorted() -> None:
    source = (Path(lmpatch.__file__)).read_text()
    typed = [
        alias.asname
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    ]
    assert list(lmpatch._HOMES) == sorted(lmpatch._HOMES) == lmpatch.__all__ == sorted(typed)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lmpatch.nothing  # noqa: B018


def test_every_error_is_public() -> None:
    from lmpatch import errors

    classes = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert classes <= set(lmpatch.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_a_page_uses_exists(page: Path) -> None:
    text = page.read_text()
    used = set(re.findall(r"\blp\.(\w+)", text)) | set(re.findall(r"\blmpatch\.(\w+)\(", text))
    modules = {path.stem for path in Path(lmpatch.__file__).parent.iterdir()}
    missing = used - set(lmpatch.__all__) - modules
    assert not missing, f"{page.name} names lmpatch.{', lmpatch.'.join(sorted(missing))}"


@pytest.mark.slow
def test_import_and_help_load_no_torch() -> None:
    code = (
        "import sys, lmpatch\n"
        "from lmpatch.cli.app import build\n"
        "build()(['fit', '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), 'heavy import at start'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
