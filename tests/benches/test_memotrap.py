"""The memotrap bench: verdicts by hand, early verdicts, folders that go on, contexts that should not matter."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from rich.console import Console
from tiny import tiny_lm
from typer.testing import CliRunner

import lmpatch as lp
from lmpatch.benches import memotrap
from lmpatch.benches.context.bench import WORD, word
from lmpatch.benches.core import runner, stats
from lmpatch.benches.core.adapter import adapt
from lmpatch.benches.core.report import Report, Run
from lmpatch.benches.core.stats import Number, Values, number, numbers
from lmpatch.benches.memotrap import Config, Row, complete, cut, settled
from lmpatch.cli.app import build
from lmpatch.data.context import ContextRecord, InContext
from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput, BadRecord
from lmpatch.inference.generate import generate
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import applied
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.provenance import hash_tensors

Maker = Callable[[LM, Sequence[Edit]], WeightPatch]
QUICK = Config(baselines=(), bootstrap=50, max_new_tokens=6)


def trap(phrase: str, answer: str, memory: str) -> ContextRecord:
    told = f'End in the word "{answer}": '
    return ContextRecord(told, phrase, answer, memory, prompt=f"{told}{phrase}", without_context=phrase, id=phrase)


RECORDS = [
    trap("Better late than", "early", "never"),
    trap("No man can serve two", "kings", "masters"),
    trap("The Eiffel Tower is in", "Rome", "Paris"),
    trap("Steve Jobs founded", "two words", "Apple"),
]


@pytest.fixture
def tiny() -> LM:
    return tiny_lm("llama")


@pytest.fixture
def patch(tiny: LM, edits: list[Edit], make: Maker) -> WeightPatch:
    return make(tiny, edits)


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Prompt -> what is said behind it, a word a token; prompts that are not in it get " no idea"."""
    table: dict[str, str] = {}

    def say(lm: LM, prompts: Sequence[InContext], *, max_new_tokens: int, **_: Any) -> list[str]:
        texts = [table.get(prompt.prompt, " no idea") for prompt in prompts]
        return [" ".join(text.split(" ")[: max_new_tokens + 1]) for text in texts]

    monkeypatch.setattr(memotrap, "generate", say)
    return table


def printed(report: Report) -> str:
    console = Console(width=240, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table())
    return capture.get()


def bits(lm: LM) -> str:
    return hash_tensors(sorted(lm.model.state_dict().items()), exact=True)


# Verdicts


def test_a_text_is_cut_at_its_first_period_and_compared_without_blanks() -> None:
    assert [cut(text) for text in (" early. And late.", "early . x", "\n early", ".", "")] == ["early"] * 3 + ["", ""]
    assert cut("early . x", official=True) == "early "


def test_the_answer_to_a_question_is_one_line(tiny: LM, spoken: dict[str, str]) -> None:
    asked = ContextRecord("The Eiffel Tower is in Rome.", "Where is the Eiffel Tower?", "Rome", "Paris")
    spoken |= {asked.prompt: " Rome\nQ:Where is", asked.without_context: " Paris\n"}
    found = memotrap.run(tiny, [asked], QUICK)
    assert found.metrics()["none"]["acc"].value == 1 and found.rows[0].said == "Paris"
    assert cut("\nRome", line=True) == ""
    assert settled("Rome\n", ["Rome"], line=True) and not settled("Rome\n", ["Rome\nx"])


@pytest.mark.slow
def test_the_numbers_of_four_records_by_hand(tiny: LM, spoken: dict[str, str]) -> None:
    for record, said, alone in zip(
        RECORDS, (" early. x", " masters", " Rome or so", " two words."), (" never.", " masters.", " Rome", " Apple"),
        strict=True,
    ):  # fmt: skip
        spoken |= {record.prompt: said, record.without_context: alone}
    found = memotrap.run(tiny, RECORDS, QUICK).metrics()["none"]
    assert {name: found[name].value for name in ("acc", "sr", "rest")} == {"acc": 0.5, "sr": 0.25, "rest": 0.25}
    assert found["adherence"].value == pytest.approx(2 / 3) and found["adherence"].n == 3  # Rome is said without, too
    assert found["acc"].stderr == pytest.approx(math.sqrt(1 / 12 * 4 / 4))  # s = sqrt(1/3), n = 4
    assert found["acc"].low is not None and found["acc"].low < 0.5 < (found["acc"].high or 0)
    assert found["robustness"].value == 0 and found["closed_kept"].value == 1
    assert found["known_kept"].n == 3 and found["bcu"].value == 0.25


