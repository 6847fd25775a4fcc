"""Readers: files of facts, of questions and of plain text become records.

A file of facts is JSON lines (``.jsonl``, ``.jsonl.gz``) or one JSON list (``.json``, ``.json.gz``). Its shape is
told from the keys of its first record:

``lmpatch``      the keys of ``Edit``; ``prompt`` and ``target`` are required::

    {"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "target": "Rome", "old": "Paris",
     "rephrases": ["You find the Eiffel Tower in"],
     "locality": {"same_relation": [{"prompt": "The Louvre is in", "answers": ["Paris"]}]},
     "portability": {"reasoning": [{"prompt": "The Eiffel Tower is in the country of", "answers": "Italy"}]}}

``counterfact``  flat CounterFact: ``target_new``, ``rephrase_prompt``, ``locality_prompt``, ...
``rome``         CounterFact as ROME published it: ``requested_rewrite``, ``neighborhood_prompts``, ...
``knowedit``     KnowEdit's ZsRE, wiki_counterfact and wiki_recent: ``target_new`` with ``locality``, ``portability``
"""

from __future__ import annotations

import difflib
import gzip
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BadInput, BadRecord
from .edit import Ask, Edit, check_contradictions

T = TypeVar("T")
Record = Mapping[str, Any]

LISTED = 10  # bad lines named in one message
KINDS = {"Relation_Specificity": "same_subject", "Forgetfulness": "other_objects"}
"""KnowEdit's locality names → ours: another relation of the subject; other objects of a one-to-many relation."""


def read_edits(
    path: str | Path,
    *,
    limit: int | None = None,
    seed: int | None = None,
    format: str | None = None,
    check: bool = False,
) -> list[Edit]:
    """Read a file of facts. Prompts of one group that occur twice are joined: any of their answers counts.

    Args:
        limit: at most this many edits, the first ones.
        seed: shuffle the file with this seed before ``limit`` cuts it; None keeps the order.
        format: ``lmpatch``, ``counterfact``, ``rome`` or ``knowedit``; None tells it from the first record.
        check: refuse facts that contradict each other.
    Raises:
        BadInput: no such file, an empty one, or an unknown shape.
        BadRecord: lines that cannot be read; names the file and the first ten of them.
        Contradiction: ``check`` is set and one prompt has two targets; names both lines.
    """
    path = Path(path)
    if format is not None and format not in SHAPES:
        raise BadInput(f"no format is called {format!r}. There are: {', '.join(SHAPES)}.")
    chosen: list[str] = [format] if format else []

    def make(record: Record, place: int) -> Edit:
        if not chosen:
            chosen.append(_shape(record))
        return SHAPES[chosen[0]](record, str(place))

    numbered = read_records(path, make)
    if check:
        check_contradictions([edit for _, edit in numbered], [f"line {number}" for number, _ in numbered])
    return cut([edit for _, edit in numbered], limit, seed)


def read_asks(path: str | Path, *, limit: int | None = None, seed: int | None = None) -> list[Ask]:
    """Read questions with answers (``question`` or ``prompt``, ``answers`` or ``answer``), as in NQ or PopQA.

    Raises:
        BadInput, BadRecord: as ``read_edits``.
    """

    def make(record: Record, _: int) -> Ask:
        return _ask(record.get("prompt", record.get("question")), record.get("answers", record.get("answer")))

    return cut([ask for _, ask in read_records(Path(path), make)], limit, seed)


def read_text(path: str | Path, *, limit: int | None = None) -> list[str]:
    """Read plain text: the ``text`` of each JSON line, or the paragraphs of a ``.txt`` or ``.txt.gz`` file.

    Args:
        limit: at most this many texts, the first ones.
    Returns:
        texts without surrounding white space, empty ones left out.
    Raises:
        BadInput: no such file, or no text in it.
        BadRecord: a JSON line without ``text``.
    """
    path = Path(path)
    if _suffix(path) in (".jsonl", ".json"):
        texts = [text for _, text in read_records(path, lambda record, _: text_of(record, "text"))]
    else:
        texts = re.split(r"\n[ \t]*\n", "".join(line for _, line in _lines(path)))
    found = [stripped for text in texts if (stripped := text.strip())]
    if not found:
        raise BadInput(f"{path} holds no text.")
    return found[:limit]


def cut(records: list[T], limit: int | None, seed: int | None) -> list[T]:
    if limit is not None and limit < 1:
        raise BadInput(f"limit is {limit}; give 1 or more.")
    if seed is not None:
        random.Random(seed).shuffle(records)
    return records[:limit]


# Files


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line."""
    if not path.is_file():
        raise BadInput(f"there is no file {path}. Give the path of a data file.")
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield from enumerate(file, 1)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}. It must be UTF-8 text, gzipped if it ends in .gz.") from error


def read_records(path: Path, make: Callable[[Record, int], T]) -> list[tuple[int, T]]:
    """(line number, record) of every record; all bad lines are gathered into one ``BadRecord``."""
    made: list[tuple[int, T]] = []
    bad: list[str] = []
    for number, record in _records(path):
        try:
            if isinstance(record, BadRecord):
                raise record
            if not isinstance(record, dict):
                raise BadRecord(f"a record must be an object, found {type(record).__name__}")
            made.append((number, make(record, len(made))))
        except BadInput as error:
            bad.append(f"line {number}: {error}")
    if bad:
        more = f"\n  ... and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        count = f"{len(bad)} bad line{'s' if len(bad) > 1 else ''}"
        raise BadRecord(f"{path} has {count}:\n  " + "\n  ".join(bad[:LISTED]) + more)
    if not made:
        raise BadInput(f"{path} holds no records. Write one JSON object a line.")
    return made


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, parsed value, or a ``BadRecord`` that says why not); in a ``.json`` list the number counts records."""
    if _suffix(path) == ".json":
        items = _parsed("".join(line for _, line in _lines(path)))
        yield from enumerate(items if isinstance(items, list) else [items], 1)
        return
    for number, line in _lines(path):
        if line.strip():
            yield number, _parsed(line)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return BadRecord(f"no valid JSON ({error.msg}, character {error.pos + 1})")


