"""The report: every number in the tables, nothing loaded or run by the page, no mixing of what cannot be compared."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import escape
from rich.console import Console
from tiny import tiny_lm

from lmpatch.benches import facts
from lmpatch.benches.core.report import Report, combine
from lmpatch.benches.facts import Config
from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput
from lmpatch.models.lm import LM
from lmpatch.patches.weight.patch import WeightPatch

Maker = Callable[[LM, Sequence[Edit]], WeightPatch]
NASTY = "</td><script>alert('&amp;')</script>"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``report`` is kept; not to be written to."""
    return tmp_path_factory.mktemp("report") / "out"


@pytest.fixture(scope="module")
def report(edits: list[Edit], make: Maker, quick: Config, out: Path) -> Report:
    """A method with commits, retention and latency beside the baselines."""
    cfg = replace(quick, n=6, commit_size=2, retention=True, latency=True)
    lm = tiny_lm("llama")
    return facts.run(lm, edits, cfg, make=make, run_id="fake", out=out, data_name="six.jsonl", prep={"seconds": 3})


@pytest.mark.slow
def test_a_report_and_a_run_are_one_line_each(report: Report) -> None:
    line = repr(report)
    assert "\n" not in line and len(line) <= 410
    assert line.startswith("Report(facts: (Run(none, n = ") and report.verdict()[0][:60] in line
    assert all(repr(run) in line for run in report.runs)
    assert int(re.findall(r"Run\(fake, n = (\d+)\)", line)[0]) >= 6


def printed(report: Report) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table(every=True))
    return capture.get()


@pytest.mark.slow
def test_the_record_says_how_every_number_was_made(report: Report) -> None:
    record = report.run("fake").record
    assert record["protocol_id"] == "gen-final-v1-prefix-4tokens"
    assert (record["n_edits"], record["commit_size"], record["order_seed"]) == (6, 2, 0)
    assert record["base_model"] == "tiny-llama" and len(record["base_weights_hash"]) == 64
    assert record["mount"] == "bake" and record["dtype"] == "float32" and record["prep"] == {"seconds": 3}
    assert record["method"] == "rank_one" and len(record["patch_hash"]) == 64
    assert record["edit_s"]["commits"] == 3 and record["edit_s"]["median"] > 0
    assert record["bytes_per_edit"] == 3 * 4 * (64 + 128) / 6
    assert set(record["infer_ms"]) == {"base", "patched"} and record["peak_mem"] > 0
    assert {"versions", "hardware", "started", "tokenizer_hash", "data_hash"} <= set(record)
    assert record["health"]["change_max"] > 0
    stored = {(m["name"], m["split"], m["protocol"]): m["value"] for m in record["metrics"]}
    assert stored == {(m.name, m.split, m.protocol): m.value for m in report.run("fake").metrics().values()}


@pytest.mark.slow
def test_the_folder_gives_the_same_report_again(report: Report, out: Path, tmp_path: Path) -> None:
    again = facts.read_report(out)
    assert again.metrics() == report.metrics()
    assert [run.rows for run in again.runs] == [list(run.rows) for run in report.runs]
    lines = (out / "runs.jsonl").read_text().splitlines()
    assert {json.loads(line)["run_id"] for line in lines} == set(report.metrics())
    with pytest.raises(BadInput, match="holds no runs"):
        facts.read_report(tmp_path)


@pytest.mark.slow
def test_a_table_is_text_when_it_is_printed(report: Report) -> None:
    text = str(report.table())
    assert "object at" not in text and max(map(len, text.splitlines())) <= 100
    assert all(run.name in text for run in report.runs) and " ".join(report.verdict())[:40] in " ".join(text.split())


@pytest.mark.slow
def test_the_tables_hold_every_run_with_interval_and_count(report: Report) -> None:
    text = printed(report)
    for word in ("none", "fact_in_prompt", "fake", "reliability", "same_relation", "tf_success", "n=6", "forgetting"):
        assert word in text
    metric = report.run("fake").metric("loc_unchanged/same_relation")
    assert metric and f"{100 * metric.value:.1f}" in text
    assert "±" in text and metric.protocol in text


@pytest.mark.slow
def test_an_unfinished_run_says_so(report: Report) -> None:
    run = report.run("fake")
    part = replace(run, record=run.record | {"planned": 9})
    assert "fake (not finished: 1 of 9 chunks)" in printed(replace(report, runs=(part,)))


