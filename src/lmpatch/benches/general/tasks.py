"""The tasks of the general bench: which files they are read from, and how a record is put to a model.

Under ``recipe-general-v1`` the options stand in the prompt, in the words of the evaluation released with RECIPE
(arXiv:2405.03279). Under ``cloze-v1`` the model reads the question and each option's text is scored behind it, with
the prompts common for base models (Brown et al. 2020, arXiv:2005.14165, and the LM Evaluation Harness).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ...data.lines import read_records, read_text
from ...errors import BadRecord
from ...provenance import hash_json
from .rows import CLOZE, LETTERS, TEXT, Form

Record = Mapping[str, Any]

MARKS = tuple("ABCDEFGHIJ")
SELECT = "Please select the correct answer for the following questions:\n"
FOLLOWS = (
    "Please select the most likely subsequent scenario in the real world based on the following context description: "
    "\n\n"
)
RELATION = (
    "Please determine whether the logical relationship between the hypothesis and the premise is entailment, neutral, "
    "or contradiction:"
)
FIND = "Please read the context and find the answer to the question. If there is no answer, reply N/A."
WINDOW = 256  # words of a window of held-out text


@dataclass(frozen=True)
class Sample:
    """One record under one protocol."""

    protocol: str
    form: Form
    """``letters``: which option's mark does the model choose; ``cloze``: which option's text is likeliest; ``answer``,
    ``text``: how likely is it."""
    prompts: tuple[str, ...]
    """One, or one per option."""
    options: tuple[str, ...]
    """What is scored behind the prompts."""
    gold: int = 0
    task: str = ""
    id: str = ""
    source: str = ""


@dataclass(frozen=True)
class Task:
    """Where a task's records are and how they are read."""

    files: tuple[str, ...]
    """One pattern for each file it needs, in small letters; behind ``|`` stands what else will do."""
    read: Callable[[Record], list[Sample]]
    plain: bool = False
    """The files are plain text; its windows are the records."""


@dataclass(frozen=True)
class Data:
    """What was found in a folder."""

    samples: tuple[Sample, ...]
    skipped: dict[str, str]
    """Task → why it cannot be asked."""
    files: dict[str, list[str]]
    """Task → what it was read from, relative to the folder."""


def read(folder: Path) -> Data:
    """Every task whose files are there. A record that occurs twice is taken once."""
    samples: list[Sample] = []
    skipped: dict[str, str] = {}
    files: dict[str, list[str]] = {}
    there = sorted(path for path in folder.resolve().rglob("*") if path.is_file())
    for name, task in TASKS.items():
        parts = [_matching(there, pattern) for pattern in task.files]
        if missing := [pattern for pattern, found in zip(task.files, parts, strict=True) if not found]:
            skipped[name] = f"no file {' and '.join(missing)}"
            continue
        paths = [path for part in parts for path in part]
        found = [replace(sample, task=name) for path in paths for sample in _samples(task, path)]
        if not found:
            skipped[name] = f"{', '.join(path.name for path in paths)}: nothing in it can be asked"
        samples += {(sample.protocol, sample.id): sample for sample in found}.values()
        files[name] = [path.relative_to(folder.resolve()).as_posix() for path in paths]
    return Data(tuple(samples), skipped, files)


def choose(samples: Iterable[Sample], count: Callable[[Sample], int], seed: int) -> list[Sample]:
    """The same records of every task, whatever their order in the file: those whose seeded hashes come first.

    Args:
        count: how many records of a sample's task to take.
    """
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.protocol, sample.task), []).append(sample)
    ordered = (sorted(group, key=lambda s: hash_json([seed, s.id])) for group in groups.values())
    return [sample for group in ordered for sample in group[: count(group[0])]]


def _matching(paths: Sequence[Path], pattern: str) -> list[Path]:
    """Files of the first alternative that has any; one with a slash speaks of the file's folder too."""
    for each in pattern.split("|"):
        found = [p for p in paths if fnmatch("/".join(p.parts[-1 - each.count("/") :]).lower(), each)]
        if found:
            return found
    return []


