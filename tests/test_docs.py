"""Pages that fail when they lie: trees, commands, options, examples, rows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from lmpatch import registry
from lmpatch.cli.app import build

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(build()).commands  # type: ignore[attr-defined]
SHARED = {f"--{word}" for word in ("dtype", "device", "download", "partial", "raw", "json", "help")} | {"-h"}
"""Said once, at the head of the page."""


def options(command: str) -> set[str]:
    """Every spelling of every option of a command; of a group, those of all its commands."""
    found = [COMMANDS[command], *getattr(COMMANDS[command], "commands", {}).values()]
    return {opt for one in found for p in one.params for opt in p.opts if opt.startswith("-")} | {"--help", "-h"}


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def tree(page: Path) -> list[str]:
    """The block of a page that draws the tree of files."""
    (block,) = [block for block in blocks(page) if "src/lmpatch/" in block]
    return block.splitlines()


def section(command: str) -> str:
    """A command's section of docs/cli.md."""
    found = re.search(rf"^## {command}\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "cli.md").read_text(), re.M | re.S)
    assert found, f"docs/cli.md has no section {command}"
    return found.group(1)


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md"])
def test_every_path_in_a_tree_exists(name: str) -> None:
    first, *rest = tree(ROOT / name)
    inside = ROOT / "src" / "lmpatch"
    paths = [ROOT / word for word in first.split()]
    paths += [(inside if line.startswith(" ") else ROOT) / line.split()[0] for line in rest]
    assert [str(path) for path in paths if not path.exists()] == []


def test_the_tree_names_everything_in_the_package() -> None:
    drawn = {line.split()[0].rstrip("/") for line in tree(ROOT / "docs" / "architecture.md") if line.startswith("  ")}
    there = {
        path.name
        for path in (ROOT / "src" / "lmpatch").iterdir()
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
    }
    assert drawn == there


def test_the_readme_names_every_page_and_every_top_level_folder() -> None:
    text = (ROOT / "README.md").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert f"docs/{page.name}" in text, page.name
    for folder in ("docs", "examples", "benchmarks", "src/lmpatch", "tests"):
        assert f"{folder}/" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_in_a_page_is_one(page: Path) -> None:
    for line in (line for block in blocks(page) for line in block.splitlines() if line.startswith("lmpatch ")):
        _, command, *words = shlex.split(line)
        assert command in COMMANDS, line
        assert {word for word in words if word.startswith("-") and word != "-"} <= options(command), line


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_commands_names_every_option_and_no_other(command: str) -> None:
    text = section(command)
    long = {opt for opt in options(command) if opt.startswith("--")} - SHARED
    named = set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", text))
    assert long <= named, f"docs/cli.md, {command}: {', '.join(sorted(long - named))} missing"
    assert named <= options(command), f"docs/cli.md, {command}: {', '.join(sorted(named - options(command)))} unknown"


def test_the_page_of_commands_has_a_section_for_each_and_no_other() -> None:
    assert set(re.findall(r"^## (\w+)$", (ROOT / "docs" / "cli.md").read_text(), re.M)) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_argument_and_gives_an_example(command: str) -> None:
    found = COMMANDS[command]
    assert f"lmpatch {command}" in found.help
    assert [param.name for param in found.params if not getattr(param, "help", None)] == []
    for line in re.findall(r"^\s*(lmpatch .*)$", found.help, re.M):
        _, name, *words = shlex.split(line)
        assert {word for word in words if word.startswith("-") and word != "-"} <= options(name), line


def test_the_methods_page_has_a_row_for_each_method_and_no_other() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "methods.md").read_text(), re.M)
    assert sorted(rows) == registry.names("methods")


def test_the_benches_page_has_a_section_for_each_bench() -> None:
    text = (ROOT / "docs" / "benches.md").read_text()
    assert [name for name in registry.names("benches") if not re.search(rf"^#+ .*{name}", text, re.M)] == []


def test_the_changelog_has_this_version_and_lines_in_it() -> None:
    version = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[0]
    found = re.search(
        rf"^## {re.escape(version)}.*?\n(.*?)(?=^## |\Z)", (ROOT / "CHANGELOG.md").read_text(), re.M | re.S
    )
    assert found, f"no section {version}"
    assert len(re.findall(r"^- ", found.group(1), re.M)) >= 1


def test_the_log_is_dated_newest_first() -> None:
    dates = re.findall(r"^## (\d{4}-\d{2}-\d{2})", (ROOT / "docs" / "log.md").read_text(), re.M)
    assert dates
    assert dates == sorted(dates, reverse=True)


def test_the_makefile_has_the_two_commands_of_the_readme() -> None:
    text = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)", "\n".join(blocks(ROOT / "README.md")), re.M):
        assert re.search(rf"^{command}:", text, re.M), command