# Shapes


def _shape(record: Record) -> str:
    if "requested_rewrite" in record:
        return "rome"
    if "target_new" in record:
        return "counterfact" if "locality_prompt" in record else "knowedit"
    if "prompt" in record or "target" in record:
        return "lmpatch"
    raise BadRecord(
        f"unknown shape with keys {', '.join(record) or 'none'}. An edit needs at least prompt and target; "
        f"the formats read are {', '.join(SHAPES)}."
    )


def _own(record: Record, place: str) -> Edit:
    only(record, [field.name for field in fields(Edit)])
    return Edit(
        text_of(record, "prompt"),
        text_of(record, "target"),
        subject=text_of(record, "subject", ""),
        old=_answers(record.get("old")),
        aliases=_answers(record.get("aliases")),
        rephrases=_answers(record.get("rephrases")),
        locality=_groups(record, "locality", "answers"),
        portability=_groups(record, "portability", "answers"),
        id=str(record.get("id", place)),
        relation=text_of(record, "relation", ""),
    )


def _counterfact(record: Record, place: str) -> Edit:
    near = _ask(text_of(record, "locality_prompt"), record.get("locality_ground_truth"))
    return Edit(
        text_of(record, "prompt"),
        text_of(record, "target_new"),
        subject=text_of(record, "subject"),
        old=_answers(record.get("ground_truth")),
        rephrases=_answers(record.get("rephrase_prompt")),
        locality={"same_relation": [near]},
        id=str(record.get("case_id", place)),
    )


def _rome(record: Record, place: str) -> Edit:
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, dict) or not isinstance(rewrite.get("target_new"), dict):
        raise BadRecord("requested_rewrite must be an object whose target_new is an object")
    subject, old = text_of(rewrite, "subject"), _answers(text_of(rewrite.get("target_true") or {}, "str", "") or None)
    near = [_ask(prompt, old) for prompt in _answers(record.get("neighborhood_prompts"))]
    return Edit(
        text_of(rewrite, "prompt").replace("{}", subject),
        text_of(rewrite["target_new"], "str"),
        subject=subject,
        old=old,
        rephrases=_answers(record.get("paraphrase_prompts")),
        locality={"same_relation": _joined(near)},
        id=str(record.get("case_id", place)),
        relation=text_of(rewrite, "relation_id", ""),
    )


def _knowedit(record: Record, place: str) -> Edit:
    return Edit(
        text_of(record, "prompt"),
        text_of(record, "target_new"),
        subject=text_of(record, "subject"),
        old=_answers(record.get("ground_truth")),
        rephrases=_answers(record.get("rephrase", record.get("rephrase_prompt"))),
        locality=_groups(record, "locality", "ground_truth"),
        portability=_groups(record, "portability", "ground_truth"),
        id=place,
    )


SHAPES: dict[str, Callable[[Record, str], Edit]] = {
    "lmpatch": _own,
    "counterfact": _counterfact,
    "rome": _rome,
    "knowedit": _knowedit,
}


# Fields


def only(record: Record, known: Sequence[str]) -> None:
    """Raise ``BadRecord`` at a key that is not known."""
    for key in record:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(known)}."
            raise BadRecord(f"unknown key {key!r}. {hint}")


def text_of(record: Record, key: str, default: str | None = None) -> str:
    value = record.get(key, default)
    if not isinstance(value, str):
        raise BadRecord(f"{key} is missing" if value is None else f"{key} must be a text, found {value!r}")
    return value


def _answers(value: Any) -> tuple[str, ...]:
    """One text, a list of texts, or lists of aliases inside a list: all of them, in order, each once."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,) if value.strip() else ()
    if not isinstance(value, list | tuple):
        raise BadRecord(f"answers must be a text or a list of texts, found {value!r}")
    return tuple(dict.fromkeys(answer for item in value for answer in _answers(item)))


def _ask(prompt: Any, answers: Any) -> Ask:
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRecord(f"a question needs a prompt, found {prompt!r}")
    return Ask(prompt.rstrip(), _answers(answers))


def _joined(asks: Iterable[Ask]) -> list[Ask]:
    """Asks of the same prompt become one that any of their answers satisfies."""
    found: dict[str, list[str]] = {}
    for ask in asks:
        found.setdefault(ask.prompt, []).extend(ask.answers)
    return [Ask(prompt, tuple(dict.fromkeys(answers))) for prompt, answers in found.items()]


def _groups(record: Record, key: str, answers: str) -> dict[str, list[Ask]]:
    groups = record.get(key) or {}
    if not isinstance(groups, dict):
        raise BadRecord(f"{key} must be an object of lists, found {groups!r}")
    made = {}
    for name, items in groups.items():
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise BadRecord(f"{key}.{name} must be a list of objects with prompt and {answers}")
        asks = _joined(_ask(item.get("prompt"), item.get(answers)) for item in items)
        if asks:
            made[KINDS.get(name, name.lower())] = asks
    return made