def _samples(task: Task, path: Path) -> list[Sample]:
    if task.plain:
        windows = enumerate(_windows("\n".join(read_text(path))), 1)
        return [_named(sample, r, f"{path.name} window {i}") for i, r in windows for sample in task.read(r)]
    made = read_records(path, lambda record, _: (record, task.read(record)))
    return [_named(sample, r, f"{path.name}:{line}") for line, (r, asked) in made for sample in asked]


def _named(sample: Sample, record: Record, source: str) -> Sample:
    return replace(sample, id=hash_json(record)[:16], source=source)


# How a record is asked


def _letters(question: str, options: Sequence[str], gold: int, ask: str = SELECT, gap: str = "\n") -> Sample:
    marks = MARKS[: len(options)]
    listed = "\n".join(f"({mark}) {option}" for mark, option in zip(marks, options, strict=True))
    return Sample(LETTERS, "letters", (f"{ask}{question}{gap}{listed}{gap}Answer: (",), marks, gold)


def _cloze(prompt: str, options: Sequence[str], gold: int) -> Sample:
    return Sample(CLOZE, "cloze", (prompt,) * len(options), tuple(option.strip() for option in options), gold)


def _question(question: str, options: Sequence[str], gold: int) -> list[Sample]:
    return [_letters(question, options, gold), _cloze(f"Question: {question}\nAnswer:", options, gold)]


def _keyed(record: Record) -> list[Sample]:
    """CommonsenseQA and ARC."""
    return _question(text_of(record, "question"), *_choices(record))


def _openbook(record: Record) -> list[Sample]:
    stem, (options, gold) = text_of(record, "question_stem"), _choices(record)
    return [_letters(stem, options, gold), _cloze(stem, options, gold)]


def _mmlu(record: Record) -> list[Sample]:
    options = [text_of(record, f"choice{i}") for i in range(4)]
    return _question(text_of(record, "question"), options, _index(record, "answer", ("0", "1", "2", "3")))


def _piqa(record: Record) -> list[Sample]:
    options = [text_of(record, "sol1"), text_of(record, "sol2")]
    return _question(text_of(record, "goal"), options, _index(record, "label", ("0", "1")))


def _hellaswag(record: Record) -> list[Sample]:
    begin, endings = text_of(record, "ctx"), _texts(record.get("endings"), "endings")
    gold = _index(record, "label", [str(i) for i in range(len(endings))])
    return [_letters(begin, endings, gold, FOLLOWS, "\n\n"), _cloze(begin, endings, gold)]


def _winogrande(record: Record) -> list[Sample]:
    """Cloze: each name goes into the blank, and what follows it is scored (Trinh and Le 2018, arXiv:1806.02847)."""
    sentence, options = text_of(record, "sentence"), [text_of(record, "option1"), text_of(record, "option2")]
    gold = _index(record, "answer", ("1", "2"))
    before, blank, after = sentence.partition("_")
    if not blank or not after.strip():
        raise BadRecord(f"sentence must have a blank _ with text behind it, found {sentence!r}")
    prompts = tuple(before + option for option in options)
    return [_letters(sentence, options, gold), Sample(CLOZE, "cloze", prompts, (after,) * 2, gold)]


def _boolq(record: Record) -> list[Sample]:
    question = f"{text_of(record, 'passage')}\nQuestion: {text_of(record, 'question').rstrip('?')}?"
    gold = _index(record, "answer", ("True", "False"))
    return [_letters(question, ("yes", "no"), gold), _cloze(f"{question}\nAnswer:", ("yes", "no"), gold)]


