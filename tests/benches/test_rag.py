"""The RAG bench end to end on a tiny model: what counts as an answer, what is asked, and that nothing stays behind."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rag_files import squad
from rich.console import Console
from tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

import lmpatch as lp
from lmpatch.benches import rag
from lmpatch.benches._rag_rows import Row, Sample, chosen, difference, judged, mean, metrics, samples
from lmpatch.benches.rag import Config
from lmpatch.cli.app import build
from lmpatch.data.context import InContext
from lmpatch.data.rag import RagRecord, closed_book
from lmpatch.errors import BadInput
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap
from lmpatch.models.run import generate
from lmpatch.patches.delta import LowRank
from lmpatch.patches.ledger import applied, apply
from lmpatch.patches.weight import WeightPatch
from lmpatch.record import hash_tensors

QUICK = Config(n=4, max_new_tokens=4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny() -> LM:
    """With a window that a tokenizer of single letters does not fill."""
    return wrap(tiny_model("llama", max_position_embeddings=4096), tiny_tokenizer(), name="tiny")


@pytest.fixture
def records(tmp_path: Path) -> list[RagRecord]:
    return rag.load(squad(tmp_path / "s.jsonl"))


@pytest.fixture
def patch(tiny: LM) -> WeightPatch:
    layout = tiny.layout
    source = torch.Generator().manual_seed(0)
    b, a = torch.randn(layout.d_model, 1, generator=source), torch.randn(1, layout.d_ff, generator=source)
    return WeightPatch.make(tiny, {layout.weight(layout.downs[1]): LowRank(b, a)}, method="rank_one")


def sample(condition: Any, wanted: Sequence[str], own: str = "", known: bool = False) -> Sample:
    return Sample("x", condition, InContext("p", "b"), "Who?", tuple(wanted), own, known)


# When an answer counts


@pytest.mark.parametrize(
    ("condition", "wanted", "own", "text", "hit"),
    [
        ("conflict", ["Rome"], "Paris", "It is Rome.", True),
        ("conflict", ["Rome"], "Paris", "Rome, not Paris", False),  # its own answer stands beside
        ("conflict", ["Rome"], "Paris", "Paris", False),
        ("conflict", ["Rome"], "Paris", "Romeo", False),  # whole words
        ("conflict", ["May 1953"], "1953", "in May 1953", True),  # its own answer is inside the wanted one
        ("conflict", ["New Rome City"], "Rome", "New Rome City", True),
        ("conflict", ["New Rome City"], "Rome", "New Rome City or Rome", False),
        ("irrelevant", ["Rome"], "Rome", "Rome", True),
        ("irrelevant", ["Rome", "Roma"], "Paris", "roma!", True),
        ("irrelevant", ["Rome"], "Rome", "I do not know", False),
        ("conflict", ["Rome"], "", "Rome", True),
    ],
)
def test_a_hit_has_the_wanted_answer_and_under_conflict_not_its_own(
    condition: Any, wanted: list[str], own: str, text: str, hit: bool
) -> None:
    assert judged(sample(condition, wanted, own), text).hit is hit


def test_exact_and_kept_answers() -> None:
    row = judged(sample("irrelevant", ["The Rome"], "old Paris"), "rome.")
    assert row.exact and not row.kept
    assert judged(sample("irrelevant", ["Rome"], "old Paris"), "Paris").kept
    assert not judged(sample("irrelevant", ["Rome"], ""), "").kept


def test_questions_without_a_conflict_or_a_true_answer_are_not_asked() -> None:
    kinds: list[tuple[Any, Any, str, tuple[str, ...]]] = [
        ("adherence", "original", "Rome", ("Rome",)),
        ("adherence", "substituted", "Oslo", ("Rome",)),
        ("adherence", "mixed", "Oslo", ("Rome",)),
        ("robustness", "foreign", "", ("Rome",)),
        ("robustness", "unanswerable", "", ("Rome",)),
        ("robustness", "foreign", "", ()),
        ("extraction", "three", "Doc 1: relevant", ("Rome",)),
    ]
    records = [RagRecord("Where?", ("It rains.",), k, v, a, g, id=str(i)) for i, (k, v, a, g) in enumerate(kinds)]
    asked = samples(records, {"Where?": "Rome"})
    assert [s.condition for s in asked] == ["context", "conflict", "mixed", "irrelevant", "empty"]
    assert all(s.known for s in asked) and asked[4].asked.prompt == asked[3].asked.bare
    assert [s.condition for s in samples(records, {"Where?": "Oslo"})] == ["context", "irrelevant", "empty"]


# Numbers


def row(id: str, condition: Any, hit: bool, known: bool = False, own: str = "x") -> Row:
    return Row("r", 0, id, condition, "Who?", ("Rome",), own, known, "t", hit, hit, hit)


def test_the_numbers_are_shares_of_the_rows_they_name() -> None:
    rows = [
        row("a", "conflict", True), row("b", "conflict", False), row("c", "mixed", True),
        row("d", "irrelevant", True, known=True), row("e", "irrelevant", False), row("f", "empty", True, known=True),
    ]  # fmt: skip
    found = {m.name: (m.value, m.n) for m in metrics(rows)}
    assert found["R_Ad"] == (0.5, 2) and found["R_Ad/mixed"] == (1.0, 1)
    assert found["R_Ro"] == (1.0, 1) and found["R_Ro/empty"] == (1.0, 1)
    assert found["kept"] == (0.5, 2) and found["accuracy/irrelevant"] == (0.5, 2) and "accuracy/context" not in found
    assert chosen([row("a", "irrelevant", True, own="")], "kept") == []


def test_a_difference_is_taken_item_by_item() -> None:
    base = [row(str(i), "conflict", i % 2 == 0) for i in range(8)]
    same = difference("R_Ad", base, base)
    assert same and (same.value, same.stderr, same.n) == (0.0, 0.0, 8)
    more = difference("R_Ad", base, [row(r.id, "conflict", True) for r in base[:6]])
    assert more and more.value == 0.5 and more.n == 6
    assert more.stderr == pytest.approx(math.sqrt(0.3 / 6))
    assert mean("x", []) is None


# Runs


def test_the_unpatched_answers_are_those_of_the_plain_call(tiny: LM, records: list[RagRecord]) -> None:
    report = rag.run(tiny, records, QUICK)
    items = rag.prepare(tiny, records, QUICK)
    assert {s.condition for s in items} == {"context", "conflict", "mixed", "irrelevant", "empty"}
    for s, r in zip(items, report.run("none").rows, strict=True):
        assert r.text == generate(tiny, s.asked.prompt, max_new_tokens=4).strip()
        assert s.own == generate(tiny, closed_book(s.question), max_new_tokens=16).strip()


def test_a_run_leaves_no_trace_and_its_rows_are_the_patched_models(
    tiny: LM, records: list[RagRecord], patch: WeightPatch, tmp_path: Path
) -> None:
    before = hash_tensors(sorted(tiny.model.state_dict().items()), exact=True)
    report = rag.run(tiny, records, QUICK, patch=patch, out=tmp_path / "out", data_name="s")
    assert hash_tensors(sorted(tiny.model.state_dict().items()), exact=True) == before and not applied(tiny)
    items = rag.prepare(tiny, records, QUICK)
    with apply(tiny, patch):
        wanted = [r.text for r in rag.score(tiny, items, QUICK)]
    assert [r.text for r in report.run("rank_one").rows] == wanted
    assert wanted != [r.text for r in report.run("none").rows]
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table())
    assert "R_Ad" in capture.get() and "rank_one" in capture.get()
    page = report.save_html(tmp_path / "page.html").read_text()
    assert "Robustness against adherence" in page and "<script" not in page


def test_a_stopped_run_goes_on_and_the_base_is_asked_once(
    tiny: LM, records: list[RagRecord], patch: WeightPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rag.run(tiny, records, QUICK, patch=patch)
    monkeypatch.setattr(rag, "BLOCK", 4)

    def stop(done: int, _: int, what: str) -> None:
        if what == "asking rank_one" and done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rag.run(tiny, records, QUICK, patch=patch, out=tmp_path / "out", progress=stop)
    asked: list[int] = []
    real: Callable[..., Any] = rag.score
    monkeypatch.setattr(rag, "score", lambda lm, items, cfg: asked.append(len(items)) or real(lm, items, cfg))
    report = rag.run(tiny, records, QUICK, patch=patch, out=tmp_path / "out")
    assert sum(asked) == len(whole.run("none").rows) - 8
    for name in ("none", "rank_one"):
        assert [r.text for r in report.run(name).rows] == [r.text for r in whole.run(name).rows]
    assert [m.value for m in metrics(rag.read_report(tmp_path / "out").run("rank_one").rows)]


def test_items_the_model_knows_come_first_among_irrelevant_ones(
    tiny: LM, records: list[RagRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = [r for r in records if r.variant == "foreign"]
    right = {r.question: r.gold[0] for r in foreign[-2:]}
    monkeypatch.setattr(rag, "closed_book_answers", lambda _, asked, **__: [right.get(q, "nothing") for q in asked])
    items = rag.prepare(tiny, records, Config(n=3, conditions=("irrelevant",)))
    assert [s.known for s in items] == [True, True, False]


def test_what_cannot_be_asked_is_said(tiny: LM, records: list[RagRecord], patch: WeightPatch) -> None:
    with pytest.raises(BadInput, match="no condition 'noise'"):
        rag.run(tiny, records, Config(conditions=("noise",)))
    with pytest.raises(BadInput, match="nothing is left"):
        rag.run(tiny, [r for r in records if r.variant == "foreign"], Config(conditions=("conflict",)))
    with apply(tiny, patch), pytest.raises(BadInput, match="carries patches"):
        rag.run(tiny, records, QUICK)


def test_it_runs_from_python_and_the_command_line(
    tiny: LM, patch: WeightPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = squad(tmp_path / "s.jsonl")
    report = lp.bench(tiny, "rag", source, patch=patch, n=2, max_new_tokens=2)
    assert {run.name for run in report.runs} == {"none", "rank_one"}
    patch.save(tmp_path / "patch")
    monkeypatch.setattr("lmpatch.models.load.load", lambda *_, **__: tiny)
    words = ["bench", "tiny", "rag", source, "-p", tmp_path / "patch", "--set", "n=2", "-o", tmp_path / "out"]
    done = CliRunner().invoke(build(), list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0 and (tmp_path / "out/report.html").is_file()
    assert json.loads((tmp_path / "out/runs.jsonl").read_text().splitlines()[0])["bench"] == "rag"