@pytest.mark.slow
def test_a_folder_without_a_finished_chunk_says_so_and_goes_on(
    edits: list[Edit], quick: Config, tmp_path: Path
) -> None:
    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        facts.run(tiny_lm("llama"), edits, quick, out=tmp_path, progress=stop)
    assert (tmp_path / "runs.jsonl").is_file()
    with pytest.raises(BadInput, match="no chunk of the runs in .* is finished"):
        facts.read_report(tmp_path)
    assert facts.run(tiny_lm("llama"), edits, quick, out=tmp_path).metrics()
    assert "reliability" in printed(facts.read_report(tmp_path))


class Page(HTMLParser):
    """Every tag and attribute of a page, and whether tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset") or name[:2] == "on"]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.slow
def test_the_page_needs_nothing_and_runs_nothing(report: Report, tmp_path: Path) -> None:
    text = report.save_html(tmp_path / "report.html").read_text()
    page = Page(text)
    assert not page.open, "a tag is left open"
    assert not page.links and not {"script", "link", "iframe", "img"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert page.tags.count("svg") == len({r.kind for r in report.rows if r.kind.startswith("loc/")}) + 1  # retention


def test_the_page_shows_each_edited_prompt_before_and_after(report: Report, tmp_path: Path) -> None:
    text = html.unescape(report.save_html(tmp_path / "report.html").read_text())
    for row in report.run("fake").rows:
        if row.kind == "edit" and row.when == "final":
            for shown in (row.prompt, row.base_text, row.text):
                assert (shown or "") in text


@pytest.mark.slow
def test_nothing_a_model_or_a_file_says_becomes_markup(report: Report, tmp_path: Path) -> None:
    rows = [
        replace(r, prompt=NASTY, text=NASTY, base_text="x", aliases=(NASTY,), flag=r.flag and NASTY)
        for r in report.rows
    ]
    run = report.run("fake")
    record = run.record | {"run_id": NASTY, "base_model": NASTY, "data_name": NASTY, "protocol_id": NASTY}
    nasty = replace(run, rows=[row for row in rows if row.run_id == "fake"], record=record)
    text = replace(report, runs=(nasty,)).save_html(tmp_path / "report.html").read_text()
    assert "<script" not in text and str(escape(NASTY)) in text
    assert not Page(text).open


@pytest.mark.slow
def test_reports_of_one_group_combine_and_share_their_baselines(
    report: Report, edits: list[Edit], make: Maker, quick: Config
) -> None:
    cfg = replace(quick, n=6, commit_size=2)
    other = facts.run(tiny_lm("llama"), edits, cfg, make=make, run_id="other")
    both = combine([report, other])
    assert [run.name for run in both.runs] == ["none", "fact_in_prompt", "fake", "other"]
    with pytest.raises(BadInput, match="one name"):
        combine([report, other, other])
    with pytest.raises(BadInput, match="at least one"):
        combine([])


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"commit_size": 3}, {"max_new_tokens": 5}, {"raw": True}, {"em_rule": "full"}, {"seed": 1}]
)
def test_numbers_of_different_protocols_never_share_a_table(
    report: Report, edits: list[Edit], quick: Config, change: dict[str, object]
) -> None:
    cfg = replace(replace(quick, n=6, commit_size=2), **change)  # type: ignore[arg-type]
    other = facts.run(tiny_lm("llama"), edits, cfg)
    for one in (report, replace(report, runs=report.runs[:2])):  # also where only baselines are there
        with pytest.raises(BadInput, match="cannot stand in one table"):
            combine([one, other])


@pytest.mark.slow
def test_another_base_or_other_data_are_another_group(report: Report, edits: list[Edit], quick: Config) -> None:
    cfg = replace(quick, n=6, commit_size=2)
    changed = [replace(edits[0], target="Berlin"), *edits[1:]]
    for lm, data in ((tiny_lm("llama", seed=1), edits), (tiny_lm("llama"), changed)):
        with pytest.raises(BadInput, match="cannot stand in one table"):
            combine([report, facts.run(lm, data, cfg)])


def test_a_name_that_is_not_there_lists_those_that_are(report: Report) -> None:
    with pytest.raises(BadInput, match="There are: none, fact_in_prompt, fake"):
        report.run("rome")
