"""What every bench keeps: equal rows after a kill, the model as it was, errors on every number, nothing cut."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from general_files import write
from rag_files import squad
from rich.console import Console
from tiny import tiny_model, tiny_tokenizer

from lmpatch import registry
from lmpatch.benches.core import runner
from lmpatch.benches.core.adapter import adapt
from lmpatch.benches.core.contract import Settings
from lmpatch.benches.core.store import Store
from lmpatch.benches.core.tables import label
from lmpatch.data.context import ContextRecord
from lmpatch.data.edits import Ask, Edit
from lmpatch.errors import BadRecord, MissingExtra
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap
from lmpatch.patches.ledger import applied
from lmpatch.patches.weight.delta import LowRank
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.provenance import hash_tensors

BENCHES = registry.names("benches")
WINDOW = 640
LONG = "The Eiffel Tower is in the city of Paris, and Tokyo is not. " * 60


@dataclass
class Case:
    """A bench with data that a tiny model can be asked."""

    module: ModuleType
    data: Any
    cfg: Any
    lm: LM
    patch: WeightPatch

    def run(self, **how: Any) -> Any:
        return runner.run(self.module, self.lm, self.data, self.cfg, patch=self.patch, **how)


def material(name: str, folder: Path, long: bool = False) -> tuple[Any, dict[str, Any]]:
    """Data, and settings that keep it short; with ``long`` one record is longer than any window."""
    places = ("Paris", "Rome", "Tokyo", "Seattle", "Japan")
    if name == "facts":
        edits = [
            Edit(f"The tower of {place} is in", "Oslo", f"tower of {place}", old=place, id=place,
                 rephrases=[(LONG if long and not i else "") + f"You find the tower of {place} in"],
                 locality={"near": [Ask(f"The capital of {place} is", (place,))]})
            for i, place in enumerate(places)
        ]  # fmt: skip
        return edits, {"max_new_tokens": 3, "latency": False}
    if name in ("memotrap", "kre"):
        options = ("Paris", "Seattle", "Tokyo") if name == "kre" else ()
        records = [
            ContextRecord((LONG if long and not i else "") + f"The {thing} is in Rome.", f"Where is the {thing}?",
                          "ABC"[i % 3] if options else "Rome", "ABC"[(i + 1) % 3] if options else "Paris",
                          options=options, id=thing)
            for i, thing in enumerate(places)
        ]  # fmt: skip
        return records, {"baselines": ("opin",)}
    if name == "general":
        data = registry.get("benches", name).load(write(folder / "data"))
        if long:
            first = data.samples[0]
            data = replace(data, samples=(replace(first, prompts=(LONG + first.prompts[0],), id="long"), *data.samples))
        return data, {"tasks": ("csqa", "anli", "squad")}
    records = registry.get("benches", "rag").load(squad(folder / "s.jsonl"))
    if long:
        at = next(i for i, r in enumerate(records) if r.variant == "original")
        records = [replace(records[at], documents=(LONG,), prompt=""), *records[at + 1 : at + 9]]
    return records, {"n": 50 if long else 4, "max_new_tokens": 3}


def build(name: str, folder: Path, long: bool = False) -> Case:
    module, (data, settings) = registry.get("benches", name), material(name, folder, long)
    lm = wrap(tiny_model("llama", max_position_embeddings=WINDOW), tiny_tokenizer(), name="tiny")
    source = torch.Generator().manual_seed(0)
    b, a = torch.randn(lm.layout.d_model, 1, generator=source), torch.randn(1, 128, generator=source)
    patch = WeightPatch.make(lm, {lm.layout.weight(lm.layout.downs[1]): LowRank(b, a)}, method="rank_one")
    return Case(module, data, module.Config(bootstrap=20, **settings), lm, patch)


@pytest.fixture(scope="module", autouse=True)
def short_parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMPATCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(runner, "BLOCK", 2)
        yield


@pytest.fixture(scope="module", params=BENCHES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, short_parts: None) -> Case:
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def out(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ``report``; not to be written to."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def report(case: Case, out: Path) -> Any:
    """A whole run, once a bench."""
    return case.run(out=out, data_name="<script>x</script>")


def bits(lm: LM) -> str:
    return hash_tensors(sorted(lm.model.state_dict().items()), exact=True)


@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_has_what_the_contract_says(name: str) -> None:
    bench = adapt(registry.get("benches", name))
    assert bench.name == name and issubclass(bench.Config, Settings) and bench.question.endswith("?")
    assert all(measure.means and (measure.derived or measure.value) for measure in bench.metrics.values())
    assert any(measure.headline for measure in bench.metrics.values())


@pytest.mark.slow
def test_a_killed_run_goes_on_to_equal_rows_and_the_model_comes_back(case: Case, report: Any, tmp_path: Path) -> None:
    before, seen = bits(case.lm), []

    def stop(done: int, total: int, what: str) -> None:
        seen.append(what)
        if what.startswith("scoring rank_one") or len(seen) == 4:
            raise KeyboardInterrupt

    out, kills = tmp_path / "out", 0
    while kills < 3:
        seen.clear()
        try:
            case.run(out=out, progress=stop)
            break
        except KeyboardInterrupt:
            kills += 1
            assert bits(case.lm) == before and not applied(case.lm)
            with (out / "rows.jsonl").open("a") as file:
                file.write('{"run_id": "none", "chu')
    assert kills >= 1
    again = case.run(out=out)
    assert again.rows == report.rows and again.metrics() == report.metrics()
    assert bits(case.lm) == before and not applied(case.lm)
    lines = (out / "rows.jsonl").read_bytes()
    case.run(out=out)
    assert (out / "rows.jsonl").read_bytes() == lines


@pytest.mark.slow
def test_what_is_missing_doubled_or_changed_in_a_folder_is_noticed_on_reading_and_on_resume(
    case: Case, report: Any, out: Path, tmp_path: Path
) -> None:
    assert case.module.read_report(out).rows == report.rows
    for name in ("rows.jsonl", "chunks.jsonl", "runs.jsonl"):
        data = (out / name).read_bytes()
        lines = data.splitlines(keepends=True)
        at = len(data) // 3
        flipped = data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :]
        cases = [lines[1:], lines[:-1], lines[:1] + lines[2:], [*lines, lines[-1]], [lines[0], *lines], [flipped]]
        for i, other in enumerate(cases):
            folder = shutil.copytree(out, tmp_path / f"{name} {i}")
            (folder / name).write_bytes(b"".join(other))
            with pytest.raises(BadRecord):
                case.module.read_report(folder)
        with pytest.raises(BadRecord):
            case.run(out=folder)


@pytest.mark.slow
def test_every_number_has_n_and_an_error(report: Any) -> None:
    assert {run.name for run in report.runs} >= {"none", "rank_one"}
    for run in report.runs:
        assert run.metrics()
        for name, number in run.metrics().items():
            assert number.n >= 1 and math.isfinite(number.value), name
            assert (number.stderr is None) == (number.n == 1), name
            if number.n > 1 and number.low is not None:
                assert number.low - 1e-9 <= number.high + 1e-9, name
    moved = report.differences("rank_one")
    assert moved and all(number.stderr is not None for number in moved.values() if number.n > 1)
    assert all(number.value == 0 for number in report.differences("none").values())


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHES)
def test_what_is_longer_than_the_window_is_not_asked_and_said_so(name: str, tmp_path: Path) -> None:
    case = build(name, tmp_path, long=True)
    report = case.run()
    for run in (report.run("none"), report.run("rank_one")):
        flags = {row.flag for row in run.rows if row.flag.startswith("longer")}
        assert flags == {"longer than the model's window of 640 tokens"}
        long = [row for row in run.rows if row.flag.startswith("longer")]
        assert all(row.example() is None and row.generation() is None for row in long)
    assert "longer than the model's window of 640 tokens" in printed(report)


def printed(report: Any) -> str:
    console = Console(width=250, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table(every=True))
    return capture.get()


@pytest.mark.slow
def test_the_report_says_it_all_and_needs_nothing(case: Case, report: Any, out: Path, tmp_path: Path) -> None:
    page = report.save_html(tmp_path / "page.html").read_text()
    assert "<script" not in page and "http" not in page and "rank_one against the unpatched model" in page
    text = printed(report)
    for name, number in report.run("rank_one").metrics().items():
        if report.run("rank_one").values[name][0].shown:
            assert label(name) in page and name.partition("@")[0] in text and f"n={number.n}" in text
    whole = json.loads(report.to_json())
    assert whole["runs"][-1]["metrics"].keys() == report.run("rank_one").metrics().keys()
    assert "<table" in report._repr_html_() and "<script" not in report._repr_html_()
    bench = adapt(case.module)
    again = Store(out, bench.Row.read)
    assert [asdict(row) for row in again.rows_of("none")] == [asdict(row) for row in report.run("none").rows]
    if any(row.generation() for row in report.rows):
        assert {"repeats", "distinct_2"} <= report.run("none").metrics().keys()


def test_the_extra_bench_installs_all_that_a_report_offers_in_tested_versions() -> None:
    root = Path(__file__).parents[1]
    (extra,) = re.findall(r"^bench = \[(.*?)\]", (root / "pyproject.toml").read_text(), re.M)
    names = re.findall(r'"(\w+)>=', extra)
    assert names == ["jinja2", "pandas", "scipy"]
    held = (root / "constraints.txt").read_text()
    assert all(re.search(f"^{name}==", held, re.M) for name in names)


@pytest.mark.slow
def test_without_pandas_to_pandas_says_what_to_install(report: Any) -> None:
    pytest.importorskip("scipy")
    try:
        import pandas  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtra, match="pip install pandas"):
            report.to_pandas()
    else:
        assert len(report.to_pandas()) > 0
