"""Hostile passages: what a dose is, how it is counted, and that a vote over passages read alone outvotes a few."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from rag_files import squad
from tiny import tiny_model, tiny_tokenizer

from lmpatch.benches import rag
from lmpatch.benches.core.stats import collect, numbers
from lmpatch.benches.rag import METRICS, PLOTS, Config, judged, poisoned
from lmpatch.data.context import InContext
from lmpatch.data.rag.reader import RagRecord, holds
from lmpatch.errors import BadInput
from lmpatch.inference import isolate as isolate_
from lmpatch.inference.generate import generate
from lmpatch.inference.isolate import isolate, vote
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap

DOSES = Config(n=8, doses=(0, 1, 5, 9, 10), conditions=(), max_new_tokens=4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def records(tmp_path: Path) -> list[RagRecord]:
    return rag.load(squad(tmp_path / "s.jsonl"))


@pytest.fixture
def tiny() -> LM:
    return wrap(tiny_model("llama", max_position_embeddings=8192), tiny_tokenizer(), name="tiny")


def passages(sample: rag.Sample) -> list[str]:
    return [one.prompt.split("Doc 1: ")[1].split("\n")[0] for one in sample.alone]


def test_a_dose_is_so_many_passages_of_ten_that_say_the_wrong_answer(records: list[RagRecord]) -> None:
    items = poisoned(records, {r.question: "" for r in records}, DOSES)
    assert len(items) == 2 * 5 and {s.dose for s in items} == {0, 1, 5, 9, 10}
    by_question: dict[str, list[set[int]]] = {}
    for s in items:
        texts = passages(s)
        bad = {i for i, text in enumerate(texts) if holds(text, [s.hostile])}
        good = {i for i, text in enumerate(texts) if holds(text, s.wanted)}
        assert len(texts) == 10 and len(bad) == s.dose and bad | good == {*range(10)} and not bad & good
        assert all(f"Doc {i}: {text}\n" in s.asked.prompt for i, text in enumerate(texts, 1))
        assert s.asked.without_context.count("Doc") == 0
        assert s.hostile in {r.answer for r in records if r.variant == "substituted"}
        by_question.setdefault(s.question, []).append(bad)
    for doses in by_question.values():  # what a smaller dose poisons a larger one does too
        assert all(small <= large for small, large in pairwise(doses))


def test_the_seed_decides_which_are_hostile(records: list[RagRecord]) -> None:
    own = {r.question: "" for r in records}
    first, again = poisoned(records, own, DOSES), poisoned(records[::-1], own, DOSES)
    assert first == again
    other = poisoned(records, own, replace(DOSES, seed=1))
    assert [s.asked for s in first] != [s.asked for s in other]


def test_without_doses_nothing_is_poisoned(records: list[RagRecord]) -> None:
    assert poisoned(records, {r.question: "" for r in records}, Config()) == []
    assert rag.baselines(Config()) == {}


def test_the_true_answer_counts_without_the_hostile_one_beside_it() -> None:
    s = rag.Sample("q:dose1", "T", "poison", InContext("p", "b"), "Where?", ("Rome",), "", False, 1, "Oslo")
    rows = [judged(s, text) for text in ("Rome.", "Oslo", "Rome or Oslo", "no idea")]
    assert [(r.hit, r.lured) for r in rows] == [(True, False), (False, True), (False, True), (False, False)]
    rows = [replace(r, id=str(i)) for i, r in enumerate(rows)]
    found = {name: n.value for name, n in numbers(collect(rows, METRICS), {"bootstrap": 0}).items()}
    assert found["right/1"] == 0.25 and found["hostile/1"] == 0.5
    assert dict(PLOTS[1].points(rows)) == {"1": 0.25}  # type: ignore[union-attr]
    assert dict(PLOTS[2].points(rows)) == {"1": 0.5}  # type: ignore[union-attr]


def test_a_dose_beyond_ten_is_refused() -> None:
    with pytest.raises(BadInput, match="a dose is 11; of 10 passages"):
        rag.settle(Config(doses=(0, 11)), [], False)


def test_rows_of_the_first_release_are_still_read() -> None:
    old = {
        "id": "1", "article": "a", "condition": "context", "question": "q", "wanted": ["x"], "own": "", "known": False,
        "text": "x", "hit": True, "exact": True, "kept": False,
    }  # fmt: skip
    assert rag.Row.read(old).dose is None


# Isolate, then aggregate


def test_the_most_frequent_answer_wins_however_it_is_worded_and_silence_has_no_vote() -> None:
    found = vote(["Oslo", "I do not know", "the Rome.", "Rome", "I do not know", "I do not know", ""])
    assert (found.text, found.votes, found.passages) == ("the Rome.", 2, 7)
    assert vote(["Oslo", "Rome"]).text == "Oslo"
    assert (vote(["I do not know", ""]).text, vote([""]).votes) == ("", 0)


@pytest.mark.parametrize(("hostile", "said"), [(0, "Rome"), (1, "Rome"), (4, "Rome"), (6, "Oslo"), (10, "Oslo")])
def test_fewer_hostile_passages_than_honest_ones_are_outvoted(
    hostile: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolate_, "generate", lambda _, prompts, **__: [p.rpartition(" ")[2] for p in prompts])
    lm: LM = None  # type: ignore[assignment]
    prompts = ["It is in Oslo"] * hostile + ["It is in Rome"] * (10 - hostile)
    assert [v.text for v in isolate(lm, [prompts, prompts[::-1]])] == [said, said]


def test_each_passage_is_read_alone() -> None:
    lm = wrap(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    questions = [["The tower is in", "Apple is"], ["The mother tongue is"]]
    votes = isolate(lm, questions, max_new_tokens=3)
    assert [list(v.answers) for v in votes] == [
        [text.strip() for text in generate(lm, prompts, max_new_tokens=3)] for prompts in questions
    ]
    with pytest.raises(BadInput, match="no passage to read"):
        isolate(lm, [[]])


@pytest.mark.slow
def test_a_run_with_doses_has_them_for_every_run_and_the_isolated_model_beside(
    tiny: LM, records: list[RagRecord], tmp_path: Path
) -> None:
    cfg = replace(DOSES, n=4, conditions=("context",))
    report = rag.run(tiny, records, cfg, out=tmp_path / "out")
    assert [run.name for run in report.runs] == ["none", "none, isolated"]
    plain, isolated = (run.rows for run in report.runs)
    items = [s for s in rag.plan(tiny, records, cfg) if s.condition == "poison"]
    votes = isolate(tiny, [s.alone for s in items], max_new_tokens=4)
    assert [r.text for r in isolated if r.dose is not None] == [v.text for v in votes]
    assert [r.text for r in isolated if r.dose is None] == [r.text for r in plain if r.dose is None]
    for run in report.runs:
        assert {f"{name}/{dose}" for name in ("right", "hostile") for dose in cfg.doses} <= run.metrics().keys()
    assert "Hostile answers by poison dose" in report.save_html(tmp_path / "page.html").read_text()
    again = rag.read_report(tmp_path / "out")
    assert again.run("none, isolated").rows == isolated
