"""The general bench end to end on tiny models and tiny files."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from general_files import RECORDS, put, write
from markupsafe import escape
from rich.console import Console
from tiny import tiny_lm, tiny_model, tiny_tokenizer
from typer.testing import CliRunner

import lmpatch as lp
from lmpatch.benches import general
from lmpatch.benches.core import runner
from lmpatch.benches.core.report import Report
from lmpatch.benches.general import Config, Data, Row, Sample, bench
from lmpatch.benches.general.tasks import CLOZE, LETTERS, TASKS, TEXT
from lmpatch.cli.app import build
from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput, NotEnoughMemory
from lmpatch.inference.interventions import Insert, Intervention
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap
from lmpatch.patches.decode.patch import DecodePatch
from lmpatch.patches.decode.rules import Power
from lmpatch.patches.ledger import applied, apply
from lmpatch.patches.weight.delta import Dense
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.provenance import hash_tensors

Maker = Callable[[LM, Sequence[Edit]], WeightPatch]


@pytest.fixture
def tiny() -> LM:
    """With a window that a tokenizer of single letters does not fill."""
    return wrap(tiny_model("llama", max_position_embeddings=4096), tiny_tokenizer(), name="tiny")


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return general.load(write(tmp_path / "data"))


@pytest.fixture
def patch(tiny: LM, edits: list[Edit], make: Maker) -> WeightPatch:
    return make(tiny, edits)


def logp(lm: LM, text: str) -> torch.Tensor:
    """[T, V] of one text, by the model itself."""
    with torch.no_grad():
        out: torch.Tensor = lm.model(**lm.tokenizer(text, return_tensors="pt")).logits[0].float().log_softmax(-1)
    return out


def slowly(lm: LM, prompt: str, target: str) -> list[float]:
    """log p of each token of the target, one plain forward."""
    text = prompt + (target if target[0] == " " else f" {target}")
    ids = lm.tokenizer(text)["input_ids"]
    skip = len(lm.tokenizer(prompt)["input_ids"])
    table = logp(lm, text)
    return [float(table[t - 1, ids[t]]) for t in range(skip, len(ids))]


def of(data: Data, task: str, protocol: str) -> list[Sample]:
    return [s for s in data.samples if (s.task, s.protocol) == (task, protocol)]


def bits(lm: LM) -> str:
    return hash_tensors(sorted(lm.model.state_dict().items()), exact=True)


def plainly(rows: Sequence[Row]) -> list[Row]:
    return [replace(row, run_id="", chunk=0) for row in rows]


def printed(report: Report) -> str:
    console = Console(width=240, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table())
    return capture.get()


# What is in a row


@pytest.mark.parametrize("task", ["csqa", "mmlu", "arc_easy", "boolq"])
def test_letters_are_the_full_logits_of_their_tokens(lm: LM, data: Data, task: str) -> None:
    for sample, row in zip(of(data, task, LETTERS), general.ask(lm, of(data, task, LETTERS)), strict=True):
        table = logp(lm, sample.prompts[0])[-1]
        ids = [lm.tokenizer(mark, add_special_tokens=False)["input_ids"][0] for mark in sample.options]
        wanted = [float(table[i]) for i in ids]
        assert [s - row.scores[0] for s in row.scores] == pytest.approx([w - wanted[0] for w in wanted], abs=1e-4)
        assert row.value == float(wanted.index(max(wanted)) == sample.gold)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["csqa", "anli", "hellaswag", "piqa", "winogrande", "openbookqa"])
def test_a_cloze_equals_a_plain_forward_of_each_option(lm: LM, data: Data, task: str) -> None:
    for sample, row in zip(of(data, task, CLOZE), general.ask(lm, of(data, task, CLOZE)), strict=True):
        each = [slowly(lm, p, o) for p, o in zip(sample.prompts, sample.options, strict=True)]
        wanted = [sum(values) / len(values) for values in each]
        assert row.scores == pytest.approx(wanted, abs=1e-4)
        assert row.value == float(wanted.index(max(wanted)) == sample.gold)


@pytest.mark.slow
def test_squad_is_the_mean_of_one_over_the_perplexity_of_the_gold_answer(tiny: LM, data: Data) -> None:
    report = general.run(tiny, data, Config(tasks=("squad",)))
    each = [slowly(tiny, s.prompts[0], s.options[0]) for s in of(data, "squad", LETTERS)]
    wanted = [math.exp(sum(values) / len(values)) for values in each]
    found = report.run("none").metric("answer/squad")
    assert found and found.n == 3 and found.value == pytest.approx(sum(wanted) / 3, rel=1e-4)


@pytest.mark.slow
def test_perplexity_counts_the_tokens_of_the_windows_behind_their_first_word(tiny: LM, data: Data) -> None:
    report = general.run(tiny, data, Config(tasks=("perplexity",)))
    each = [slowly(tiny, s.prompts[0], s.options[0]) for s in of(data, "perplexity", TEXT)]
    found = report.run("none").metric("nats/perplexity")
    assert found and found.weight == sum(map(len, each))
    assert found.value == pytest.approx(-sum(map(sum, each)) / found.weight, rel=1e-4)


@pytest.mark.slow
def test_the_numbers_of_three_records_by_hand(tiny: LM, data: Data, patch: WeightPatch) -> None:
    report = general.run(tiny, data, Config(tasks=("mmlu",)), patch=patch)
    for protocol in (LETTERS, CLOZE):
        samples = of(data, "mmlu", protocol)
        before = [row.value for row in general.ask(tiny, samples)]
        with apply(tiny, patch):
            after = [row.value for row in general.ask(tiny, samples)]
        moved = [b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None]
        middle = sum(moved) / 3
        name = "letters/mmlu" if protocol == LETTERS else "cloze/mmlu"
        found = report.difference("rank_one", name)
        assert found and found.n == 3 and report.run("none").chances[name] == 0.25
        assert found.value == pytest.approx(middle)
        assert found.stderr == pytest.approx(math.sqrt(sum((m - middle) ** 2 for m in moved) / 2 / 3))


def test_a_mark_that_merges_with_the_bracket_is_tokenised_alone(tiny: LM) -> None:
    class Merging:
        """Tokens: the bracket with its letter, or the letter alone."""

        def __call__(self, texts: list[str], **how: Any) -> dict[str, Any]:
            if how.get("add_special_tokens") is False:
                return {"input_ids": [[ord(text[0])] for text in texts]}
            return {"input_ids": [[7, 8] for _ in texts], "offset_mapping": [[(0, 8), (8, 10)] for _ in texts]}

    sample = Sample(LETTERS, "letters", ("x\nAnswer: (",), ("A", "B"))
    assert bench.first_tokens(replace(tiny, tokenizer=Merging()), sample) == (ord("A"), ord("B"))


def test_options_that_cannot_be_told_apart_are_not_asked(tiny: LM) -> None:
    sample = Sample(LETTERS, "letters", ("Answer: (",), ("A", "Ab"), task="csqa", id="1")
    (row,) = general.ask(tiny, [sample])
    assert row.value is None and row.flag == "the options begin with the same token"


@pytest.mark.slow
def test_a_model_that_gives_no_number_is_wrong_and_not_left_out(tiny: LM, data: Data) -> None:
    name = tiny.layout.weight(tiny.layout.head)
    loud = Dense(3e38 * torch.sign(tiny.parameter(name).detach()))  # sums overflow, and inf - inf is no number
    report = general.run(tiny, data, Config(), patch=WeightPatch.make(tiny, {name: loud}, method="loud", edits=()))
    found = report.run("loud").metrics()
    assert found.keys() == report.run("none").metrics().keys() and {c.n for c in found.values()} == {3, 9}
    for name, number in found.items():
        assert number.value == (math.inf if name == "nats/perplexity" else 0.0)


# What changes nothing


@pytest.mark.slow
def test_a_patch_that_changes_nothing_makes_a_difference_of_exactly_nothing(tiny: LM, data: Data) -> None:
    name = tiny.layout.weight(tiny.layout.downs[0])
    nothing = WeightPatch.make(tiny, {name: Dense(torch.zeros_like(tiny.parameter(name)))}, method="zero", edits=())
    report = general.run(tiny, data, Config(), patch=nothing)
    assert {name.partition("/")[2] for name in report.differences("zero")} == set(TASKS)
    for moved in report.differences("zero").values():
        assert moved.value == 0.0 == moved.stderr and moved.within
    assert plainly(report.run("zero").rows) == plainly(report.run("none").rows)


@pytest.mark.slow
def test_who_shares_a_batch_changes_nothing(tiny: LM, data: Data) -> None:
    whole = general.ask(tiny, data.samples)
    for cfg, samples in ((Config(batch_size=1), data.samples), (Config(batch_size=5), data.samples[::-1])):
        again = {(row.task, row.protocol, row.id): row for row in general.ask(tiny, samples, cfg)}
        for row in whole:
            other = again[row.task, row.protocol, row.id]
            assert other.scores == pytest.approx(row.scores, abs=1e-4) and other.flag == row.flag
            assert other.value == pytest.approx(row.value, abs=1e-4) if row.value is not None else True


@pytest.mark.slow
def test_both_mounts_agree_and_the_model_comes_back_to_the_bit(tiny: LM, data: Data, patch: WeightPatch) -> None:
    before, cfg = bits(tiny), Config(tasks=("csqa", "squad"))
    baked, beside = (general.run(tiny, data, cfg, patch=patch, mount=m).run("rank_one").rows for m in ("bake", "side"))  # type: ignore[arg-type]
    for a, b in zip(baked, beside, strict=True):
        assert a.scores == pytest.approx(b.scores, abs=1e-3)
    assert bits(tiny) == before and not applied(tiny)


@pytest.mark.slow
def test_a_patch_of_the_head_moves_letters_on_both_mounts(tiny: LM, data: Data) -> None:
    head = tiny.layout.weight(tiny.layout.head)
    change = torch.randn(tiny.parameter(head).shape, generator=torch.Generator().manual_seed(0))
    patch = WeightPatch.make(tiny, {head: Dense(change)}, method="head", edits=())
    cfg = Config(tasks=("csqa",), protocols=(LETTERS,))
    baked, beside = (general.run(tiny, data, cfg, patch=patch, mount=m) for m in ("bake", "side"))  # type: ignore[arg-type]
    none = baked.run("none").rows[0].scores
    for a, b in zip(baked.run("head").rows, beside.run("head").rows, strict=True):
        assert a.scores == pytest.approx(b.scores, abs=1e-3) and a.scores != pytest.approx(none, abs=0.1)


@pytest.mark.slow
def test_a_patch_that_acts_on_prompts_acts_here(tiny: LM, data: Data) -> None:
    class Always(Intervention):
        def retrieve(self, prompts: Sequence[str]) -> list[Insert | None]:
            return [Insert(text="The tower is in Paris. ")] * len(prompts)

    samples = [*of(data, "csqa", LETTERS), *of(data, "csqa", CLOZE)]
    prefixed = [replace(s, prompts=tuple(f"The tower is in Paris. {p}" for p in s.prompts)) for s in samples]
    wanted = general.ask(tiny, prefixed)
    tiny.model._lmpatch_ledger = SimpleNamespace(interventions=(Always(),), applied=())
    assert general.ask(tiny, samples) == wanted


# What is not asked


@pytest.mark.slow
def test_a_record_longer_than_the_window_is_counted_and_not_cut(data: Data, tmp_path: Path) -> None:
    long = RECORDS["squad/squad_v2_dev.jsonl.gz"][0] | {"context": "The tower is in Rome. " * 100}
    put(tmp_path / "data/squad/squad_v2_dev_more.jsonl", json.dumps(long))
    report = general.run(tiny_lm("llama"), general.load(tmp_path / "data"), Config(tasks=("squad", "perplexity")))
    found = report.run("none").metric("answer/squad")
    assert found and (found.n, found.dropped) == (3, 1)
    assert report.run("none").metric("nats/perplexity") is None  # 256 words are more than 512 of these tokens
    flags = [row.flag for row in report.rows if row.flag]
    assert flags == ["longer than the model's window of 512 tokens"] * 4
    assert "1 not asked" in printed(report) and "longer than the model's window of 512 tokens" in printed(report)


@pytest.mark.slow
def test_a_missing_file_is_in_the_report(tiny: LM, tmp_path: Path) -> None:
    report = general.run(tiny, general.load(write(tmp_path, "mmlu")), Config(tasks=("mmlu", "csqa")))
    assert report.run("none").record["skipped"] == {"csqa": "no file commonsense_qa*val*.json*"}
    assert "no file commonsense_qa*val*.json*" in printed(report)
    page = report.save_html(tmp_path / "report.html").read_text()
    assert "no file commonsense_qa*val*.json*" in page and "no file squad" not in page  # squad was not wanted


@pytest.mark.slow
def test_n_takes_so_many_of_each_task_and_windows_of_the_text(tiny: LM, data: Data) -> None:
    report = general.run(tiny, data, Config(n=2, windows=1, tasks=("csqa", "piqa", "perplexity")))
    counts = Counter((row.task, row.protocol) for row in report.run("none").rows)
    assert counts == {(task, protocol): 2 for protocol in (LETTERS, CLOZE) for task in ("csqa", "piqa")} | {
        ("perplexity", TEXT): 1
    }


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (Config(tasks=("mmul",)), "no task 'mmul'. There are: csqa, anli"),
        (Config(protocols=("cloze",)), "no protocol 'cloze'. There are: recipe-general-v1, cloze-v1"),
        (Config(n=0), "n is 0"),
        (Config(tasks=("squad",), protocols=(CLOZE,)), "nothing is left to ask"),
    ],
)
def test_settings_that_ask_nothing_are_refused(tiny: LM, data: Data, cfg: Config, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        general.run(tiny, data, cfg)


def test_a_model_with_patches_is_no_base(tiny: LM, data: Data, patch: WeightPatch) -> None:
    with apply(tiny, patch), pytest.raises(BadInput, match="carries patches"):
        general.run(tiny, data, Config())


def test_a_decode_patch_is_refused_before_anything_is_asked(tiny: LM, data: Data) -> None:
    told: list[tuple[int, int, str]] = []
    patch = DecodePatch.make(tiny, Power(1.0), method="cad")
    with pytest.raises(BadInput, match="cad is a decode patch.*rag"):
        general.run(tiny, data, Config(tasks=("csqa",)), patch=patch, progress=lambda *a: told.append(a))
    assert not told


def test_a_run_that_would_not_fit_is_refused_before_it_starts(
    tiny: LM, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmpatch.resources.free_bytes", lambda device: 1000)
    with pytest.raises(NotEnoughMemory, match="scoring needs about"):
        general.run(tiny, data, Config())


# Going on


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_gives_the_same_report(
    tiny: LM, data: Data, patch: WeightPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, out = Config(tasks=("csqa", "anli", "squad")), tmp_path / "out"
    monkeypatch.setattr(runner, "BLOCK", 2)
    whole = general.run(tiny, data, cfg, patch=patch)
    asked: list[int] = []
    ask = general.ask

    def until(limit: int) -> Any:
        def counted(lm: LM, samples: Sequence[Sample], cfg: Config) -> list[Row]:
            if len(asked) == limit:
                raise KeyboardInterrupt
            asked.append(len(samples))
            return ask(lm, samples, cfg)

        return counted

    total = 2 * len(whole.run("none").parts)
    for limit in (2, total - 2):
        monkeypatch.setattr(general, "ask", until(limit))
        with pytest.raises(KeyboardInterrupt):
            general.run(tiny, data, cfg, patch=patch, out=out)
        assert not applied(tiny)
        with (out / "rows.jsonl").open("a") as file:
            file.write('{"run_id": "none", "chu')
    assert "not finished" in printed(general.read_report(out))
    monkeypatch.setattr(general, "ask", until(99))
    report = general.run(tiny, data, cfg, patch=patch, out=out)
    assert len(asked) == total
    assert report.rows == whole.rows and report.differences("rank_one") == whole.differences("rank_one")
    assert general.read_report(out).differences("rank_one") == whole.differences("rank_one")
    monkeypatch.setattr(general, "ask", until(total))  # all there: nothing is asked again
    general.run(tiny, data, cfg, patch=patch, out=out)


@pytest.mark.slow
def test_another_patch_joins_the_folder_and_the_base_is_not_asked_again(
    tiny: LM, data: Data, edits: list[Edit], make: Maker, tmp_path: Path
) -> None:
    cfg = Config(tasks=("csqa",))
    general.run(tiny, data, cfg, patch=make(tiny, edits), out=tmp_path)
    before = general.read_report(tmp_path).run("none").rows
    report = general.run(tiny, data, cfg, patch=make(tiny, edits[:2]), run_id="two", out=tmp_path)
    assert [each.name for each in report.runs] == ["none", "rank_one", "two"]
    assert report.run("none").rows == before
    assert "two" in printed(report)
    with pytest.raises(BadInput, match="'two' with other settings"):
        general.run(tiny, data, cfg, patch=make(tiny, edits[:3]), run_id="two", out=tmp_path)


@pytest.mark.slow
def test_other_records_or_another_model_do_not_share_a_folder(tiny: LM, data: Data, tmp_path: Path) -> None:
    general.run(tiny, data, Config(tasks=("csqa",)), out=tmp_path)
    other = wrap(tiny_model("llama", seed=1), tiny_tokenizer())
    for lm, cfg in (
        (tiny, Config(tasks=("csqa",), n=2)),
        (tiny, Config(tasks=("mmlu",))),
        (other, Config(tasks=("csqa",))),
    ):
        with pytest.raises(BadInput, match="cannot share a table"):
            general.run(lm, data, cfg, out=tmp_path)


# The report


@pytest.mark.slow
def test_protocols_stand_in_tables_of_their_own(tiny: LM, data: Data, patch: WeightPatch) -> None:
    text = printed(general.run(tiny, data, Config(), patch=patch))
    places = [text.index(protocol) for protocol in (LETTERS, CLOZE, TEXT)]
    assert places == sorted(places) and len(set(places)) == 3
    for word in ("guessing", "none", "rank_one", "difference", "standard error", "records", "tokens"):
        assert word in text
    for task in TASKS:
        assert task in text


@pytest.mark.slow
def test_every_row_has_its_protocol_and_the_record_says_how_it_was_made(
    tiny: LM, data: Data, patch: WeightPatch, tmp_path: Path
) -> None:
    report = general.run(tiny, data, Config(n=2), patch=patch, out=tmp_path, data_name="data")
    assert {row.protocol for row in report.rows} == {LETTERS, CLOZE, TEXT}
    record = report.run("rank_one").record
    assert record["patch_hash"] == patch.hash() and record["mount"] == "bake" and record["method"] == "rank_one"
    assert record["base_weights_hash"] == tiny.fingerprint() and record["settings"]["n"] == 2
    assert {"dtype", "versions", "hardware", "started", "tokenizer_hash", "files", "seconds"} <= set(record)
    moved = report.differences("rank_one")
    assert {m["name"]: m["difference"]["value"] for m in record["metrics"]} == {n: m.value for n, m in moved.items()}
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == len(report.rows) and all(json.loads(line)["source"] for line in lines)


@pytest.mark.slow
def test_the_page_draws_both_models_with_errors_and_needs_nothing(
    tiny: LM, data: Data, patch: WeightPatch, tmp_path: Path
) -> None:
    nasty = "<script>alert('&')</script>"
    report = general.run(tiny, data, Config(), patch=patch, run_id=nasty, data_name=nasty)
    text = report.save_html(tmp_path / "report.html").read_text()
    assert "<script" not in text and str(escape(nasty)) in text
    assert "http" not in text and "url(" not in text
    assert text.count("<figure") == 2  # perplexity is no share
    drawn = [name for name in report.run("none").metrics() if not name.startswith("nats")]
    assert text.count('class="bar"') == 2 * len(drawn)
    assert 'class="error"' in text and 'class="chance"' in text and "within a standard error" in text


@pytest.mark.slow
def test_the_unpatched_model_alone_makes_a_report_too(tiny: LM, data: Data, tmp_path: Path) -> None:
    report = general.run(tiny, data, Config(tasks=("csqa", "perplexity")))
    assert "Nothing is patched" in printed(report) and "cloze/csqa" in printed(report)
    assert report.save_html(tmp_path / "r.html").is_file()
    with pytest.raises(BadInput, match="There are: none"):
        report.run("rome")


@pytest.mark.slow
def test_progress_is_told_until_the_end(tiny: LM, data: Data, patch: WeightPatch) -> None:
    told: list[tuple[int, int, str]] = []
    general.run(tiny, data, Config(tasks=("csqa",)), patch=patch, progress=lambda *a: told.append(a))
    assert told[-1] == (6, 6, "scoring rank_one") and told[1] == (6, 6, "scoring none")


@pytest.mark.slow
def test_bench_takes_the_folder_by_name(tiny: LM, patch: WeightPatch, tmp_path: Path) -> None:
    write(tmp_path / "data", "mmlu")
    report = lp.bench(tiny, "general", tmp_path / "data", patch=patch, n=2, limit=3, out=tmp_path / "out")
    assert [each.name for each in report.runs] == ["none", "rank_one"]
    assert report.run("none").record["data_name"] == "data" and len(report.run("none").rows) == 4
    with pytest.raises(BadInput, match="general makes no patches. Fit one with rome first"):
        lp.bench(tiny, "general", tmp_path / "data", method="rome")
    with pytest.raises(BadInput, match="general reads no unrelated"):
        lp.bench(tiny, "general", tmp_path / "data", unrelated="x")


@pytest.mark.slow
def test_the_command_line_takes_the_folder_and_goes_on(tiny: LM, patch: WeightPatch, tmp_path: Path) -> None:
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    patch.save(tmp_path / "patch")
    folder, out = str(write(tmp_path / "data", "mmlu", "wikitext")), tmp_path / "out"
    words = ["bench", str(tmp_path / "model"), "general", folder, "-p", str(tmp_path / "patch"), "-o", str(out)]
    for _ in range(2):
        done = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(build(), words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert "against the unpatched model" in done.stdout and "no file anli_r1_dev*.json*" in done.stdout
    assert (out / "report.html").is_file()
    assert len((out / "rows.jsonl").read_text().splitlines()) == 2 * (3 + 3 + 3)
