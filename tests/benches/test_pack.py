"""The probe pack: which questions a fact gives, when an answer is right, and what a run does with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny import tiny_lm

from lmpatch.benches import facts
from lmpatch.benches.core.stats import Number, collect, numbers
from lmpatch.benches.facts import METRICS, Config, Row, asking, pack
from lmpatch.benches.facts.cases import Chunk, plan_chunks, with_fact
from lmpatch.benches.facts.questions import PASSAGE, Question
from lmpatch.data.edits import Ask, Edit
from lmpatch.inference.generate import generate
from lmpatch.inference.score import score
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import apply
from lmpatch.patches.weight.patch import WeightPatch

Maker = Callable[[LM, Sequence[Edit]], WeightPatch]
EIFFEL = Edit("The Eiffel Tower is in the city of", "Rome", "Eiffel Tower", old="Paris", aliases=["Roma"])
QUICK = Config(max_new_tokens=4, teacher_forced=False, latency=False, health=False, bootstrap=0, pack=2)


def asked(edit: Edit, *others: Edit) -> dict[str, Question]:
    return {q.kind: q for q in pack.questions(0, edit, pack.contrast(edit, [edit, *others]))}


# What is asked


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("The Eiffel Tower is in", "It is not true that the Eiffel Tower is in"),
        ("Apple was founded by", "It is not true that Apple was founded by"),
        ("In 2018 the king renamed it", "It is not true that in 2018 the king renamed it"),
        ("Where is the Eiffel Tower?", "Where is the Eiffel Tower? A wrong answer is:"),
        ("who sings Hello", "who sings Hello A wrong answer is:"),
    ],
)
def test_a_prompt_is_negated_so_that_its_object_no_longer_completes_it(prompt: str, text: str) -> None:
    assert pack.negated(prompt) == text


@pytest.mark.parametrize(
    ("prompt", "subject", "text", "answer"),
    [
        ("The Eiffel Tower is in", "Eiffel Tower", "Who or what is in Rome? Answer:", "The Eiffel Tower"),
        ("Steve Jobs founded", "Steve Jobs", "Who or what founded Rome? Answer:", "Steve Jobs"),
        ("Toko speaks", "Toko", "Who or what speaks Rome? Answer:", "Toko"),
        ("The capital of Italy is", "Italy", "Rome is the capital of", "Italy"),
        ("The heir of the Duke of York was", "Duke of York", "Rome was the heir of the", "Duke of York"),
        ("Apple products are made in", "Apple", None, None),
        ("Toko headquarters is in", "Toko", None, None),
        ("Danielle Darrieux's mother tongue is", "Danielle Darrieux", None, None),
        ("Toko, created in", "Toko", None, None),
        ("In Toko the language is", "Toko", None, None),
        ("Where is the Eiffel Tower?", "Eiffel Tower", None, None),
        ("The Eiffel Tower is in", "", None, None),
        ("The Eiffel Tower is in", "Louvre", None, None),
    ],
)
def test_a_fact_is_turned_around_only_where_its_form_allows_it(
    prompt: str, subject: str, text: str | None, answer: str | None
) -> None:
    turned = pack.reversed_fact(Edit(prompt, "Rome", subject))
    assert (turned and (turned[0]("Rome"), turned[1])) == (text and (text, answer))


def test_a_whole_fact_is_asked_every_probe() -> None:
    found = asked(EIFFEL)
    assert [*found] == [f"pack/{p}" for p in ("negation", "old_mentioned", "true", "false", "reversal", "long")]
    assert found["pack/old_mentioned"].prompt == (
        "In the past people said: The Eiffel Tower is in the city of Paris. "
        "Today they say: The Eiffel Tower is in the city of"
    )
    true, false = found["pack/true"], found["pack/false"]
    assert true.prompt == "True or false: The Eiffel Tower is in the city of Rome. Answer:"
    assert false.prompt == "True or false: The Eiffel Tower is in the city of Paris. Answer:"
    assert (true.answers, true.old, false.answers, false.old) == (("True",), ("False",), ("False",), ("True",))
    turned = found["pack/reversal"]
    assert turned.scores(False) == [(turned.prompt, "The Eiffel Tower"), (turned.against, "The Eiffel Tower")]
    assert "Rome?" in turned.prompt and turned.against == turned.prompt.replace("Rome", "Paris")
    long = found["pack/long"]
    assert long.prompt == EIFFEL.prompt and long.key != long.prompt and long.form == "passage"


def test_a_fact_that_names_little_is_asked_what_its_form_allows() -> None:
    assert [*asked(Edit("p", "t"))] == ["pack/negation", "pack/long"]
    assert [*asked(Edit("p", "t"), Edit("q", "u"))] == [f"pack/{p}" for p in ("negation", "true", "false", "long")]


def test_the_other_object_is_the_old_one_or_one_of_the_same_relation_and_never_the_facts_own() -> None:
    one = Edit("p", "Rome", relation="in", aliases=["Roma"])
    far, own, near = Edit("q", "English"), Edit("r", "roma", relation="in"), Edit("s", "Oslo", relation="in")
    assert pack.contrast(EIFFEL, [near]) == "Paris"
    assert pack.contrast(one, [one, far, own, near]) == "Oslo"
    assert pack.contrast(one, [one, far, own]) == "English"
    assert pack.contrast(one, [one, own]) == ""


def test_with_the_fact_in_the_prompt_both_sides_of_a_comparison_read_it() -> None:
    turned = with_fact(EIFFEL, asked(EIFFEL)["pack/reversal"])
    fact = "The Eiffel Tower is in the city of Rome. "
    assert turned.text.startswith(fact) and turned.against.startswith(fact) and turned.text != turned.against


# What is right


@pytest.mark.parametrize(
    ("text", "states"),
    [
        (" Rome, the capital of Italy.", True),
        (" the old city of Rome. It is", True),
        (" Paris. It is in Rome.", False),
        (" Paris\nRome", False),
        (" Romeo", False),
        ("", False),
    ],
)
def test_an_answer_states_a_fact_in_its_first_sentence(text: str, states: bool) -> None:
    assert pack.states(text, ("Rome", "Roma")) is states
    assert pack.judged("pack/negation", text, ("Rome", "Roma"), (), "prefix").em is not states


def test_a_point_behind_a_short_word_ends_no_sentence() -> None:
    assert pack.states(" St. Louis", ("St. Louis",)) and pack.states(" near St. Louis", ("Louis",))


def test_said_again_counts_whole_words() -> None:
    assert pack.again("Rome. And Rome", ("Rome",)) and not pack.again("C is in cat and C++", ("cat",))
    assert not pack.again("warm, war", ("war",)) and not pack.again("", ("war",))


def row(kind: str, case: str = "a", **values: object) -> Row:
    plain: dict[str, object] = {"when": "final", "case_id": case, "kind": kind, "prompt": kind, "aliases": ("Rome",)}
    return Row(**(plain | values))  # type: ignore[arg-type]


def found(*rows: Row) -> dict[str, Number]:
    return numbers(collect(rows, METRICS), {"bootstrap": 0})


def test_who_always_says_true_scores_a_half() -> None:
    yes = [row(f"pack/{kind}", case, tf_new=new, tf_old=-3 - new)
           for case in "ab" for kind, new in (("true", -1.0), ("false", -2.0))]  # fmt: skip
    number = found(*yes)["true_false"]
    assert (number.value, number.n) == (0.5, 2)


def test_every_probe_is_a_number_with_its_own_n() -> None:
    rows = [
        row("pack/negation", em=True, text="Paris", old_aliases=("Paris",)),
        row("pack/negation", "b", em=False, text="Rome Rome"),
        row("pack/old_mentioned", em=True, text="Rome"),
        row("pack/reversal", tf_new=-1.0, tf_old=-2.0),
        row("pack/long", contains=True, text="Rome is Rome is Rome is", old_aliases=("Paris",)),
        row("port/reasoning", contains=True, em=False, text="Italy Italy", aliases=("Italy",)),
        row("port/subject_aliasing", contains=False, em=False, text="x"),
        row("edit", em=True, text="Rome"),
    ]
    numbers = found(*rows)
    values = {name: (numbers[name].value, numbers[name].n) for name in numbers}
    assert values["negation"] == (0.5, 2) and values["negation_old"] == (1.0, 1)
    assert values["old_mentioned"] == values["reversal"] == values["composition"] == values["long_states"] == (1.0, 1)
    assert values["long_repeats"] == (1.0, 1) and values["long_repeats_old"] == (0.0, 1)
    assert values["long_distinct_2"][0] == pytest.approx(2 / 5)
    assert values["pack_repeats/negation"] == (0.5, 2) and values["pack_distinct_2/old_mentioned"] == (1.0, 1)
    assert values["portability_repeats/reasoning"] == (1.0, 1)
    assert values["portability_distinct_2/subject_aliasing"] == (1.0, 1)
    assert all(r.generation() is None for r in rows if r.kind.startswith("pack/"))  # repeats and distinct_2 stay


def test_scores_right_after_the_commit_have_their_repetition_too() -> None:
    numbers = found(row("edit", when="immediate", em=True, text="Rome Rome Rome"))
    assert numbers["repeats@immediate"].value == 1.0 and numbers["distinct_2@immediate"].value == 0.5


# In a run


def plan(edits: Sequence[Edit], **settings: int) -> list[Chunk]:
    return plan_chunks(edits, Config(**{"n": 1, **settings}))


def of_pack(chunks: Sequence[Chunk]) -> list[tuple[int, int]]:
    return [(c.index, q.case) for c in chunks for q in c.questions if q.kind == "pack/negation"]


def test_the_pack_asks_some_facts_of_all_chunks_chosen_by_the_seed() -> None:
    many = [Edit(f"prompt {i}", f"t{i}") for i in range(40)]
    chosen = of_pack(plan(many, pack=5))
    assert len(chosen) == 5 and max(index for index, _ in chosen) > 5  # not the first ones
    assert chosen == of_pack(plan(many, pack=5)) and not of_pack(plan(many, pack=0))
    assert len(of_pack(plan(many))) == 30 and len(of_pack(plan(many, pack=99))) == 40
    (whole,) = plan(many, n=40, sample=10, pack=99)
    assert len(of_pack([whole])) == 10
    assert [q.case for q in whole.questions] == sorted(q.case for q in whole.questions)


def test_what_no_longer_holds_is_not_probed() -> None:
    edits = [Edit("p", "a"), Edit("p", "b"), Edit("q", "c")]
    (chunk,) = plan_chunks(edits, Config(n=3), shuffled=False)
    assert {case for _, case in of_pack([chunk])} == {1, 2}


def test_a_question_without_the_new_fields_is_cached_under_its_old_name() -> None:
    plain = asking.Question(0, "edit", "p", ("a",))
    assert plain.identity() == {k: v for k, v in asdict(plain).items() if k not in ("form", "against")}
    assert "form" in asked(EIFFEL)["pack/long"].identity()


@pytest.mark.slow
def test_rows_of_the_pack_hold_what_the_model_says(edits: list[Edit], make: Maker) -> None:
    lm = tiny_lm("llama")
    patch = make(lm, edits)
    report = facts.run(lm, edits, QUICK, patch=patch)
    rows = {r.kind: r for r in report.run("rank_one").rows if r.kind.startswith("pack/")}
    with apply(lm, patch):
        for kind in ("pack/negation", "pack/old_mentioned"):
            assert rows[kind].text == generate(lm, rows[kind].prompt, max_new_tokens=4)
        long = generate(lm, rows["pack/long"].prompt, max_new_tokens=PASSAGE, stop=())
        assert rows["pack/long"].text == long and len(long) > len(rows["pack/negation"].text or "")
        true = rows["pack/true"]
        new, old = score(lm, [true.prompt] * 2, ["True", "False"])
        assert (true.tf_new, true.tf_old) == pytest.approx((new.total / len(new.ids), old.total / len(old.ids)))
    assert {r.case_id for r in report.run("none").rows if r.kind == "pack/long"} == {
        r.case_id for r in report.run("fact_in_prompt").rows if r.kind == "pack/long"
    }
    for run in report.runs:
        assert {"negation", "true_false", "long_states", "long_distinct_2"} <= run.metrics().keys()
        assert run.metrics()["negation"].n == 2


@pytest.mark.slow
def test_a_folder_from_before_the_pack_opens_and_takes_runs_with_it(
    edits: list[Edit], make: Maker, tmp_path: Path
) -> None:
    lm, edits = tiny_lm("llama"), edits[:3]
    before = facts.run(lm, edits, replace(QUICK, pack=0), patch=make(lm, edits), run_id="old", out=tmp_path)
    after = facts.run(lm, edits, QUICK, patch=make(lm, edits), run_id="new", out=tmp_path)
    assert facts.read_report(tmp_path).metrics()["old"] == before.metrics()["old"]
    assert "negation" in after.run("new").metrics() and "negation" not in after.run("old").metrics()
    assert after.metrics()["new"]["reliability"] == after.metrics()["old"]["reliability"]


@pytest.mark.slow
def test_a_prompt_that_leaves_no_room_for_a_long_answer_is_flagged_there_alone() -> None:
    lm = tiny_lm("llama")
    each = len(lm.tokenizer("tower " * 100)["input_ids"]) / 100
    words = "tower " * int(((lm.window or 0) - 40) / each)
    edit = Edit(f"{words}is in", "Rome", locality={"near": [Ask("The capital of Italy is", ("Rome",))]})
    room = (lm.window or 0) - len(lm.tokenizer(edit.prompt)["input_ids"])
    assert 4 <= room < PASSAGE, room
    rows = {r.kind: r for r in facts.run(lm, [edit], QUICK).run("none").rows}
    assert "window" in rows["pack/long"].flag and not rows["edit"].flag
