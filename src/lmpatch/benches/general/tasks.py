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
from typing import Any, Literal

from ...data import lines
from ...errors import BadRecord
from ...provenance import hash_json

Record = Mapping[str, Any]
Form = Literal["letters", "cloze", "answer", "text"]
LETTERS, CLOZE, TEXT = "recipe-general-v1", "cloze-v1", "perplexity-v1"

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


Read = Callable[[Record], list[Sample]]


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
    for name, (patterns, make) in TASKS.items():
        parts = [_matching(there, pattern) for pattern in patterns]
        if missing := [pattern for pattern, found in zip(patterns, parts, strict=True) if not found]:
            skipped[name] = f"no file {' and '.join(missing)}"
            continue
        paths = [path for part in parts for path in part]
        found = [sample for path in paths for sample in _samples(name, make, path)]
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


def _samples(task: str, make: Read, path: Path) -> list[Sample]:
    if make is _window:
        text = "\n".join(lines.read_text(path))
        words = list(re.finditer(r"\S+", text))
        ends = zip(words[::WINDOW], words[WINDOW - 1 :: WINDOW], strict=False)  # a last shorter window is left out
        windows: list[Record] = [{"text": text[first.start() : last.end()]} for first, last in ends]
        made = [(f" window {i}", window, make(window)) for i, window in enumerate(windows, 1)]
    else:
        found = lines.read_records(path, lambda record, _: (record, make(record)))
        made = [(f":{line}", *pair) for line, pair in found]
    return [
        replace(sample, task=task, id=hash_json(record)[:16], source=path.name + place)
        for place, record, asked in made
        for sample in asked
    ]


# How a record is asked


def _letters(question: str, options: Sequence[str], gold: int, ask: str = SELECT, gap: str = "\n") -> Sample:
    marks = MARKS[: len(options)]
    listed = "\n".join(f"({mark}) {option}" for mark, option in zip(marks, options, strict=True))
    return Sample(LETTERS, "letters", (f"{ask}{question}{gap}{listed}{gap}Answer: (",), marks, gold)


def _cloze(prompt: str, options: Sequence[str], gold: int) -> Sample:
    return Sample(CLOZE, "cloze", (prompt,) * len(options), tuple(option.strip() for option in options), gold)


def _question(question: str, options: Sequence[str], gold: int) -> list[Sample]:
    return [_letters(question, options, gold), _cloze(f"Question: {question}\nAnswer:", options, gold)]


def _keyed(question: str) -> Read:
    """CommonsenseQA, ARC and OpenBookQA: options with labels."""
    return lambda record: _question(_text(record, question), *_choices(record))


def _listed(question: str, options: Sequence[str], answer: str) -> Read:
    """MMLU and PIQA: a field for each option, whose place is the answer."""
    places = [str(i) for i in range(len(options))]
    return lambda record: _question(
        _text(record, question), [_text(record, option) for option in options], _index(record, answer, places)
    )


def _hellaswag(record: Record) -> list[Sample]:
    begin, endings = _text(record, "ctx"), _texts(record.get("endings"), "endings")
    gold = _index(record, "label", [str(i) for i in range(len(endings))])
    return [_letters(begin, endings, gold, FOLLOWS, "\n\n"), _cloze(begin, endings, gold)]


def _winogrande(record: Record) -> list[Sample]:
    """Cloze: each name goes into the blank, and what follows it is scored (Trinh and Le 2018, arXiv:1806.02847)."""
    sentence, options = _text(record, "sentence"), [_text(record, "option1"), _text(record, "option2")]
    gold = _index(record, "answer", ("1", "2"))
    before, blank, after = sentence.partition("_")
    if not blank or not after.strip():
        raise BadRecord(f"sentence must have a blank _ with text behind it, found {sentence!r}")
    prompts = tuple(before + option for option in options)
    return [_letters(sentence, options, gold), Sample(CLOZE, "cloze", prompts, (after,) * 2, gold)]


def _boolq(record: Record) -> list[Sample]:
    question = f"{_text(record, 'passage')}\nQuestion: {_text(record, 'question').rstrip('?')}?"
    options, gold = ("yes", "no"), _index(record, "answer", ("True", "False"))
    return [_letters(question, options, gold), _cloze(f"{question}\nAnswer:", options, gold)]


def _anli(record: Record) -> list[Sample]:
    """Letters: RECIPE compares the first tokens of the three words themselves, so they are the marks."""
    premise, claim = _text(record, "context"), _text(record, "hypothesis")
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
        f"{FIND}\nTitle: {_text(record, 'title')}\nContext: {_text(record, 'context')}\n"
        f"Question: {_text(record, 'question')}\nAnswer:"
    )
    return [Sample(LETTERS, "answer", (prompt,), (_text(answers[0], "text"),))]


def _window(record: Record) -> list[Sample]:
    """Plain text, window by window: the first word is given, the others are scored."""
    first, rest = re.split(r"(?=\s)", _text(record, "text"), maxsplit=1)
    return [Sample(TEXT, "text", (first,), (rest,))]


CHOICES = [f"choice{i}" for i in range(4)]
TASKS: dict[str, tuple[tuple[str, ...], Read]] = {
    "csqa": (("commonsense_qa*val*.json*",), _keyed("question")),
    "anli": (("anli_r1_dev*.json*", "anli_r2_dev*.json*", "anli_r3_dev*.json*"), _anli),
    "mmlu": (("mmlu/test*.json*|mmlu*test*.json*",), _listed("question", CHOICES, "answer")),
    "squad": (("squad*dev*.json*",), _squad),
    "arc_easy": (("arc_easy*val*.json*",), _keyed("question")),
    "arc_challenge": (("arc_challenge*val*.json*",), _keyed("question")),
    "hellaswag": (("hellaswag*val*.json*",), _hellaswag),
    "piqa": (("piqa*val*.json*",), _listed("goal", ["sol1", "sol2"], "label")),
    "winogrande": (("winogrande*val*.json*",), _winogrande),
    "boolq": (("boolq*val*.json*",), _boolq),
    "openbookqa": (("openbookqa*val*.json*",), _keyed("question_stem")),
    "perplexity": (("wikitext*/*test*.txt*|wikitext*test*.txt*|*.txt*",), _window),
}
"""Task → a pattern for each file it needs, in small letters (behind ``|`` what else will do), and its reader."""


# Fields


def _text(record: Record, key: str) -> str:
    if not (value := lines.text_of(record, key)).strip():
        raise BadRecord(f"{key} must be a text, found {value!r}")
    return value


def _texts(value: Any, key: str) -> list[str]:
    if not isinstance(value, list) or not 2 <= len(value) <= len(MARKS):
        raise BadRecord(f"{key} must be a list of 2 to {len(MARKS)} texts, found {value!r}")
    return [_text({key: each}, key) for each in value]


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