def test_with_anothers_context_the_first_word_without_any_should_stay(tiny: LM, spoken: dict[str, str]) -> None:
    for record in RECORDS:
        spoken[record.without_context] = f" {record.memory} of old"
        for other in RECORDS:
            spoken[other.context + record.without_context] = (
                f" {record.memory}, and more" if record.id != RECORDS[0].id else " no"
            )
    report = memotrap.run(tiny, RECORDS, QUICK)
    rows = {row.id: row for row in report.rows if row.when == "foreign"}
    assert not any(row.kept for row in rows.values())  # "Paris," is not "Paris"
    assert {row.closed for row in rows.values()} == {f"{r.memory} of old" for r in RECORDS}
    assert all(row.other and row.other != row.id for row in rows.values())
    for record in RECORDS[1:]:
        for other in RECORDS:
            spoken[other.context + record.without_context] = f" {record.memory} and more"
    assert memotrap.run(tiny, RECORDS, QUICK).metrics()["none"]["robustness"].value == 0.75


@pytest.mark.slow
def test_an_early_verdict_is_the_verdict_on_the_whole_text() -> None:
    source = random.Random(0)
    wanted = ["ab", "a b", "b", "ba.b", "\u00e9a"]
    for _ in range(20_000):
        text = "".join(source.choice(" ab.\n\u00e9") for _ in range(source.randrange(8)))
        begun = text[: source.randrange(len(text) + 1)] + source.choice(["", "", "\ufffd"])
        if not text.startswith(begun):
            begun = (
                begun.rstrip("\ufffd") + "\ufffd" if text[len(begun) - 1 :][:1] == "\u00e9" else begun.rstrip("\ufffd")
            )
        pair = source.sample(wanted, 2)
        if settled(begun, pair):
            assert [cut(begun) == w for w in pair] == [cut(text) == w for w in pair]
        if settled(begun, WORD):
            assert word(cut(begun)) == word(cut(text))
    assert settled("early b", ["early"]) and not settled("early ", ["early"]) and not settled("ear", ["early"])


