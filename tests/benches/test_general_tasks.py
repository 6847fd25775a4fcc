"""How records of public tasks become questions: files found or missed, wording, gold answers."""

from __future__ import annotations

import json
from pathlib import Path

import general_files
import pytest
from general_files import RECORDS, put, write

from lmpatch.benches import general
from lmpatch.benches.general.tasks import CLOZE, LETTERS, TASKS, TEXT, Sample, choose
from lmpatch.errors import BadInput, BadRecord


def one(folder: Path, task: str, protocol: str) -> Sample:
    """The first record's sample."""
    return next(s for s in general.load(folder).samples if s.task == task and s.protocol == protocol)


def test_every_task_is_found_in_the_folder(tmp_path: Path) -> None:
    data = general.load(write(tmp_path))
    assert set(data.files) == set(TASKS) and not data.skipped
    assert {s.task for s in data.samples} == set(TASKS)
    assert data.files["anli"] == [f"general/anli_R{i}_dev.jsonl.gz" for i in (1, 2, 3)]


def test_every_task_but_squad_and_text_is_asked_both_ways_about_the_same_records(tmp_path: Path) -> None:
    samples = general.load(write(tmp_path)).samples
    ids = {
        (s.task, s.protocol): [t.id for t in samples if (t.task, t.protocol) == (s.task, s.protocol)] for s in samples
    }
    for task in TASKS:
        if task == "perplexity":
            assert len(ids[task, TEXT]) == 3
        elif task == "squad":
            assert len(ids[task, LETTERS]) == 3 and (task, CLOZE) not in ids  # the unanswerable one is not asked
        else:
            assert ids[task, LETTERS] == ids[task, CLOZE] and len(ids[task, CLOZE]) in (3, 9)


def test_a_missing_file_skips_its_task_and_says_so(tmp_path: Path) -> None:
    data = general.load(write(tmp_path, "commonsense", "anli_R1", "anli_R3"))
    assert set(data.files) == {"csqa"}
    assert data.skipped["anli"] == "no file anli_r2_dev*.json*"
    assert set(data.skipped) == set(TASKS) - {"csqa"}


def test_a_folder_that_is_the_task_itself_will_do(tmp_path: Path) -> None:
    write(tmp_path, "mmlu")
    assert set(general.load(tmp_path / "mmlu").files) == {"mmlu"}


def test_the_names_of_folders_above_say_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "squad and mmlu, test and dev", "openbookqa")
    assert set(general.load(folder).files) == {"openbookqa"}


def test_any_text_file_will_do_for_perplexity(tmp_path: Path) -> None:
    put(tmp_path / "novel.txt", "word " * 600)
    assert general.load(tmp_path).files == {"perplexity": ["novel.txt"]}


def test_letters_stand_in_the_prompt_as_in_the_evaluation_of_recipe(tmp_path: Path) -> None:
    sample = one(write(tmp_path), "csqa", LETTERS)
    assert sample.prompts == (
        "Please select the correct answer for the following questions:\nWhat is the capital of Italy?\n"
        "(A) Rome\n(B) Paris\n(C) Tokyo\n(D) an Apple\n(E) French\nAnswer: (",
    )
    assert sample.options == tuple("ABCDE") and sample.gold == 0
    assert one(tmp_path, "hellaswag", LETTERS).prompts[0].endswith("(D) is the capital.\n\nAnswer: (")
    relation = one(tmp_path, "anli", LETTERS)
    assert relation.prompts[0].endswith("is entailment, neutral, or contradiction:")
    assert relation.options == (" entailment", " neutral", " contradiction")


def test_the_answer_of_squad_stands_behind_context_and_question(tmp_path: Path) -> None:
    sample = one(write(tmp_path), "squad", LETTERS)
    assert sample.form == "answer" and sample.options == ("in Rome",)
    assert sample.prompts[0].endswith(
        "\nTitle: Tower\nContext: The tower is in Rome.\nQuestion: Where is it 0?\nAnswer:"
    )


def test_a_cloze_scores_the_whole_option_behind_the_question(tmp_path: Path) -> None:
    write(tmp_path)
    sample = one(tmp_path, "csqa", CLOZE)
    assert sample.prompts == ("Question: What is the capital of Italy?\nAnswer:",) * 5
    assert sample.options[3] == "an Apple"
    blank = one(tmp_path, "winogrande", CLOZE)
    assert blank.prompts == ("Steve 0 met Danielle because Steve", "Steve 0 met Danielle because Danielle")
    assert blank.options == (" speaks French.",) * 2
    assert one(tmp_path, "piqa", CLOZE).options == ("go to Rome", "speak French")
    assert one(tmp_path, "boolq", CLOZE).options[one(tmp_path, "boolq", CLOZE).gold] == "no"


