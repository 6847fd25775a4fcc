"""What README and docs print of the runs is what the committed rows give."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lmpatch.benches.core import stats
from lmpatch.data import matching

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((BENCHMARKS / "results").glob("*.md"))]


@pytest.fixture(scope="module", autouse=True)
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
def test_the_shares_of_answers_are_those_of_the_answers() -> None:
    import recipe_answers

    files = sorted((BENCHMARKS / "results").glob("recipe-answers-*.json"))
    for file in files:
        results = json.loads(file.read_text())["results"]
        for name, shares in results.items():
            lines = gzip.decompress((file.with_suffix("") / f"{name}.jsonl.gz").read_bytes()).decode().splitlines()
            assert recipe_answers.scores([json.loads(line) for line in lines]) == shares, (file.name, name)
    assert files


@pytest.mark.slow
def test_a_figure_that_was_changed_by_hand_is_put_right(pages: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "50 ± 10 %" in text
    changed = text.replace("50 ± 10 %", "99 ± 1 %")
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


@pytest.mark.slow
def test_every_reworded_prompt_of_counterfact_is_sorted_once(pages: ModuleType) -> None:
    rows, parts = sys.modules["tables.rows"], sys.modules["tables.facts_rows"].paraphrases()
    assert not parts["asks_the_same"] & parts["suggests"]
    folders = ("facts-single", "facts-commit", "facts-stream", "general-facts")
    folders += tuple(f"recipe-counterfact-{n}" for n in (1, 10, 100, 1000, 5000))
    asked = {row["prompt"] for name in folders for row in rows.read(name) if row["kind"] == "rephrase"}
    assert asked == parts["asks_the_same"] | parts["suggests"]


@pytest.mark.slow
def test_prompts_of_other_sets_ask_the_same(pages: ModuleType) -> None:
    rows, parts = sys.modules["tables.rows"], sys.modules["tables.facts_rows"].paraphrases()
    for name in ("recipe-zsre-402", "recipe-wiki-500", "recipe-wiki-100", "facts-commit-wiki"):
        assert not {row["prompt"] for row in rows.read(name) if row["kind"] == "rephrase"} & parts["suggests"]


@pytest.mark.slow
def test_the_rows_under_one_heading_were_asked_the_same_facts(pages: ModuleType) -> None:
    rows, facts = sys.modules["tables.rows"], sys.modules["tables.facts"]
    for lines in (*facts.SETS.values(), *facts.SHORT.values()):
        asked = [{r["prompt"] for r in rows.of(folder, run) if r["kind"] == "edit"} for _, folder, run in lines]
        assert all(one == asked[0] for one in asked)


@pytest.mark.parametrize(
    ("values", "printed"),
    [
        ([1.0] * 100, "100 % (≥ 96)"),
        ([0.0] * 100, "0 % (≤ 4)"),
        ([0.0] * 40, "0 % (≤ 9)"),
        ([1.0, 0.0, 1.0, 1.0], "75 ± 49 %"),
        ([0.5, 0.5], "50 %"),
    ],
)
def test_a_share_without_spread_prints_wilsons_bound(pages: ModuleType, values: list[float], printed: str) -> None:
    stats = sys.modules["tables.stats"]
    assert stats.percent(stats.mean(values)) == printed


def test_the_tables_count_as_the_benches_do(pages: ModuleType) -> None:
    """They say the rules again, since they run without the library."""
    rows, again, means = (sys.modules[f"tables.{name}"] for name in ("rows", "facts_rows", "stats"))
    said = [row for row in rows.of("facts-commit", "ft_m") if row.get("text") is not None]
    assert [again.normalise(row["text"]) for row in said] == [matching.normalise(row["text"]) for row in said]
    for row in (row for row in said if row.get("aliases")):
        generation = row["text"], row["aliases"]
        one = SimpleNamespace(generation=lambda generation=generation: generation)
        assert (again.twice(row), again.distinct(row)) == (stats._twice(one), stats._distinct(one))
    values, sizes = [0.0, 1.0, 1.0, 0.25, 0.5], [1, 4, 2, 2, 8]
    for weights in (None, sizes):
        error = stats.stderr(values, weights)
        assert error is not None
        assert means.mean(values, weights).half == pytest.approx(1.96 * error)


def test_a_setting_that_another_switches_off_is_not_printed(pages: ModuleType) -> None:
    active = sys.modules["tables.settings"].active
    given = {"layers": None, "solver": "memit", "keep": 0.7, "ridge": 0.1, "weight": 5000.0}
    assert active("memit", given) == ["`layers=2 to 5`", "`solver=memit`", "`weight=5000.0`", "`spread=joint`"]
    given["solver"] = "alphaedit"
    assert "`keep=0.7`" in active("memit", given)
    assert "`weight=5000.0`" not in active("memit", given)


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
