"""What README and docs print of the runs is what the committed rows give."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((BENCHMARKS / "results").glob("*.md"))]


@pytest.fixture(scope="module")
def pages() -> Iterator[ModuleType]:
    """``benchmarks/tables/pages.py``, as the command imports it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from tables import pages as module

        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_is_what_the_rows_give(pages: ModuleType, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert pages.render(text) == text, f"{page.name} and the rows differ: run `make numbers`"


def test_every_page_that_may_hold_a_marker_is_looked_at(pages: ModuleType) -> None:
    assert pages.pages() == PAGES
    marked = {path for path in ROOT.glob("*.md") if pages.START in path.read_text(encoding="utf-8")}
    assert marked <= set(PAGES)


def test_every_block_stands_on_a_page(pages: ModuleType) -> None:
    asked = {name for page in PAGES for name in pages.names(page.read_text(encoding="utf-8"))}
    assert asked == set(pages.BLOCKS)


@pytest.mark.slow
def test_a_figure_that_was_changed_by_hand_is_put_right(pages: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "97 ± 3 %" in text
    changed = text.replace("97 ± 3 %", "99 ± 1 %")
    assert pages.render(changed) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- numbers: facts-tabel -->\n<!-- /numbers -->\n", "no block of numbers is called facts-tabel"),
        ("<!-- numbers: facts-table -->\n\n| a table |\n", "a marker is not closed"),
        ("| a table |\n\n<!-- /numbers -->\n", "a marker is not closed"),
        ("<!-- numbers:facts-table-->\n<!-- /numbers -->\n", "a marker is not closed"),
    ],
)
def test_a_marker_that_is_wrong_is_refused(pages: ModuleType, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pages.render(text)


@pytest.mark.slow
def test_the_command_needs_neither_torch_nor_numpy_and_finds_nothing_to_do() -> None:
    code = (
        "import runpy, sys; sys.argv = ['write_numbers.py', '--check']\n"
        "try: runpy.run_path('benchmarks/write_numbers.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'numpy', 'lmpatch'} & sys.modules.keys()\n"
    )
    path = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
    done = subprocess.run([sys.executable, "-I", "-c", path + code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every figure is that of the rows" in done.stdout


def test_no_row_or_result_is_larger_than_it_has_to_be() -> None:
    kept = [path for path in (BENCHMARKS / "results").rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} <= {".md", ".json", ".jsonl", ".gz", ".png"}
    assert not [path for path in kept if path.name == "rows.jsonl"]
    assert sum(path.stat().st_size for path in kept) < 4 * 2**20


def test_a_plot_among_the_results_is_shown_on_a_page() -> None:
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in (BENCHMARKS / "results").rglob("*.png"):
        assert path.relative_to(BENCHMARKS).as_posix() in shown, path.name


ROWS = [
    {"run_id": "none", "when": "final", "case_id": "1", "kind": "edit", "prompt": "p", "aliases": ["Rome"], "text": "x",
     "base_text": "x", "em": False, "kl": None, "age": 0},
    {"run_id": "rome", "when": "final", "case_id": "1", "kind": "edit", "prompt": "p", "aliases": ["Rome"], "text": "",
     "base_text": "x", "em": False, "kl": 0.123456789, "age": 0},
]  # fmt: skip


def test_rows_that_are_kept_come_back_and_have_the_same_bytes_each_time(pages: ModuleType, tmp_path: Path) -> None:
    rows = sys.modules["tables.rows"]
    (tmp_path / "work").mkdir()
    (tmp_path / "work/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "work/runs.jsonl").write_text(json.dumps({"run_id": "none", "metrics": [1], "n_edits": 1}) + "\n")
    for name in ("a", "b"):
        rows.keep(tmp_path / "work", tmp_path / name)
    packed = [(tmp_path / name / "rows.jsonl.gz").read_bytes() for name in ("a", "b")]
    assert packed[0] == packed[1]
    assert len(gzip.decompress(packed[0]).splitlines()) == len(ROWS)
    for row, back in zip(ROWS, rows.read("a", tmp_path), strict=True):
        whole = {key: value for key, value in row.items() if key != "age" and value is not None}
        assert back == whole | ({"kl": 0.12346} if row["run_id"] == "rome" else {})
    assert rows.runs("a", tmp_path) == {"none": {"run_id": "none", "n_edits": 1}}