def test_every_task_knows_its_right_answer(tmp_path: Path) -> None:
    write(tmp_path)
    gold = {
        task: [s.gold for s in general.load(tmp_path).samples if s.task == task and s.protocol == CLOZE]
        for task in TASKS
    }
    assert gold["csqa"] == [0, 1, 2] and gold["anli"] == [0, 1, 2] * 3 and gold["mmlu"] == [0, 1, 2]
    assert gold["arc_easy"] == [0, 2, 1]  # "3" of 1234 and "B" of ABC
    assert gold["hellaswag"] == [0, 1, 2] and gold["piqa"] == gold["winogrande"] == [0, 1, 0]
    assert gold["boolq"] == [1, 0, 1] and gold["openbookqa"] == [1, 1, 1]


def test_text_is_cut_into_windows_of_256_words_that_stay_as_they_were(tmp_path: Path) -> None:
    put(tmp_path / "x.txt", "".join(f"w{i}{'  ' if i % 3 else ' , '}" for i in range(700)))
    samples = general.load(tmp_path).samples
    assert [len((s.prompts[0] + s.options[0]).split()) for s in samples] == [256] * 3  # 933 words: the rest is left out
    assert samples[0].prompts == ("w0",) and samples[0].options[0].startswith(" , w1  w2  w3 , ")


def test_a_text_too_short_for_a_window_is_skipped_with_a_reason(tmp_path: Path) -> None:
    write(tmp_path, "mmlu")
    put(tmp_path / "x.txt", "too short")
    assert general.load(tmp_path).skipped["perplexity"] == "x.txt: nothing in it can be asked"


def test_a_record_that_occurs_twice_is_asked_once(tmp_path: Path) -> None:
    line = json.dumps(RECORDS["mmlu/test_7000.jsonl.gz"][0]) + "\n"
    put(tmp_path / "mmlu_test.jsonl", line * 2)
    assert len(general.load(tmp_path).samples) == 2  # one for each protocol


def test_a_sample_says_where_its_record_stands(tmp_path: Path) -> None:
    write(tmp_path, "mmlu", "wikitext")
    sources = [s.source for s in general.load(tmp_path).samples if s.protocol in (CLOZE, TEXT)]
    assert sources[:2] == ["test_7000.jsonl.gz:1", "test_7000.jsonl.gz:2"]
    assert sources[-1] == "raw_test.txt.gz window 3"


def test_the_chosen_records_depend_on_the_seed_and_not_on_their_order(tmp_path: Path) -> None:
    samples = general.load(write(tmp_path, "anli")).samples

    def ids(samples: tuple[Sample, ...], seed: int) -> list[str]:
        return [s.id for s in choose(samples, lambda _: 4, seed) if s.protocol == CLOZE]

    assert ids(samples, 0) == ids(samples[::-1], 0) != ids(samples, 1)
    assert ids(samples, 0) == [s.id for s in choose(samples, lambda _: 4, 0) if s.protocol == LETTERS]
    assert ids(samples, 0) == [s.id for s in choose(samples, lambda _: 9, 0) if s.protocol == CLOZE][:4]
    limited = general.load(tmp_path, limit=4).samples
    assert ids(limited, 0) == ids(samples, 0) and len(limited) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answerKey": "Z"}, "answerKey must be one of A, B, C, D, E, found 'Z'"),
        ({"question": None}, "question is missing"),
        ({"choices": {"text": ["a", ""], "label": ["A", "B"]}}, "choices.text must be a text, found ''"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}}, "2 texts and 3 labels"),
        ({"choices": ["a"]}, "choices must be an object"),
    ],
)
def test_a_bad_record_is_named_with_its_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    record = RECORDS["general/commonsense_qa_val.jsonl.gz"][0]
    lines = [json.dumps(record), json.dumps(record | change)]
    put(tmp_path / "commonsense_qa_val.jsonl", "\n".join(lines))
    with pytest.raises(BadRecord, match=rf"line 2: .*{message}"):
        general.load(tmp_path)


def test_what_is_no_folder_of_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no folder"):
        general.load(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="holds no file that a task reads"):
        general.load(tmp_path)
    with pytest.raises(BadInput, match="limit is 0"):
        general.load(write(tmp_path), limit=0)


def test_the_made_up_files_cover_every_task() -> None:
    assert len(RECORDS) + 1 == sum(len(task[0]) for task in TASKS.values())
    assert general_files.TEXT
