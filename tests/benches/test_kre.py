"""The kre bench: letters against plain forwards, letters that share tokens, runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from tiny import tiny_lm

import lmpatch as lp
from lmpatch.benches import kre
from lmpatch.benches.context.bench import Reply
from lmpatch.benches.context.prompts import worded
from lmpatch.benches.kre import WHOLE, Config, Letters, choose
from lmpatch.data.context import ContextRecord
from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput
from lmpatch.inference.score import score
from lmpatch.inference.tokens import encode
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import apply
from lmpatch.patches.weight.patch import WeightPatch

Maker = Callable[[LM, Sequence[Edit]], WeightPatch]
QUICK = Config(baselines=("opin",), bootstrap=20)
THINGS = ("tower", "capital", "needle", "apple", "tongue", "space")
RECORDS = [
    ContextRecord(f"The {thing} is in Rome.", f"Where is the {thing}?", "ABC"[i % 3], "ABC"[(i + 1) % 3],
                  options=("Paris", "Seattle", "Tokyo"), id=thing)
    for i, thing in enumerate(THINGS)
]  # fmt: skip


def next_token(lm: LM, prompt: str) -> torch.Tensor:
    """[V] logits by the model itself."""
    with torch.no_grad():
        out: torch.Tensor = lm.model(**lm.tokenizer(prompt, return_tensors="pt")).logits[0, -1].float()
    return out


def test_a_letter_has_the_logit_of_its_token_behind_the_prompt(lm: LM) -> None:
    records = [replace(r, prompt=f"{r.prompt}\n") for r in RECORDS]  # no blank goes between a line's end and a letter
    for record, said in zip(records, choose(lm, records, batch_size=4), strict=True):
        z = next_token(lm, record.prompt)
        wanted = [float(z[lm.tokenizer(letter, add_special_tokens=False)["input_ids"][0]]) for letter in "ABC"]
        assert said.scores == pytest.approx(wanted, abs=1e-4) and said.flag == ""
        assert said.text == "ABC"[wanted.index(max(wanted))]


@pytest.mark.slow
def test_letters_that_share_their_first_token_are_scored_whole_and_flagged(lm: LM) -> None:
    for record, said in zip(RECORDS, choose(lm, RECORDS, batch_size=4), strict=True):
        assert said.flag == WHOLE  # this tokenizer makes the blank before a letter a token of its own
        wanted = [score(lm, [record.prompt], [letter])[0].total for letter in "ABC"]
        assert said.scores == pytest.approx(wanted, abs=1e-4)
        assert said.text == "ABC"[wanted.index(max(wanted))]


@pytest.mark.slow
def test_as_released_a_blank_stands_at_the_end_and_letters_are_bare(lm: LM) -> None:
    report = kre.run(lm, RECORDS, replace(QUICK, official=True))
    rows = {run.name: [row for row in run.rows if row.when == "context"] for run in report.runs}
    for i, record in enumerate(RECORDS):
        opinion = worded(record, "opin").prompt  # ends as it is, without a blank
        for name, prompt in (("none", f"{record.prompt} "), ("none, opin", opinion)):
            z = next_token(lm, prompt)
            wanted = [float(z[token]) for token in without_context(lm)]
            assert rows[name][i].scores == pytest.approx(wanted, abs=1e-4) and rows[name][i].flag == ""


def without_context(lm: LM) -> list[int]:
    """Tokens of the letters A, B, C alone."""
    return [lm.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ABC"]


@pytest.mark.slow
def test_the_token_of_a_letter_is_the_likelier_of_two(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tokenizer that knew " A", letters would have a token behind a blank too."""
    behind = (7, 30, 31)
    monkeypatch.setattr(kre, "option_tokens", lambda lm, prompt, _: (encode(lm, prompt), behind))
    kinds: dict[Letters, list[Reply]] = {k: choose(lm, RECORDS, batch_size=4, letters=k) for k in get_args(Letters)}
    mass = [[torch.tensor(said.scores).logsumexp(0) for said in kinds[k]] for k in ("blank", "bare")]
    for i, record in enumerate(RECORDS):
        z = next_token(lm, record.prompt)
        assert kinds["blank"][i].scores == pytest.approx(z[list(behind)].tolist(), abs=1e-4)
        assert kinds["bare"][i].scores == pytest.approx(z[without_context(lm)].tolist(), abs=1e-4)
        likelier = kinds["blank" if mass[0][i] > mass[1][i] else "bare"][i]
        assert kinds["auto"][i].scores == pytest.approx(likelier.scores, abs=1e-4)


@pytest.mark.slow
def test_what_is_counted_is_what_was_chosen(edits: list[Edit], make: Maker) -> None:
    lm = tiny_lm("llama")
    patch = make(lm, edits)
    report = kre.run(lm, RECORDS, QUICK, patch=patch)
    assert [run.name for run in report.runs] == ["none", "none, opin", "rank_one"]
    with apply(lm, patch):
        wanted = [said.text for said in choose(lm, RECORDS, batch_size=64)]
    rows = [row for row in report.run("rank_one").rows if row.when == "context"]
    assert [row.said for row in rows] == wanted
    share = sum(said == r.answer for said, r in zip(wanted, RECORDS, strict=True)) / len(RECORDS)
    assert report.metrics()["rank_one"]["acc"].value == pytest.approx(share)
    closed = [row for row in report.run("none").rows if row.when == "bare"]
    without_context = [replace(r, prompt=r.without_context) for r in RECORDS]
    assert [row.said for row in closed] == [said.text for said in choose(lm, without_context, batch_size=64)]
    foreign = [row for row in report.run("rank_one").rows if row.when == "foreign"]
    assert [row.kept for row in foreign] == [row.said == one.said for row, one in zip(foreign, closed, strict=True)]


@pytest.mark.slow
def test_a_decode_patch_is_asked_with_and_without_the_context() -> None:
    lm = tiny_lm("llama")
    patches = [lp.fit(lm, "cad", RECORDS, alpha=alpha) for alpha in (0.0, 3.0)]
    plain, strong = (kre.run(lm, RECORDS, replace(QUICK, baselines=()), patch=patch) for patch in patches)
    whole = [row.said for row in plain.run("none").rows]
    assert [row.said for row in plain.run("cad").rows] == whole
    without_context = {row.place: row.said for row in strong.run("cad").rows if row.when == "bare"}
    assert without_context == {row.place: row.said for row in strong.run("none").rows if row.when == "bare"}
    assert [row.said for row in strong.run("cad").rows] != whole


@pytest.mark.slow
def test_the_ending_of_the_prompt_is_part_of_what_is_compared(tmp_path_factory: pytest.TempPathFactory) -> None:
    lm, out = tiny_lm("llama"), tmp_path_factory.mktemp("kre")
    kre.run(lm, RECORDS[:2], replace(QUICK, baselines=()), out=out)
    with pytest.raises(BadInput, match="suffix 'Answer:', asked now 'The correct answer is'"):
        kre.run(lm, RECORDS[:2], replace(QUICK, baselines=(), suffix="The correct answer is"), out=out)


def test_records_without_options_are_refused() -> None:
    with pytest.raises(BadInput, match="record 0 has 0 options"):
        kre.run(tiny_lm("llama"), [ContextRecord("c", "q", "a")])


def test_the_default_wordings_are_those_published_for_options() -> None:
    assert Config().baselines == ("base", "attr", "instr", "opin", "instr+opin")
