"""House rules that a search can check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = sorted((ROOT / "src").rglob("*.py"))
TEXTS = [
    path
    for folder in ("src", "tests", "docs", "examples", "benchmarks", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".md", ".toml", ".txt", ".jsonl", ".json", ".yml", ""} and path.is_file()
] + [path for path in sorted(ROOT.iterdir()) if path.is_file()]
LONGEST = 400  # lines; files are around 300 unless there is a reason

FORBIDDEN = {
    "a model recognised by its name": r"""["'](llama|gemma\w*|qwen\w*|gpt\w*|mistral|phi\w*|opt)["']\s+in\b"""
    r"""|\bin\s+(model_name|name|path)\.lower\(\)""",
    "pickle or code from a file": r"\bpickle\b.*\bload|(?<!safetensors\.)torch\.load\(|(?<![\w.])(eval|exec)\("
    r"|trust_remote_code\s*=\s*True",
    "a seed set for the whole process": r"torch\.manual_seed\(|random\.seed\(|np\.random\.seed\(",
    "a logging handler of its own": r"logging\.basicConfig|addHandler\(",
    "a weight undone by subtraction": r"\.sub_\(delta",
}


def lines_with(pattern: str, files: list[Path]) -> list[str]:
    """``file:line: text`` of every line that matches."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1)
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_the_source_is_free_of(rule: str) -> None:
    assert not lines_with(FORBIDDEN[rule], SRC)


def test_nothing_prints_outside_the_command_line() -> None:
    library = [path for path in SRC if "cli" not in path.parts]
    assert not lines_with(r"(?<![\w.])print\(", library)


@pytest.mark.slow
def test_no_line_names_a_registry_host_or_a_path_of_one_machine() -> None:
    files = [path for path in TEXTS if path != Path(__file__)]
    assert not lines_with(r"pypi\.org|pythonhosted|npmjs\.(org|com)|registry\.\w+\.(org|com|io)", files)
    assert not lines_with(r"(^|[\s\"'(=])/(home|root|work|Users|mnt|farm|opt)/\w", files)
    assert not lines_with(r"[\"'(=\s]/tmp/\w", files)


@pytest.mark.parametrize("path", SRC, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_a_file_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST
    assert text.startswith('"""'), "no docstring at the top"
    assert "placeholder" not in text.partition("\n")[0]


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_every_rule_can_fail(rule: str) -> None:
    breaches = {
        "a model recognised by its name": 'if "llama" in name:',
        "pickle or code from a file": "weights = torch.load(path)",
        "a seed set for the whole process": "torch.manual_seed(0)",
        "a logging handler of its own": "logging.basicConfig()",
        "a weight undone by subtraction": "weight.sub_(delta)",
    }
    assert re.search(FORBIDDEN[rule], breaches[rule])