@pytest.mark.slow
def test_stopping_early_changes_no_verdict_on_a_model(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = generate(lm, [r.prompt for r in RECORDS], max_new_tokens=6, stop=())
    wanted = [[cut(text) or "x", "Paris"] for text in texts]
    early = complete(lm, RECORDS, wanted, limit=6, batch_size=4)
    monkeypatch.setattr(memotrap, "settled", lambda *_: False)
    whole = complete(lm, RECORDS, wanted, limit=6, batch_size=4)
    for answers, one, two in zip(wanted, early, whole, strict=True):
        assert [one.text == a for a in answers] == [two.text == a for a in answers]
    assert all(two.text == answers[0] for answers, two in zip(wanted, whole, strict=True) if answers[0] != "x")


# Runs


@pytest.mark.slow
def test_wordings_and_the_patch_stand_beside_the_unpatched_model(tiny: LM, patch: WeightPatch) -> None:
    before = bits(tiny)
    report = memotrap.run(tiny, RECORDS, replace(QUICK, baselines=("opin", "plain", "attr")), patch=patch)
    assert [run.name for run in report.runs] == ["none", "none, opin", "none, attr", "rank_one"]
    assert [len(run.rows) for run in report.runs] == [12, 8, 8, 12]
    assert bits(tiny) == before and not applied(tiny)
    assert report.run("rank_one").record["settings"]["patches"][0]["hash"] == patch.hash()
    assert set(report.differences("rank_one")) >= {"acc", "sr", "robustness", "bcu"}
    assert all(metric.value == 0 for metric in report.differences("none").values())


@pytest.mark.slow
def test_several_patches_go_on_together_and_controls_need_no_other_contexts(tiny: LM, patch: WeightPatch) -> None:
    report = memotrap.run(tiny, RECORDS, replace(QUICK, irrelevant=False), patch=[patch, patch], run_id="twice")
    assert [row.when for row in report.run("twice").rows] == ["context"] * 4
    assert len(report.run("twice").record["patches"]) == 2
    assert "robustness" not in report.metrics()["twice"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_asks_nothing_twice(
    tiny: LM, patch: WeightPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "BLOCK", 2)
    whole = memotrap.run(tiny, RECORDS, QUICK, patch=patch)
    seen: list[str] = []

    def stop(done: int, total: int, what: str) -> None:
        seen.append(what)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memotrap.run(tiny, RECORDS, QUICK, patch=patch, out=tmp_path, progress=stop)
    assert not applied(tiny)
    told: list[tuple[int, int, str]] = []
    again = memotrap.run(tiny, RECORDS, QUICK, patch=patch, out=tmp_path, progress=lambda *a: told.append(a))
    assert told == [(4, 4, "scoring rank_one")]
    assert again.rows == whole.rows == memotrap.read_report(tmp_path).rows
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(whole.rows)
    with pytest.raises(BadInput, match="other settings|holds the run"):
        memotrap.run(tiny, RECORDS, replace(QUICK, seed=1), patch=patch, out=tmp_path)


@pytest.mark.slow
def test_only_a_run_with_new_rows_is_resampled(
    tiny: LM, patch: WeightPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = memotrap.run(tiny, RECORDS, QUICK, out=tmp_path).run("none").record["metrics"]
    counted: list[int] = []

    def count(values: Any, record: Any) -> dict[str, Number]:
        counted.append(len(values["acc"][1].units))
        return numbers(values, record)

    monkeypatch.setattr(stats, "numbers", count)
    report = memotrap.run(tiny, RECORDS, replace(QUICK, irrelevant=False), patch=patch, out=tmp_path)
    assert counted == [4, 4]  # the patched run, and its differences
    assert report.run("none").record["metrics"] == first


@pytest.mark.slow
def test_a_part_is_chosen_by_hash_and_keeps_its_order(tiny: LM) -> None:
    parts = [memotrap.run(tiny, rs, replace(QUICK, n=2, irrelevant=False)).rows for rs in (RECORDS, RECORDS)]
    assert parts[0] == parts[1] and len({row.place for row in parts[0]}) == 2


# What cannot be asked


@pytest.mark.slow
def test_a_context_longer_than_the_window_is_not_asked_and_said_so(tiny: LM) -> None:
    long = replace(RECORDS[0], context="word " * 600, prompt="word " * 600 + RECORDS[0].without_context)
    report = memotrap.run(tiny, [long, *RECORDS[1:]], QUICK)
    (row,) = [row for row in report.run("none").rows if row.place == 0 and row.when == "context"]
    assert row.said is None and row.flag == "longer than the model's window of 512 tokens"
    found = report.metrics()["none"]
    assert (found["acc"].n, found["acc"].dropped) == (3, 1)
    assert "longer than the model's window" in printed(report) and "1 not asked" in printed(report)


def test_records_without_a_context_or_a_usable_answer_are_refused(tiny: LM, tmp_path: Path) -> None:
    line = {"question": "q", "answer": "a", "context": "c"}
    (tmp_path / "r.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(line | {'context': ' '})}\n")
    with pytest.raises(BadRecord, match="line 2: a record has no context"):
        memotrap.load(tmp_path / "r.jsonl")
    with pytest.raises(BadInput, match="texts are cut at their first period"):
        memotrap.run(tiny, [trap("x", "U.S", "y")])
    with pytest.raises(BadInput, match="has options. Ask it with the bench kre"):
        memotrap.run(tiny, [ContextRecord("c", "q", "A", options=("x", "y"))])
    with pytest.raises(BadInput, match="nothing is left to ask"):
        memotrap.run(tiny, [])


def test_an_answer_that_tokenises_to_nothing_is_refused(tiny: LM) -> None:
    from tokenizers import normalizers

    tiny.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(BadInput, match="record odd: the answer .* tokenises to nothing"):
        memotrap.run(tiny, [replace(RECORDS[0], answer="\u200b", id="odd")])


def test_a_model_with_a_patch_on_it_is_no_base(tiny: LM, patch: WeightPatch) -> None:
    with lp.apply(tiny, patch), pytest.raises(BadInput, match="the model carries patches"):
        memotrap.run(tiny, RECORDS, QUICK)


def test_as_released_a_prompt_is_cut_at_its_last_colon(tiny: LM, spoken: dict[str, str]) -> None:
    told = trap("Joy shared, joy doubled: sorrow shared, sorrow", "doubled", "halved")
    spoken["sorrow shared, sorrow"] = " halved."
    closed = [
        [row.said for row in memotrap.run(tiny, [told], replace(QUICK, official=o)).rows if row.when == "bare"]
        for o in (False, True)
    ]
    assert closed == [["no idea"], ["halved"]]


# Reports


@pytest.mark.slow
def test_the_interval_is_of_the_mean_over_records_and_repeats() -> None:
    values = Values({i: [float(i % 2)] for i in range(100)})
    found = number("acc", [values], bootstrap=1000, seed=0)
    assert found and found == number("acc", [values], bootstrap=1000, seed=0)
    assert found.low is not None and found.high is not None and found.stderr is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.stderr, rel=0.1)
    alone = number("acc", [Values({0: [1.0]})], bootstrap=1000, seed=0)
    assert alone and alone.stderr is None and alone.low is None


@pytest.mark.slow
def test_the_page_shows_every_run_and_needs_nothing(tiny: LM, patch: WeightPatch, tmp_path: Path) -> None:
    nasty = "<script>alert('&')</script>"
    report = memotrap.run(
        tiny, RECORDS, replace(QUICK, baselines=("opin",)), patch=patch, run_id=nasty, data_name=nasty
    )
    text = report.save_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and str(escape(nasty)) in text and "none, opin" in text
    assert "http" not in text and "url(" not in text and text.count("<svg") == 1
    assert "Examples" in text and "robustness" in text


@pytest.mark.slow
def test_the_command_line_takes_a_file_and_goes_on(tiny: LM, patch: WeightPatch, tmp_path: Path) -> None:
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    patch.save(tmp_path / "patch")
    lines = [
        {"prompt": r.prompt, "classes": str([f" {r.memory}.", f" {r.answer}."]), "answer_index": 1} for r in RECORDS
    ]
    (tmp_path / "m.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    out = tmp_path / "out"
    words = ["bench", str(tmp_path / "model"), "memotrap", str(tmp_path / "m.jsonl"), "-p", str(tmp_path / "patch")]
    words += ["-o", str(out), "--set", "baselines=opin", "--set", "max_new_tokens=4", "--set", "n=3"]
    done = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(build(), words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "With its context" in done.stdout and "none, opin" in done.stdout and (out / "report.html").is_file()
    assert len((out / "rows.jsonl").read_text().splitlines()) == 3 * (3 + 2 + 3)


# Who loses to a prompt


def judged(name: str, right: int, n: int, baseline: bool) -> Run:
    """A run that answers so many records as told, and none otherwise than without a context."""
    common: dict[str, Any] = {"answer": "a", "memory": "m", "closed": "a", "run_id": name}
    own = [Row(place=i, id=str(i), when="context", said="a" if i < right else "x", **common) for i in range(n)]
    other = [Row(place=i, id=str(i), when="foreign", said="a", kept=True, **common) for i in range(n)]
    return Run(adapt(memotrap), {"run_id": name, "baseline": baseline, "bootstrap": 0}, own + other, ())


@pytest.mark.parametrize(("right", "line"), [(10, "loses to"), (29, "does not clearly beat"), (30, "does not clearly")])
def test_a_method_that_a_prompt_beats_is_named_in_the_verdict(right: int, line: str) -> None:
    runs = [judged("none", 5, 40, True), judged("none, attr", 20, 40, True), judged("none, opin", 30, 40, True)]
    report = Report(adapt(memotrap), (*runs, judged("ircan", right, 40, False)))
    last = report.verdict()[-1]
    assert last.startswith("ircan (") and f"{line}" in last and "'none, opin' in bcu: prefer the prompt." in last
    assert last in report.summary()["verdict"]


def test_a_method_that_beats_every_prompt_is_not_named_and_few_records_lose_nothing() -> None:
    runs = (judged("none", 5, 40, True), judged("none, attr", 10, 40, True))
    assert len(Report(adapt(memotrap), (*runs, judged("ircan", 40, 40, False))).verdict()) == 1
    few = (judged("none", 1, 8, True), judged("none, attr", 8, 8, True), judged("ircan", 0, 8, False))
    assert "does not clearly beat the prompt" in Report(adapt(memotrap), few).verdict()[-1]
    alone = Report(adapt(memotrap), (runs[0], judged("ircan", 0, 40, False)))
    assert "prompt" not in " ".join(alone.verdict())
