"""benchmarks/parenting.py on a tiny model: chosen on dev, measured on held-out articles, resumed, refused if stale."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rag_files import records, squad
from tiny import tiny_model, tiny_tokenizer

from lmpatch.data.rag.reader import RagRecord, holds
from lmpatch.inference.closed_book import ClosedBookAnswer
from lmpatch.models.load import wrap

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GOLD = {r["question"]: r["answers"][0]["text"] for r in records() if r["answers"]}


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``fair/search.py``, as the script imports it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fair.search")


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``fair/control.py``."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fair.control")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``tables/parenting.py``."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tables.parenting")


@pytest.fixture
def script(search: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with a tiny model that is said to know every second answer."""
    spec = importlib.util.spec_from_file_location("benchmark_parenting", BENCHMARKS / "parenting.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lm = wrap(tiny_model("llama", max_position_embeddings=8192), tiny_tokenizer(), name="tiny")
    monkeypatch.setattr(module.lp, "load", lambda *_, **__: lm)

    def own(_: Any, asked: Any, **__: Any) -> list[ClosedBookAnswer]:
        return [ClosedBookAnswer(GOLD.get(q, "a mouse") if len(q) % 2 else "a mouse", True) for q in asked]

    for place in ("lmpatch.benches.rag", "lmpatch.methods.parenting.data"):
        monkeypatch.setattr(f"{place}.closed_book_answers", own)
    monkeypatch.setattr(module, "closed_book_answers", own)
    return module


def words(tmp_path: Path, *more: str) -> list[str]:
    quick = ("rank=2", "mine_steps=2", "mine_rows=2", "cue_rows=4", "warmup=0", "modules=mlp")
    return [
        str(squad(tmp_path / "s.jsonl")), "--out", str(tmp_path / "out"), "--n", "4", "--dev-n", "2", "--steps", "2",
        "--tries", "2", "--seeds", "2", "--ircan-examples", "2", *more, "--set", *quick,
    ]  # fmt: skip


# What is tried


@pytest.mark.parametrize("name", ["plain", "parenting", "format_only", "mixed", "cad", "ircan"])
@pytest.mark.parametrize("best", [-2, -1, 0, 1, 2])
def test_every_method_spends_the_same_tries_and_its_optimum_lies_inside(search: Any, name: str, best: int) -> None:
    """The best value lies this many steps from where the search starts."""
    space = (search.SPACES | search.PROMPTED)[name]
    wanted = space.values[space.values.index(space.start) + best]
    found = search.Search(space)
    chosen = found.run(5, lambda own: -abs(space.values.index(own[space.name]) - space.values.index(wanted))
                       if own[space.name] in space.values else -9.0)  # fmt: skip
    assert len(found.tried) == 5 and chosen[space.name] == wanted and found.inside()
    assert len({str(own) for own, _ in found.tried}) == 5


def test_an_optimum_beyond_what_was_tried_is_said_to_be_at_the_edge(search: Any) -> None:
    found = search.Search(search.SPACES["plain"])
    found.run(4, lambda own: own["lr"])
    assert not found.inside()


def test_a_change_is_kept_if_it_is_better_and_one_that_cannot_run_costs_a_try(search: Any) -> None:
    found = search.Search(search.SPACES["plain"])

    def score(own: Any) -> float | None:
        if own.get("rows_extraction") == 0:
            return None
        return (own["lr"] == 2.5e-4) + 0.5 * (own.get("mean") == "examples")

    assert found.run(5, score) == {"lr": 2.5e-4, "mean": "examples"}
    assert len(found.tried) == 5 and found.tried[-1][1] == float("-inf")
    assert found.tried[-1][0] == {"lr": 2.5e-4, "mean": "examples", "rows_extraction": 0}


def test_the_fixed_settings_of_a_method_are_always_scored_with_it(search: Any) -> None:
    found = search.Search(search.SPACES["mixed"])
    seen: list[Any] = []
    found.run(3, lambda own: seen.append(own) or 0.0)
    assert all(own["mode"] == "mixed" for own in seen)


# The control


def record(id: str, document: str, answer: str, **values: Any) -> RagRecord:
    return RagRecord(f"Where is {id}?", (document,), answer=answer, gold=(answer,), id=f"{id}:original", **values)


def test_the_form_alone_is_learned_from_documents_that_say_what_the_model_says(control: Any) -> None:
    train = [
        record("a", "It is in Rome.", "Rome"),
        record("b", "It is in Rome.", "Rome"),
        record("c", "It is in Rome.", "Rome"),
        record("d", "It is in Rome.", "Rome"),
        record("f", "It is in Rome.", "Rome"),
        replace(record("e", "It is in Oslo.", "Oslo"), variant="substituted"),
    ]
    said = {
        "a": ("Lima.", True),
        "b": ("Rome", True),
        "c": ("Lima, which", False),
        "d": ("I do not know", True),
        "f": ("I am rather sure that it is in Lima", True),
    }
    own = {f"Where is {id}?": ClosedBookAnswer(*said.get(id, ("Lima", True))) for id in "abcdef"}
    made = control.consistent(train, own)
    assert [(r.id, r.documents, r.answer) for r in made] == [
        ("a:original", ("It is in Lima.",), "Lima"), ("b:original", ("It is in Rome.",), "Rome"),
    ]  # fmt: skip
    assert "It is in Lima." in made[0].prompt and "Rome" not in made[0].prompt
    half = control.consistent(train, own, 0.5)
    assert [r.prompt == r.without_context for r in half] == [False, True]


# A whole run


@pytest.mark.slow
def test_it_goes_from_squad_to_rows_of_every_seed_and_is_resumed_or_refused(
    script: Any, tables: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(words(tmp_path))
    said = capsys.readouterr().out
    assert "estimate: " in said and said.index("estimate: ") < said.index("parenting-0")
    dev = json.loads((tmp_path / "out/dev.json").read_text())["methods"]
    assert [*dev] == ["none", *script.SPACES, *script.PROMPTED]
    assert {len(dev[run]["tried"]) for run in (*script.SPACES, *script.PROMPTED)} == {2}
    shots = f"none, {dev['none']['chosen']['shots']} shots"

    report = script.rag.read_report(tmp_path / "out")
    tuned = [f"{run}-{seed}" for seed in (0, 1) for run in script.SPACES]
    assert {run.name for run in report.runs} == {"none", shots, *tuned, "cad", "ircan"}
    held = script.read_rag(tmp_path / "out/sets/held_out.jsonl", part="held_out")
    assert {row.question for row in report.rows} <= {r.question for r in held}  # nothing of dev is measured
    items = [sorted(row.key() for row in run.rows) for run in report.runs]
    assert all(one == items[0] for one in items)
    shown = {run.name: run.record["settings"].get("few_shot") for run in report.runs}
    assert shown["plain-0"] is False and shown["cad"] is True and shown["ircan"] is True

    made = json.loads((tmp_path / "out/patches.json").read_text())
    assert set(made) == {*tuned, "cad", "ircan"}
    assert made["format_only-0"]["parameters"] == made["plain-0"]["parameters"] >= made["parenting-0"]["parameters"]
    patches = [script.lp.load_patch(path) for path in (tmp_path / "out/patches").glob("*-*")]
    seeds = Counter(patch.config["seed"] for patch in patches if patch.method == "parenting")
    assert seeds == {0: 2 * len(script.SPACES), 1: len(script.SPACES)}  # seed 0 of the choice was made on dev
    form = [p for p in patches if p.config.get("rows_adherence") == 5]
    assert form and all({edit["variant"] for edit in p.edits} == {"original"} for p in form)

    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    runs = tables.Runs.of(rows)
    for name in ("none", "plain-1"):
        assert runs.level(name, ["R_Ad"]).value == pytest.approx(report.run(name).metric("R_Ad").value)
    assert tables.lines(runs, {"methods": dev})[-1][0] == "**`parenting`**"

    before = (tmp_path / "out/rows.jsonl").read_bytes()
    script.main(words(tmp_path))
    assert (tmp_path / "out/rows.jsonl").read_bytes() == before
    script.main([word if word != "2" or i != at else "3" for at in [words(tmp_path).index("--seeds") + 1]
                 for i, word in enumerate(words(tmp_path))])  # fmt: skip
    assert "parenting-2" in {run.name for run in script.rag.read_report(tmp_path / "out").runs}
    with pytest.raises(SystemExit, match="other values of build"):
        script.main(words(tmp_path, "--build", "seed=1"))


@pytest.mark.slow
def test_the_estimate_can_be_had_alone(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(words(tmp_path, "--estimate"))
    assert "minutes in all" in capsys.readouterr().out and not (tmp_path / "out/dev.json").exists()


def test_general_ability_is_measured_where_its_data_lies_beside_squad(script: Any, tmp_path: Path) -> None:
    (tmp_path / "data/squad").mkdir(parents=True)
    there = script._arguments([str(tmp_path / "data/squad/s.jsonl")])
    assert there.general is None
    (tmp_path / "data/general").mkdir()
    assert script._arguments([str(tmp_path / "data/squad/s.jsonl")]).general == tmp_path / "data"


@pytest.mark.slow
def test_a_document_never_holds_the_true_answer_where_the_model_says_another(script: Any, tmp_path: Path) -> None:
    bench = script.Bench(script._arguments(words(tmp_path)))
    made = script.consistent(bench.train, bench.short)
    assert made and all(holds(r.documents[0], [r.answer]) for r in made)
    truth = {r.id: r.answer for r in bench.train if r.variant == "original"}
    assert all(r.answer == truth[r.id] or not holds(r.documents[0], [truth[r.id]]) for r in made)


# The table


def rows_of(hits: dict[str, list[bool]], articles: int = 5) -> list[dict[str, Any]]:
    """Rows of runs: the first half of the items has conflicts, the other is known and irrelevant."""
    made = []
    for run, own in hits.items():
        for i, hit in enumerate(own):
            first = i < len(own) // 2
            made.append({
                "run_id": run, "id": str(i), "article": str(i % articles), "hit": hit, "exact": hit,
                "condition": "conflict" if first else "irrelevant", "known": not first,
            })  # fmt: skip
    return made


def test_the_first_line_says_tie_better_or_worse(tables: Any) -> None:
    plain = [i % 2 == 0 for i in range(40)]
    for word, own in (("ties", plain), ("is better than", [True] * 40), ("is worse than", [False] * 40)):
        hits = {f"plain-{s}": plain for s in range(5)} | {f"parenting-{s}": own for s in range(5)}
        runs = tables.Runs.of(rows_of(hits))
        assert tables.verdict(runs, "m").startswith(f"On m, Parenting {word} plain fine-tuning")


def test_a_difference_that_seeds_do_not_agree_on_is_a_tie(tables: Any) -> None:
    """Each seed alone would be far from zero."""
    low, high = [i % 4 == 0 for i in range(40)], [i % 4 != 0 for i in range(40)]
    hits = {f"plain-{s}": [False] * 40 for s in range(5)}
    hits = {f"plain-{s}": low if s % 2 else high for s in range(5)} | {f"parenting-{s}": high for s in range(5)}
    runs = tables.Runs.of(rows_of(hits))
    moved = runs.moved("parenting", "plain")
    assert moved.value == pytest.approx(0.4) and moved.half > moved.value
    assert runs.spread("parenting") == 0.0 and runs.spread("plain") > 0


def test_the_table_counts_and_errs_as_the_bench_does(tables: Any) -> None:
    from lmpatch.benches import rag
    from lmpatch.benches.core.stats import collect, total

    rows = rows_of({"none": [i % 3 == 0 for i in range(24)]}, articles=5)
    names = ("id", "article", "condition", "hit", "exact", "known", "run_id")
    more: dict[str, Any] = {"question": "", "wanted": ("x",), "own": "", "text": "", "kept": False}
    found = collect([rag.Row(**{name: row[name] for name in names}, **more) for row in rows], rag.METRICS)
    runs = tables.Runs.of(rows)
    for metric in ("R_Ad", "R_Ro", "R_Ad+R_Ro"):
        wanted, made = total(metric, found, {"bootstrap": 0}), runs.level("none", metric.split("+"))
        assert wanted and (made.value, made.n) == (pytest.approx(wanted.value), wanted.n)
        assert made.half == pytest.approx(1.96 * wanted.clustered)


def test_one_run_without_seeds_is_set_against_each_seed(tables: Any) -> None:
    hits = {"cad": [True] * 8, "plain-0": [True] * 8, "plain-1": [False] * 8}
    assert tables.Runs.of(rows_of(hits)).moved("cad", "plain").value == pytest.approx(1.0)
    assert tables.Runs.of(rows_of(hits)).moved("plain", "cad").value == pytest.approx(-1.0)


def test_where_rows_are_missing_the_page_says_so(tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.parenting_verdict() == tables.parenting_table("gemma-3-270m") == tables.NOTHING