def _anli(record: Record) -> list[Sample]:
    """Letters: RECIPE compares the first tokens of the three words themselves, so they are the marks."""
    premise, claim = text_of(record, "context"), text_of(record, "hypothesis")
    gold = _index(record, "label", ("e", "n", "c"))
    asked = f"premise: {premise}\nhypothesis: {claim}\n{RELATION}"
    marks = (" entailment", " neutral", " contradiction")
    return [
        Sample(LETTERS, "letters", (asked,), marks, gold),
        _cloze(f"{premise}\nQuestion: {claim} True, False, or Neither?\nAnswer:", ("True", "Neither", "False"), gold),
    ]


def _squad(record: Record) -> list[Sample]:
    """Answerable questions; the first answer is the gold one."""
    answers = record.get("answers")
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise BadRecord("answers must be a list of objects with text")
    if not answers:
        return []
    prompt = (
        f"{FIND}\nTitle: {text_of(record, 'title')}\nContext: {text_of(record, 'context')}\n"
        f"Question: {text_of(record, 'question')}\nAnswer:"
    )
    return [Sample(LETTERS, "answer", (prompt,), (text_of(answers[0], "text"),))]


def _windows(text: str) -> list[Record]:
    """Windows of 256 words, as they stand; a last shorter one is left out."""
    words = [(found.start(), found.end()) for found in re.finditer(r"\S+", text)]
    starts = range(0, len(words) - WINDOW + 1, WINDOW)
    return [{"text": text[words[i][0] : words[i + WINDOW - 1][1]]} for i in starts]


def _window(record: Record) -> list[Sample]:
    """The first word is given, the others are scored."""
    first, rest = re.split(r"(?=\s)", text_of(record, "text"), maxsplit=1)
    return [Sample(TEXT, "text", (first,), (rest,))]


TASKS: dict[str, Task] = {
    "csqa": Task(("commonsense_qa*val*.json*",), _keyed),
    "anli": Task(("anli_r1_dev*.json*", "anli_r2_dev*.json*", "anli_r3_dev*.json*"), _anli),
    "mmlu": Task(("mmlu/test*.json*|mmlu*test*.json*",), _mmlu),
    "squad": Task(("squad*dev*.json*",), _squad),
    "arc_easy": Task(("arc_easy*val*.json*",), _keyed),
    "arc_challenge": Task(("arc_challenge*val*.json*",), _keyed),
    "hellaswag": Task(("hellaswag*val*.json*",), _hellaswag),
    "piqa": Task(("piqa*val*.json*",), _piqa),
    "winogrande": Task(("winogrande*val*.json*",), _winogrande),
    "boolq": Task(("boolq*val*.json*",), _boolq),
    "openbookqa": Task(("openbookqa*val*.json*",), _openbook),
    "perplexity": Task(("wikitext*/*test*.txt*|wikitext*test*.txt*|*.txt*",), _window, plain=True),
}


# Fields


def text_of(record: Record, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f"{key} is missing" if value is None else f"{key} must be a text, found {value!r}")
    return value


def _texts(value: Any, key: str) -> list[str]:
    if not isinstance(value, list) or not 2 <= len(value) <= len(MARKS):
        raise BadRecord(f"{key} must be a list of 2 to {len(MARKS)} texts, found {value!r}")
    return [text_of({key: each}, key) for each in value]


def _choices(record: Record) -> tuple[list[str], int]:
    choices = record.get("choices")
    if not isinstance(choices, dict):
        raise BadRecord(f"choices must be an object with text and label, found {choices!r}")
    options, labels = (_texts(choices.get(key), f"choices.{key}") for key in ("text", "label"))
    if len(options) != len(labels):
        raise BadRecord(f"choices has {len(options)} texts and {len(labels)} labels")
    return options, _index(record, "answerKey", labels)


def _index(record: Record, key: str, allowed: Sequence[str]) -> int:
    """Where the record's answer stands among what it may be; numbers and truth values count as their text."""
    value = str(record.get(key))
    if value not in allowed:
        raise BadRecord(f"{key} must be one of {', '.join(allowed)}, found {record.get(key)!r}")
    return list(allowed).index(value)
