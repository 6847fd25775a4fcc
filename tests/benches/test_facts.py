"""The facts bench end to end on tiny models, with patches made by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CORE, tiny_lm

from lmpatch.benches import facts
from lmpatch.benches.core.runner import estimate
from lmpatch.benches.facts import Config, Row, asking, bench
from lmpatch.data.edits import Edit
from lmpatch.errors import BadInput, ForeignWrite, NotEnoughMemory, SubjectNotFound
from lmpatch.inference.generate import generate
from lmpatch.inference.score import score
from lmpatch.models.lm import LM
from lmpatch.patches.decode.patch import DecodePatch
from lmpatch.patches.decode.rules import Power
from lmpatch.patches.ledger import Applied, applied, apply
from lmpatch.patches.weight.delta import Dense
from lmpatch.patches.weight.patch import WeightPatch
from lmpatch.provenance import hash_tensors

Maker = Callable[[LM, Sequence[Edit]], WeightPatch]


@pytest.fixture
def tiny() -> LM:
    return tiny_lm("llama")


QUICK = Config(max_new_tokens=4, teacher_forced=False, latency=False, health=False, bootstrap=0, pack=0)
"""Short answers, and nothing measured that a test does not ask for."""


@pytest.fixture
def quick() -> Config:
    return QUICK


def bits(lm: LM) -> str:
    return hash_tensors(sorted(lm.model.state_dict().items()), exact=True)


def say(lm: LM, prompts: Sequence[str], cfg: Config) -> list[str]:
    said: list[str] = generate(lm, list(prompts), max_new_tokens=cfg.max_new_tokens)
    return said


def of(rows: Sequence[Row], kind: str, when: str = "final") -> list[Row]:
    return [row for row in rows if row.kind == kind and row.when == when]


def plainly(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.when, row.case_id, row.kind, row.prompt))


# What is in a row


@pytest.fixture(scope="module", params=CORE)
def scored(request: pytest.FixtureRequest, edits: list[Edit], make: Maker) -> tuple[LM, WeightPatch, list[Row]]:
    """A model, a patch, and the rows of the patched model."""
    lm = tiny_lm(request.param)
    patch = make(lm, edits)
    return lm, patch, facts.run(lm, edits, QUICK, patch=patch).run("rank_one").rows


@pytest.mark.slow
def test_rows_hold_what_the_model_says_with_and_without_the_patch(scored: tuple[LM, WeightPatch, list[Row]]) -> None:
    lm, patch, rows = scored
    prompts = [row.prompt for row in rows]
    before = say(lm, prompts, QUICK)
    with apply(lm, patch):
        after = say(lm, prompts, QUICK)
    assert [row.base_text for row in rows] == before
    assert [row.text for row in rows] == after
    assert before != after
    assert {row.kind for row in rows} == {
        "edit", "rephrase", "loc/same_relation", "loc/same_subject", "loc/distractor", "port/reasoning",
    }  # fmt: skip


@pytest.mark.slow
def test_kl_is_that_of_the_full_next_token_distributions(scored: tuple[LM, WeightPatch, list[Row]]) -> None:
    lm, patch, rows = scored
    rows = [row for row in rows if row.kind.startswith("loc/")]

    def logp(prompt: str) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = lm.model(**lm.tokenizer(prompt, return_tensors="pt")).logits[0, -1].log_softmax(-1)
        return out

    before = [logp(row.prompt) for row in rows]
    with apply(lm, patch):
        after = [logp(row.prompt) for row in rows]
    wanted = [float((p.exp() * (p - q)).sum()) for p, q in zip(before, after, strict=True)]
    assert [row.kl for row in rows] == pytest.approx(wanted, abs=1e-5)
    assert max(wanted) > 1e-3


@pytest.mark.slow
def test_teacher_forced_numbers_are_those_of_score(tiny: LM, edits: list[Edit], make: Maker, quick: Config) -> None:
    patch = make(tiny, edits)
    rows = facts.run(tiny, edits, replace(quick, teacher_forced=True), patch=patch).run("rank_one").rows
    near = of(rows, "loc/same_relation")
    base = score(tiny, [row.prompt for row in near], [row.aliases[0] for row in near])
    with apply(tiny, patch):
        for row in of(rows, "edit"):
            new, old = score(tiny, [row.prompt] * 2, [row.aliases[0], row.old_aliases[0]])
            assert row.tf_acc == new.accuracy
            assert row.tf_new == pytest.approx(new.total / len(new.ids), abs=1e-5)
            assert row.tf_old == pytest.approx(old.total / len(old.ids), abs=1e-5)
        for row, was in zip(near, base, strict=True):
            (now,) = score(tiny, [row.prompt], [row.aliases[0]])
            assert row.tf_same == sum(a == b for a, b in zip(now.argmax, was.argmax, strict=True)) / len(was.ids)


@pytest.mark.slow
def test_an_edit_that_the_patch_makes_true_scores_and_the_base_does_not(
    tiny: LM, edits: list[Edit], make: Maker, quick: Config
) -> None:
    patch = make(tiny, edits)
    prompts = [edit.prompt for edit in edits]
    before = say(tiny, prompts, quick)
    with apply(tiny, patch):
        after = say(tiny, prompts, quick)
    true = [replace(e, target=said.strip()) for e, said, was in zip(edits, after, before, strict=True) if said != was]
    report = facts.run(tiny, true, quick, patch=patch)
    found = {run.name: run.metric("reliability") for run in report.runs}
    assert found["rank_one"] and found["rank_one"].value == 1.0 and found["rank_one"].n == len(true)
    assert found["none"] and found["none"].value < 1.0
    wrong = report.run("rank_one").metric("reliability", "was_wrong")
    assert wrong and wrong.n == len(true) * (1 - found["none"].value)


@pytest.mark.slow
def test_the_base_run_moves_nothing(tiny: LM, edits: list[Edit], quick: Config) -> None:
    none = facts.run(tiny, edits, replace(quick, teacher_forced=True)).run("none")
    for row in none.rows:
        assert row.text == row.base_text
        assert row.kl is None or row.kl == pytest.approx(0, abs=1e-6)
    for metric in none.metrics().values():
        if metric.name.startswith(("loc_unchanged", "tf_locality")):
            assert metric.value == 1.0


@pytest.mark.slow
def test_fact_in_prompt_reads_the_edit_sentence_first(tiny: LM, edits: list[Edit], quick: Config) -> None:
    rows = facts.run(tiny, edits, quick).run("fact_in_prompt").rows
    by_id = {edit.id: edit for edit in edits}
    sentences = [f"{by_id[row.case_id].prompt} {by_id[row.case_id].target}." for row in rows]
    read = [f"{sentence} {row.prompt}" for sentence, row in zip(sentences, rows, strict=True)]
    assert [row.text for row in rows] == say(tiny, read, quick)
    assert [row.base_text for row in rows] == say(tiny, [row.prompt for row in rows], quick)
    assert "loc/distractor" not in {row.kind for row in rows}


@pytest.mark.slow
def test_both_mounts_say_the_same(tiny: LM, edits: list[Edit], make: Maker, quick: Config) -> None:
    baked, beside = (
        facts.run(tiny, edits[:3], quick, patch=make(tiny, edits[:3]), mount=m).run("rank_one").rows
        for m in ("bake", "side")
    )
    assert [row.text for row in baked] == [row.text for row in beside]


@pytest.mark.slow
def test_no_kl_is_given_where_the_head_was_changed(tiny: LM, edits: list[Edit], quick: Config) -> None:
    head = tiny.layout.weight(tiny.layout.head)
    change = 0.1 * torch.randn(tiny.parameter(head).shape, generator=torch.Generator().manual_seed(0))
    patch = WeightPatch.make(tiny, {head: Dense(change)}, method="head", edits=edits)
    report = facts.run(tiny, edits, quick, patch=patch)
    assert all(row.kl is None for row in report.run("head").rows)
    assert report.run("head").metric("loc_kl/same_relation") is None
    assert report.run("none").metric("loc_kl/same_relation") is not None


@pytest.mark.slow
def test_chat_asks_through_the_template(tiny: LM, edits: list[Edit], quick: Config) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}USER: {{ m.content }} BOT:{% endfor %}"
    chat = LM(tiny.model, tokenizer, tiny.layout, "chat")
    report = facts.run(chat, edits, quick)
    rows = of(report.run("none").rows, "edit")
    assert [row.text for row in rows] == say(tiny, [f"USER: {row.prompt} BOT:" for row in rows], quick)
    assert report.run("none").record["protocol_id"] == "gen-final-v1-prefix-4tokens-chat"


@pytest.mark.slow
def test_score_gives_the_rows_of_the_model_as_it_is(tiny: LM, edits: list[Edit], make: Maker, quick: Config) -> None:
    edits = edits[:3]
    patch = make(tiny, edits)
    wanted = facts.run(tiny, edits, quick, patch=patch).run("rank_one").rows
    whole = replace(quick, n=len(edits))
    items = bench.plan(tiny, edits, whole, fixed=True)
    bench.warm(tiny, items, whole, None, None)
    with apply(tiny, patch):
        found = facts.ask(tiny, items, whole)
        with pytest.raises(BadInput, match="carries patches"):
            bench.warm(tiny, items, whole, None, None)
    assert [(row.prompt, row.text, row.em) for row in found] == [(row.prompt, row.text, row.em) for row in wanted]
    assert all(row.text == row.base_text for row in facts.ask(tiny, items, whole))


# When it is scored


@pytest.mark.slow
def test_every_commit_is_made_on_the_model_with_the_earlier_ones(
    tiny: LM, edits: list[Edit], make: Maker, quick: Config
) -> None:
    seen: list[tuple[int, int]] = []

    def watching(lm: LM, commit: list[Edit]) -> WeightPatch:
        seen.append((len(applied(lm)), len(commit)))
        return make(lm, commit)

    facts.run(tiny, edits, replace(quick, n=3, commit_size=2), make=watching)
    assert seen == [(0, 2), (1, 1), (0, 2), (1, 1)]


@pytest.mark.slow
def test_immediate_rows_are_taken_right_after_their_commit_and_final_ones_after_all(
    tiny: LM, edits: list[Edit], make: Maker, quick: Config
) -> None:
    made: list[WeightPatch] = []

    def keeping(lm: LM, commit: list[Edit]) -> WeightPatch:
        made.append(make(lm, commit))
        return made[-1]

    report = facts.run(tiny, edits, replace(quick, n=6, commit_size=2), make=keeping)
    rows = report.run("patched").rows
    for stage, when in ((0, "immediate"), (1, "immediate"), (2, "immediate"), (2, "final")):
        on = [apply(tiny, patch) for patch in made[: stage + 1]]
        fresh = [row for row in of(rows, "edit", when) if when == "final" or row.n_edits == 2 * (stage + 1)]
        assert len(fresh) == (6 if when == "final" else 2)
        assert [row.text for row in fresh] == say(tiny, [row.prompt for row in fresh], quick)
        for handle in on:
            handle.remove()
    assert [row.age for row in sorted(of(rows, "edit"), key=lambda row: row.edit_index)] == [4, 4, 2, 2, 0, 0]
    forgot = report.run("patched").metric("forgetting")
    assert forgot and forgot.n == 6


@pytest.mark.slow
def test_single_commits_need_no_immediate_rows(tiny: LM, edits: list[Edit], make: Maker, quick: Config) -> None:
    rows = facts.run(tiny, edits[:3], replace(quick, n=3), make=make).run("patched").rows
    assert {row.when for row in rows} == {"final"}


@pytest.mark.slow
def test_retention_follows_the_probes_through_later_commits(
    tiny: LM, edits: list[Edit], make: Maker, quick: Config
) -> None:
    many = [replace(e, prompt=f"{e.prompt} {i}", id=f"{e.id}{i}", rephrases=()) for i in range(4) for e in edits]
    cfg = replace(quick, n=24, commit_size=2, retention=True, immediate=False, distractor=False)
    report = facts.run(tiny, many, cfg, make=make).run("patched")
    ages = {(row.when, row.age) for row in report.rows if row.probe and row.kind == "edit"}
    assert {age for when, age in ages if when == "immediate"} == {0}
    assert {age for when, age in ages if when == "retention"} <= set(range(2, 10, 2))
    assert any(when == "retention" for when, _ in ages)
    assert max(age for when, age in ages if when == "final") == 22
    assert [bin for bin, _, _ in report.record["retention"]] == ["0", "1-9", "10-99"]
    assert len({row.case_id for row in report.rows if row.probe}) == 10


@pytest.mark.slow
def test_a_superseded_edit_is_scored_right_after_its_commit_only(
    tiny: LM, edits: list[Edit], make: Maker, quick: Config
) -> None:
    two = [edits[0], replace(edits[0], target="Berlin", id="later")]
    report = facts.run(tiny, two, replace(quick, n=2, commit_size=1), make=make)
    rows = report.run("patched").rows
    first = "immediate" if rows[0].when == "immediate" else ""
    early = [row for row in rows if row.when == "immediate" and row.n_edits == 1]
    assert first and {row.flag for row in early} == {""}
    lost = early[0].case_id
    assert {row.text for row in rows if row.case_id == lost and row.when == "final"} == {None}
    assert report.run("patched").record["collision_counts"]["superseded"] == 1
    final = report.run("patched").metric("reliability")
    assert final and (final.n, final.dropped) == (1, 1)


@pytest.mark.slow
def test_edits_that_cannot_be_written_are_scored_flagged_and_counted(
    tiny: LM, edits: list[Edit], make: Maker, quick: Config
) -> None:
    def strict(lm: LM, commit: list[Edit]) -> WeightPatch:
        for edit in commit:
            edit.need_subject()
        return make(lm, commit)

    some = [replace(edits[0], subject="Big Ben"), *edits[1:3]]
    report = facts.run(tiny, some, replace(quick, n=3), make=strict).run("patched")
    refused = [row for row in report.rows if row.flag]
    assert {row.case_id for row in refused} == {"Paris"} and "SubjectNotFound" in refused[0].flag
    assert all(row.text is not None for row in refused)
    metric = report.metric("reliability")
    assert metric and metric.n == 3 and report.record["refused"] == 1

    def never(lm: LM, commit: list[Edit]) -> WeightPatch:
        raise SubjectNotFound("no")

    report = facts.run(tiny, edits[:2], quick, make=never).run("patched")
    assert all(row.text == row.base_text and row.flag for row in report.rows)


@pytest.mark.slow
def test_a_chunk_stops_once_the_model_has_collapsed(tiny: LM, edits: list[Edit], make: Maker, quick: Config) -> None:
    calls: list[int] = []

    def destroy(lm: LM, commit: list[Edit]) -> WeightPatch:
        calls.append(len(commit))
        name = lm.layout.weight(lm.layout.head)  # ten times the logits: as sure as can be, and mostly wrong
        return WeightPatch.make(lm, {name: Dense(9 * lm.parameter(name).detach())}, method="loud", edits=commit)

    report = facts.run(tiny, edits, replace(quick, n=6, commit_size=2, health=True), make=destroy).run("patched")
    assert calls == [2]
    assert report.record["collapsed_at"] == [2]
    stopped = {row.case_id for row in report.rows if row.flag.startswith("stopped")}
    assert len(stopped) == 4 and len(of(report.rows, "edit")) == 6
    assert report.record["health"]["perplexity_max"] > 2 * report.record["health"]["base_perplexity"]


@pytest.mark.slow
def test_make_each_gives_the_rows_of_make(tiny: LM, edits: list[Edit], make: Maker, quick: Config) -> None:
    edits = edits[:3]
    sizes: list[int] = []

    def each(lm: LM, some: list[Edit]) -> list[WeightPatch]:
        sizes.append(len(some))
        return [make(lm, [edit]) for edit in some]

    one = facts.run(tiny, edits, quick, make=make).run("patched")
    many = facts.run(tiny, edits, replace(quick, fit_batch=2), make_each=each).run("patched")
    assert sizes == [2, 1]
    assert plainly(many.rows) == plainly(one.rows)
    with pytest.raises(BadInput, match="1 patches of 2 edits"):
        facts.run(tiny, edits, replace(quick, fit_batch=2), make_each=lambda lm, some: each(lm, some)[:1])


# The model comes back


@pytest.mark.slow
@pytest.mark.parametrize("mount", ["bake", "side"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CORE)
def test_the_model_is_the_same_afterwards_to_the_bit(
    family: str, dtype: torch.dtype, edits: list[Edit], make: Maker, quick: Config, mount: Any
) -> None:
    lm = tiny_lm(family, dtype)
    before = bits(lm)
    cfg = replace(quick, n=3, commit_size=2, chunks=1, max_new_tokens=1, health=True)
    assert facts.run(lm, edits[:3], cfg, make=make, mount=mount).run("patched").parts[0]["commits"]
    assert bits(lm) == before and not applied(lm)


@pytest.mark.slow
def test_an_interruption_in_the_middle_takes_everything_off(
    tiny: LM, edits: list[Edit], make: Maker, quick: Config
) -> None:
    before = bits(tiny)

    def interrupted(lm: LM, commit: list[Edit]) -> WeightPatch:
        if applied(lm):
            raise KeyboardInterrupt
        return make(lm, commit)

    with pytest.raises(KeyboardInterrupt):
        facts.run(tiny, edits, replace(quick, n=6, commit_size=2), make=interrupted)
    assert bits(tiny) == before and not applied(tiny)


@pytest.mark.slow
def test_a_patch_that_stays_on_is_noticed(
    tiny: LM, edits: list[Edit], make: Maker, quick: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Applied, "remove", lambda self, *, force=False: None)
    with pytest.raises(ForeignWrite, match="still on the model"):
        facts.run(tiny, edits, quick, patch=make(tiny, edits))


@pytest.mark.slow
def test_a_weight_that_does_not_come_back_is_noticed(
    tiny: LM, edits: list[Edit], make: Maker, quick: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = Applied.remove

    def leaky(self: Applied, *, force: bool = False) -> None:
        remove(self, force=force)
        with torch.no_grad():
            self.lm.parameter(next(iter(self.patch.base.touched)))[0, 0] += 1

    monkeypatch.setattr(Applied, "remove", leaky)
    with pytest.raises(ForeignWrite, match="did not come back"):
        facts.run(tiny, edits, quick, patch=make(tiny, edits))


def test_a_model_with_patches_is_no_base(tiny: LM, edits: list[Edit], make: Maker, quick: Config) -> None:
    with apply(tiny, make(tiny, edits)), pytest.raises(BadInput, match=r"carries patches \(rank_one\)"):
        facts.run(tiny, edits, quick)


def test_a_decode_patch_is_refused_before_anything_is_asked(tiny: LM, edits: list[Edit], quick: Config) -> None:
    told: list[tuple[int, int, str]] = []
    patch = DecodePatch.make(tiny, Power(1.0), method="cad")
    with pytest.raises(BadInput, match="cad is a decode patch.*rag"):
        facts.run(tiny, edits, quick, patch=patch, progress=lambda *a: told.append(a))
    assert not told


# Going on


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_gives_the_same_rows(
    tiny: LM, edits: list[Edit], make: Maker, quick: Config, tmp_path: Path
) -> None:
    edits, quick = edits[:4], replace(quick, teacher_forced=True)
    calls: list[str] = []

    def until(limit: int) -> Maker:
        def counted(lm: LM, commit: Sequence[Edit]) -> WeightPatch:
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(commit[0].prompt)
            return make(lm, commit)

        return counted

    whole = facts.run(tiny, edits, quick, make=make, run_id="fake")
    with pytest.raises(KeyboardInterrupt):
        facts.run(tiny, edits, quick, make=until(2), run_id="fake", out=tmp_path)
    left = facts.read_report(tmp_path).run("fake")
    assert len(left.parts) == 2 and left.record["planned"] == 4
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"run_id": "fake", "wh')
    report = facts.run(tiny, edits, quick, make=until(99), run_id="fake", out=tmp_path)
    assert len(calls) == len(set(calls)) == 4
    assert report.run("fake").rows == whole.run("fake").rows
    assert report.metrics() == whole.metrics()
    facts.run(tiny, edits, quick, make=until(4), run_id="fake", out=tmp_path)  # all there: nothing is made again
    assert facts.read_report(tmp_path).metrics() == whole.metrics()


@pytest.mark.slow
def test_the_unpatched_model_is_asked_once(
    tiny: LM, edits: list[Edit], quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = edits[:2]
    asked: list[int] = []

    def counted(lm: LM, prompts: Sequence[str], **settings: Any) -> Any:
        asked.append(len(prompts))
        return generate(lm, prompts, **settings)

    monkeypatch.setattr(asking, "generate", counted)
    facts.run(tiny, edits, quick, out=tmp_path)
    assert asked
    asked.clear()
    for name in ("rows", "chunks", "runs"):
        (tmp_path / f"{name}.jsonl").unlink()
    facts.run(tiny, edits, quick, out=tmp_path)
    assert not asked
    facts.run(tiny, edits, replace(quick, n=2, max_new_tokens=5), out=tmp_path / "longer")
    assert asked


@pytest.mark.slow
def test_other_weights_are_another_base(tiny: LM, edits: list[Edit], quick: Config, tmp_path: Path) -> None:
    quick = replace(quick, teacher_forced=True)
    questions = bench.plan(tiny, edits, replace(quick, n=len(edits)), fixed=True)[0].chunk.questions
    one = asking.ask_base(tiny, questions, quick, tmp_path)
    other = asking.ask_base(tiny_lm("llama", seed=1), questions, quick, tmp_path)
    assert one.texts != other.texts
    again = asking.ask_base(tiny, questions, quick, tmp_path)
    assert again.texts == one.texts and again.scores == one.scores
    assert all(torch.equal(again.states[text], state) for text, state in one.states.items())


@pytest.mark.slow
def test_a_folder_of_other_settings_is_refused(
    tiny: LM, edits: list[Edit], make: Maker, quick: Config, tmp_path: Path
) -> None:
    edits = edits[:2]
    facts.run(tiny, edits, quick, make=make, run_id="fake", out=tmp_path, settings={"lr": 1})
    with pytest.raises(BadInput, match="n 1, asked now 2"):
        facts.run(tiny, edits, replace(quick, n=2), make=make, run_id="fake", out=tmp_path, settings={"lr": 1})
    with pytest.raises(BadInput, match="lr 1, asked now 2"):
        facts.run(tiny, edits, quick, make=make, run_id="fake", out=tmp_path, settings={"lr": 2})
    report = facts.run(tiny, edits, quick, make=make, run_id="other", out=tmp_path, settings={"lr": 2})
    assert [run.name for run in report.runs] == ["none", "fact_in_prompt", "fake", "other"]


# Before it starts


@pytest.mark.slow
def test_an_estimate_counts_items_and_bytes(tiny: LM, edits: list[Edit], quick: Config) -> None:
    small, large = estimate(facts, tiny, edits[:2], quick), estimate(facts, tiny, edits, quick)
    assert 0 < small.items < large.items and 0 < small.bytes < large.bytes and small.seconds > 0


def test_a_run_that_would_not_fit_is_refused_before_it_starts(
    tiny: LM, edits: list[Edit], quick: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmpatch.resources.free_bytes", lambda device: 1000)
    for call in (partial(estimate, facts), facts.run):
        with pytest.raises(NotEnoughMemory, match="scoring needs about"):
            call(tiny, edits, quick)


def test_what_does_not_go_together_is_refused(tiny: LM, edits: list[Edit], make: Maker, quick: Config) -> None:
    with pytest.raises(BadInput, match="not both"):
        facts.run(tiny, edits, quick, make=make, patch=make(tiny, edits))
    with pytest.raises(BadInput, match="make_each fits single edits"):
        facts.run(tiny, edits, replace(quick, n=2), make_each=lambda lm, some: [])
    with pytest.raises(BadInput, match="must be 1 or more"):
        facts.run(tiny, edits, replace(quick, n=0))


def test_unrelated_questions_join_as_a_locality_kind(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text('{"prompt": "a", "target": "b"}\n' * 3)
    (tmp_path / "q.jsonl").write_text('{"question": "x", "answers": "1"}\n{"question": "y", "answers": "2"}\n')
    kinds = [edit.locality for edit in facts.load(tmp_path / "f.jsonl", unrelated=tmp_path / "q.jsonl")]
    assert [groups[0][0] for groups in kinds] == ["unrelated"] * 3
    assert [groups[0][1][0].prompt for groups in kinds] == ["x", "y", "x"]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 6])
def test_progress_is_one_counter_over_prompts_that_ends_with_its_stage(
    tiny: LM, edits: list[Edit], make: Maker, quick: Config, n: int
) -> None:
    told: list[tuple[int, int, str]] = []
    cfg = replace(quick, n=n, commit_size=1, batch_size=4)
    facts.run(tiny, edits, cfg, make=make, run_id="rank_one", progress=lambda *a: told.append(a))
    stages = list(dict.fromkeys(what for *_, what in told))
    assert stages == ["asking the unpatched model", "scoring none", "scoring fact_in_prompt", "scoring rank_one"]
    for stage in stages:
        counts = [(done, total) for done, total, what in told if what == stage]
        assert len({total for _, total in counts}) == 1 and counts == sorted(counts), stage
        assert [done == total for done, total in counts].index(True) >= len(counts) - 2, stage
        assert len(counts) > 5 or stage in stages[1:3]  # what the unpatched model said is known
    assert told[-1][0] > len(edits) and next(t for t in told if t[2] == "scoring rank_one")[0] == 0


# Two at once


@pytest.mark.slow
def test_a_folder_where_a_run_is_at_work_is_refused_and_stays_whole(
    tiny: LM, edits: list[Edit], make: Maker, tmp_path: Path
) -> None:
    patch = make(tiny, edits)

    def run(out: Path, progress: Any = None) -> Any:
        return facts.run(tiny, edits, QUICK, patch=patch, out=out, progress=progress)

    other, refused = tiny_lm("llama"), []

    def meanwhile(*_: object) -> None:  # of another model, as another process has it
        with pytest.raises(BadInput, match="another run is at work in .*Wait for its end") as error:
            facts.run(other, edits, QUICK, patch=patch, out=tmp_path / "out")
        refused.append(error)

    report = run(tmp_path / "out", meanwhile)
    assert refused and plainly(run(tmp_path / "out").rows) == plainly(report.rows)
    assert plainly(report.rows) == plainly(run(tmp_path / "alone").rows)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 8])
def test_threads_with_one_model_and_one_folder_take_turns(
    count: int, tiny: LM, edits: list[Edit], make: Maker, tmp_path: Path
) -> None:
    patch, was = make(tiny, edits), bits(tiny)
    alone = facts.run(tiny, edits, QUICK, patch=patch)

    def work(_: int) -> Any:
        return facts.run(tiny, edits, QUICK, patch=patch, out=tmp_path / "out")

    with ThreadPoolExecutor(count) as pool:
        reports = [*pool.map(work, range(count))]
    assert bits(tiny) == was and applied(tiny) == ()
    assert all(plainly(report.rows) == plainly(alone.rows) for report in reports)
