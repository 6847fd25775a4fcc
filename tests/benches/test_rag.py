"""The RAG bench end to end on a tiny model: what counts as an answer, what is asked, and that nothing stays behind."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
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
from lmpatch.benches.context import examples
from lmpatch.benches.core import runner
from lmpatch.benches.core.adapter import adapt
from lmpatch.benches.core.report import Report, Run
from lmpatch.benches.core.stats import Number, collect, minus, numbers, total
from lmpatch.benches.rag import METRICS, Config, Row, Sample, judged, samples
from lmpatch.cli.app import build
from lmpatch.data.context import InContext
from lmpatch.data.rag.reader import Build, RagRecord, closed_book, read_questions, read_rag, write
from lmpatch.data.rag.reader import build as built
from lmpatch.errors import BadInput
from lmpatch.inference.closed_book import ClosedBookAnswer as Own
from lmpatch.inference.generate import generate
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap
from lmpatch.patches.ledger import applied, apply
from lmpatch.patches.weight.delta import LowRank
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.provenance import hash_tensors

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
    return Sample("x", "Towns", condition, InContext("p", "b"), "Who?", tuple(wanted), own, known)


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
        ("context", ["Rome", "Roma"], "Paris", "Roma", True),
        ("irrelevant", ["10th century"], "x", "the 10th-century", True),
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


@pytest.mark.parametrize("own", ["9th century", "10th century", "William", "William the Conqueror, 1066", "", "the"])
@pytest.mark.parametrize("gold", ["10th century", "William the Conqueror"])
def test_an_item_is_known_if_and_only_if_its_own_answer_repeated_is_a_hit(own: str, gold: str) -> None:
    record = RagRecord("When?", ("It rains.",), "robustness", "foreign", gold=(gold,), id="1:foreign")
    for s in samples([record], {"When?": own}):
        assert judged(s, own).hit is s.known


def test_under_context_any_true_answer_counts_and_under_conflict_only_the_documents() -> None:
    values: dict[str, Any] = {"kind": "adherence", "gold": ("Rome", "city of Rome"), "id": "1"}
    told = RagRecord("Where?", ("In the city of Rome.",), variant="original", answer="Rome", **values)
    changed = RagRecord("Where?", ("In the city of Oslo.",), variant="substituted", answer="Oslo", **values)
    found = {s.condition: s.wanted for s in samples([told, changed], {"Where?": ""})}
    assert found == {"context": ("Rome", "city of Rome"), "conflict": ("Oslo",)}


def test_memory_that_holds_the_documents_answer_is_no_conflict() -> None:
    record = RagRecord("Where?", ("In Oslo.",), "adherence", "substituted", "Oslo", ("Rome",), id="1")
    assert not samples([record], {"Where?": "it is in Rome or Oslo or Bergen"})  # token F1 is below one half


def test_a_question_with_several_foreign_documents_is_asked_without_one_only_once() -> None:
    records = [
        RagRecord("Where?", (text,), "robustness", "foreign", gold=("Rome",), id=id)
        for text, id in (("It rains.", "1:foreign"), ("It snows.", "1:foreign2"), ("It rains.", "2:foreign"))
    ]
    found = [(s.condition, s.id) for s in samples(records, {"Where?": ""})]
    assert [id for condition, id in found if condition == "irrelevant"] == ["1:foreign", "1:foreign2", "2:foreign"]
    assert [id for condition, id in found if condition == "empty"] == ["1:foreign", "2:foreign"]


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
    assert all(s.known for s in asked) and asked[4].asked.prompt == asked[3].asked.without_context
    assert [s.condition for s in samples(records, {"Where?": "Oslo"})] == ["context", "irrelevant", "empty"]


# Numbers


def row(id: str, condition: Any, hit: bool, known: bool = False, own: str = "x", article: str = "") -> Row:
    return Row(
        id=id, article=article or id, condition=condition, question="Who?", wanted=("Rome",), own=own, known=known,
        text="t", hit=hit, exact=hit, kept=hit,
    )  # fmt: skip


def metric(rows: Sequence[Row], name: str) -> Number | None:
    return total(name, collect(rows, METRICS), {"bootstrap": 0})


def difference(name: str, base: Sequence[Row], rows: Sequence[Row]) -> Number | None:
    return total(name, minus(collect(rows, METRICS), collect(base, METRICS)), {"bootstrap": 0})


def test_the_numbers_are_shares_of_the_rows_they_name() -> None:
    rows = [
        row("a", "conflict", True), row("b", "conflict", False, known=True), row("c", "mixed", True),
        row("d", "irrelevant", True, known=True), row("e", "irrelevant", False), row("f", "empty", True, known=True),
    ]  # fmt: skip
    found = {name: (m.value, m.n) for name, m in numbers(collect(rows, METRICS), {}).items()}
    assert found["R_Ad"] == (0.5, 2) and found["R_Ad/mixed"] == (1.0, 1) and found["R_Ad/known"] == (0.0, 1)
    assert found["R_Ro"] == (1.0, 1) and found["R_Ro/empty"] == (1.0, 1)
    assert found["kept"] == (0.5, 2) and found["accuracy/irrelevant"] == (0.5, 2) and "accuracy/context" not in found
    assert metric([row("a", "irrelevant", True, own="")], "kept") is None


def test_a_difference_is_taken_item_by_item() -> None:
    base = [row(str(i), "conflict", i % 2 == 0) for i in range(8)]
    same = difference("R_Ad", base, base)
    assert same and (same.value, same.stderr, same.n) == (0.0, 0.0, 8)
    more = difference("R_Ad", base, [row(r.id, "conflict", True) for r in base[:6]])
    assert more and more.value == 0.5 and more.n == 6
    assert more.stderr == pytest.approx(math.sqrt(0.3 / 6))
    assert metric([], "R_Ad") is None


def test_the_clustered_error_is_that_of_whole_articles() -> None:
    """Copies of an item in its article add nothing, which the plain error does not see."""
    once = [row(str(i), "conflict", i % 2 == 0) for i in range(8)]
    copies = [row(f"{i}{k}", "conflict", i % 2 == 0, article=str(i)) for i in range(8) for k in range(9)]
    few, many = metric(once, "R_Ad"), metric(copies, "R_Ad")
    assert few and many and few.stderr and many.stderr
    assert few.clustered == pytest.approx(few.stderr)  # one item an article: they agree
    assert many.clustered == pytest.approx(few.clustered) and many.stderr < few.stderr / 2
    alone = metric([row("1", "conflict", True)], "R_Ad")
    assert alone and (alone.value, alone.n, alone.stderr, alone.clustered) == (1.0, 1, None, None)
    one = metric([row("1", "conflict", True, article="a"), row("2", "conflict", False, article="a")], "R_Ad")
    assert one and one.clustered is None


def test_a_report_compares_any_two_runs() -> None:
    hits = {"none": [False] * 4, "a": [True, False, False, False], "b": [True, True, True, False]}
    runs = [
        Run(adapt(rag), {"run_id": name}, [row(str(i), "conflict", hit) for i, hit in enumerate(own)], ())
        for name, own in hits.items()
    ]
    report = Report(adapt(rag), tuple(runs))
    moved = {to: report.difference("b", "R_Ad", to).value for to in hits}  # type: ignore[union-attr]
    assert moved == {"none": 0.75, "a": 0.5, "b": 0.0} and report.difference("b", "R_Ad").value == 0.75  # type: ignore[union-attr]


def test_a_sum_of_two_numbers_has_the_error_of_both_and_articles_tie_them() -> None:
    ad = [row(f"a{i}", "conflict", i % 2 == 0, article=str(i)) for i in range(6)]
    ro = [row(f"r{i}", "irrelevant", i % 2 == 0, known=True, article=str(i)) for i in range(6)]
    parts = [metric(ad + ro, name) for name in ("R_Ad", "R_Ro")]
    both = metric(ad + ro, "R_Ad+R_Ro")
    assert both and all(parts) and both.value == 1.0 and both.n == 12
    assert both.stderr == pytest.approx(math.hypot(*(p.stderr for p in parts)))  # type: ignore[union-attr]
    assert both.clustered == pytest.approx(sum(p.clustered for p in parts))  # type: ignore[union-attr]
    assert metric(ad, "R_Ad+R_Ro") is None
    assert difference("R_Ad+R_Ro", ad + ro, ad + ro).value == 0.0  # type: ignore[union-attr]


# Runs


@pytest.mark.slow
def test_the_unpatched_answers_are_those_of_the_plain_call(tiny: LM, records: list[RagRecord]) -> None:
    report = rag.run(tiny, records, QUICK)
    items = rag.plan(tiny, records, QUICK)
    assert {s.condition for s in items} == {"context", "conflict", "mixed", "irrelevant", "empty"}
    conflicts, mixed = ([s.id.partition(":")[0] for s in items if s.condition == c] for c in ("conflict", "mixed"))
    assert mixed == conflicts[: len(mixed)] and len(mixed) == 2  # half as many, of the same questions
    for s, r in zip(items, report.run("none").rows, strict=True):
        assert r.text == generate(tiny, s.asked.prompt, max_new_tokens=4).strip()
        assert s.own == generate(tiny, closed_book(s.question), max_new_tokens=16).strip()


@pytest.mark.slow
def test_a_run_leaves_no_trace_and_its_rows_are_the_patched_models(
    tiny: LM, records: list[RagRecord], patch: WeightPatch, tmp_path: Path
) -> None:
    before = hash_tensors(sorted(tiny.model.state_dict().items()), exact=True)
    report = rag.run(tiny, records, QUICK, patch=patch, out=tmp_path / "out", data_name="s")
    assert hash_tensors(sorted(tiny.model.state_dict().items()), exact=True) == before and not applied(tiny)
    items = rag.plan(tiny, records, QUICK)
    with apply(tiny, patch):
        wanted = [r.text for r in rag.ask(tiny, items, QUICK)]
    assert [r.text for r in report.run("rank_one").rows] == wanted
    assert wanted != [r.text for r in report.run("none").rows]
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table())
    assert "R_Ad" in capture.get() and "rank_one" in capture.get()
    page = report.save_html(tmp_path / "page.html").read_text()
    assert "At a glance" in page and "accuracy/conflict" in page and "<script" not in page


@pytest.mark.slow
def test_parenting_ircan_cad_and_a_memory_are_on_at_once_and_leave_every_bit(records: list[RagRecord]) -> None:
    from lmpatch.methods.decoding import CAD, METHODS
    from lmpatch.methods.ircan import method as ircan
    from lmpatch.methods.parenting import method as parenting
    from lmpatch.methods.recipe import method as recipe
    from lmpatch.patches.patch import Patch

    lm = wrap(tiny_model("llama", max_position_embeddings=4096), tiny_tokenizer(), name="tiny")
    before = hash_tensors(sorted(lm.model.state_dict().items()), exact=True)
    told, facts = ircan.example(lm), [lp.Edit(s, "Rome") for s in ("The tower is in", "The mayor lives in")]
    patches: list[Patch] = [
        parenting.fit(lm, *parenting.example(lm)), ircan.fit(lm, *told),
        METHODS["cad"].fit(lm, told[0], CAD(alpha=1.0)),
        recipe.fit(lm, facts, recipe.Config(gate="always"), editor=recipe.example_editor(lm)),
    ]  # fmt: skip
    report = rag.run(lm, records, QUICK, patch=patches)
    assert hash_tensors(sorted(lm.model.state_dict().items()), exact=True) == before and not applied(lm)
    (base, run) = report.runs
    assert run.name == "parenting + ircan + cad + recipe"
    assert [p["mount"] for p in run.record["patches"]] == ["bake", "bake", "run", "run"]
    items = rag.plan(lm, records, QUICK)
    texts = []
    for some in (patches, patches[1:], patches[:1] + patches[2:], patches[:2] + patches[3:], patches[:3]):
        with ExitStack() as stack:
            for patch in some:
                stack.enter_context(apply(lm, patch))
            texts.append([r.text for r in rag.ask(lm, items, QUICK)])
    assert [r.text for r in run.rows] == texts[0] != [r.text for r in base.rows]
    assert all(texts[0] != without for without in texts[1:])  # each of the four has its part


@pytest.mark.slow
def test_a_built_file_of_dev_articles_can_be_asked_and_one_of_training_articles_cannot(tmp_path: Path) -> None:
    source, cfg = squad(tmp_path / "s.jsonl"), Build()
    write(built(read_questions(source), cfg), tmp_path / "sets", source=source, cfg=cfg)
    for part in ("dev", "held_out"):
        assert {r.part for r in rag.load(tmp_path / f"sets/{part}.jsonl")} == {part}
    with pytest.raises(BadInput, match="no records of the part held_out"):
        rag.load(tmp_path / "sets/train.jsonl")


# Few-shot prompts


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """The built files."""
    source, cfg = squad(tmp_path / "s.jsonl"), Build()
    write(built(read_questions(source), cfg), tmp_path / "sets", source=source, cfg=cfg)
    return tmp_path / "sets"


def test_examples_are_of_both_skills_in_turn_and_no_question_comes_twice(sets: Path) -> None:
    train = read_rag(sets / "train.jsonl")
    for seed in range(3):
        found = examples.chosen(train, 4, seed)
        assert [r.variant for r in found] == ["substituted", "foreign", "original", "foreign"]
        assert len({r.question for r in found}) == 4 and found == examples.chosen(train[::-1], 4, seed)
    assert examples.chosen(train, 4, 0) != examples.chosen(train, 4, 1)
    told, foreign = examples.chosen(train, 2, 0)
    wanted = f"{told.prompt}{told.answer}\n\n{foreign.prompt}{foreign.gold[0]}\n\n"
    assert examples.written([told, foreign]) == wanted
    with pytest.raises(BadInput, match="Give fewer shots"):
        examples.chosen([told, foreign], 4, 0)


def test_a_raw_file_gives_the_same_examples_as_the_files_built_of_it(sets: Path) -> None:
    both = [rag.load(path).pool.records for path in (sets / "held_out.jsonl", sets.parent / "s.jsonl")]
    assert both[0] == both[1] and {r.part for r in both[0]} == {"train"}


@pytest.mark.slow
def test_examples_stand_before_every_prompt_of_a_further_baseline_and_of_the_patched_model(
    tiny: LM, patch: WeightPatch, sets: Path, tmp_path: Path
) -> None:
    held, few = rag.load(sets / "held_out.jsonl"), replace(QUICK, shots=2)
    train = read_rag(sets / "train.jsonl")
    shown = examples.written(examples.chosen(train, 2, few.seed))
    report = rag.run(tiny, held, few, patch=patch, out=tmp_path / "out")
    plain = rag.run(tiny, held, replace(few, few_shot=False), patch=patch, run_id="plain", out=tmp_path / "out")
    assert [run.name for run in report.runs] == ["none", "none, 2 shots", "rank_one"]
    items = rag.plan(tiny, held, few)
    assert {s.question for s in items}.isdisjoint({r.question for r in train})
    for s, bare, told in zip(items, report.run("none").rows, report.run("none, 2 shots").rows, strict=True):
        assert bare.text == generate(tiny, s.asked.prompt, max_new_tokens=4).strip()
        assert told.text == generate(tiny, shown + s.asked.prompt, max_new_tokens=4).strip()
    with apply(tiny, patch):
        texts = [
            [generate(tiny, text + s.asked.prompt, max_new_tokens=4).strip() for s in items] for text in (shown, "")
        ]
    assert [r.text for r in report.run("rank_one").rows] == texts[0]
    assert [r.text for r in plain.run("plain").rows] == texts[1] != texts[0]
    with pytest.raises(BadInput, match="shots 2, asked now 4"):
        rag.run(tiny, held, replace(few, shots=4), patch=patch, out=tmp_path / "out")


def test_in_a_few_shot_prompt_only_the_documents_of_the_question_itself_are_left_out(
    tiny: LM, records: list[RagRecord]
) -> None:
    item = rag.plan(tiny, records, replace(QUICK, shots=2))[0]
    both = examples.behind(item.shown, item.asked)
    assert both.prompt == item.shown + item.asked.prompt
    assert both.without_context == item.shown + item.asked.without_context != both.prompt


def test_examples_that_are_not_there_are_refused(tiny: LM, sets: Path) -> None:
    held = rag.load(sets / "held_out.jsonl")
    with pytest.raises(BadInput, match="plain records have none"):
        rag.run(tiny, list(held), replace(QUICK, shots=2))
    with pytest.raises(BadInput, match="shots is -1"):
        rag.run(tiny, held, replace(QUICK, shots=-1))
    (sets / "train.jsonl").unlink()
    with pytest.raises(BadInput, match=r"train\.jsonl, which is missing"):
        rag.run(tiny, held, replace(QUICK, shots=2))


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_the_base_is_asked_once(
    tiny: LM, records: list[RagRecord], patch: WeightPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rag.run(tiny, records, QUICK, patch=patch)
    monkeypatch.setattr(runner, "BLOCK", 4)

    def stop(done: int, _: int, what: str) -> None:
        if what == "scoring rank_one" and done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rag.run(tiny, records, QUICK, patch=patch, out=tmp_path / "out", progress=stop)
    asked: list[int] = []
    real: Callable[..., Any] = rag.ask
    monkeypatch.setattr(rag, "ask", lambda lm, items, cfg: asked.append(len(items)) or real(lm, items, cfg))
    report = rag.run(tiny, records, QUICK, patch=patch, out=tmp_path / "out")
    assert sum(asked) == len(whole.run("none").rows) - 8
    for name in ("none", "rank_one"):
        assert [r.text for r in report.run(name).rows] == [r.text for r in whole.run(name).rows]
    assert rag.read_report(tmp_path / "out").run("rank_one").metric("kept")


@pytest.mark.slow
def test_items_the_model_knows_come_first_among_irrelevant_ones(
    tiny: LM, records: list[RagRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = [r for r in records if r.variant == "foreign"]
    right = {r.question: r.gold[0] for r in foreign[-2:]}
    own = {q: Own(right.get(q, "nothing"), True) for q in (r.question for r in records)}
    monkeypatch.setattr(rag, "closed_book_answers", lambda _, asked, **__: [own[q] for q in asked])
    items = rag.plan(tiny, records, Config(n=3, conditions=("irrelevant",)))
    assert [s.known for s in items] == [True, True, False]


@pytest.mark.slow
def test_what_cannot_be_asked_is_said(tiny: LM, records: list[RagRecord], patch: WeightPatch) -> None:
    with pytest.raises(BadInput, match="no condition 'noise'"):
        rag.run(tiny, records, Config(conditions=("noise",)))
    with pytest.raises(BadInput, match="nothing is left"):
        rag.run(tiny, [r for r in records if r.variant == "foreign"], Config(conditions=("conflict",)))
    with apply(tiny, patch), pytest.raises(BadInput, match="carries patches"):
        rag.run(tiny, records, QUICK)


@pytest.mark.slow
def test_an_item_longer_than_the_window_is_not_asked_and_counts_nowhere(
    tiny: LM, records: list[RagRecord], patch: WeightPatch, tmp_path: Path
) -> None:
    cfg = Config(n=50, max_new_tokens=4, conditions=("context", "empty"))
    first, *rest = [r for r in records if r.variant == "original"]
    long = replace(first, documents=("It rains. " * 1000,), prompt="")
    told = [long, *rest, *(r for r in records if r.variant == "foreign")]
    report = rag.run(tiny, told, cfg, patch=patch, out=tmp_path)
    short = rag.run(tiny, told[1:], cfg, patch=patch)
    for run in report.runs:
        (row,) = [row for row in run.rows if row.flag]
        assert (row.id, row.flag) == (first.id, "longer than the model's window of 4096 tokens")
        for name in ("accuracy/context", "exact/context", "R_Ro/empty"):
            assert run.metric(name) == short.run(run.name).metric(name)
    assert report.difference("rank_one", "accuracy/context") == short.difference("rank_one", "accuracy/context")
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(rag.read_report(tmp_path).table())
    assert "longer than the model's window of 4096 tokens" in capture.get()
    alone = rag.run(tiny, told[:1], replace(cfg, conditions=("context",)), patch=patch)
    assert all(row.flag for row in alone.rows) and alone.run("none").metric("accuracy/context") is None
    assert alone.save_html(tmp_path / "page.html").is_file()


@pytest.mark.slow
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
