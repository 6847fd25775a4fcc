"""Facts to change, with the prompts that test them, and the files they are read from.

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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import BadInput, BadRecord, Contradiction, SubjectNotFound
from .lines import Line, Shapes, cut, only, read_records, read_shapes, text_of
from .record import Record

KINDS = {"Relation_Specificity": "same_subject", "Forgetfulness": "other_objects"}
"""KnowEdit's locality names → ours: another relation of the subject; other objects of a one-to-many relation."""


@dataclass(frozen=True)
class Ask:
    """A prompt and the answers that count as right; ``answers`` are aliases of one answer."""

    prompt: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, init=False)
class Edit(Record):
    """One fact: after the edit, ``prompt`` is continued by ``target``.

    Args:
        prompt: the text before the answer, without a trailing blank.
        target: the new answer.
        subject: what the fact is about; occurs in ``prompt``. Methods that locate (ROME, MEMIT) need it.
        old: answers the model is expected to give before the edit, aliases of one answer.
        aliases: further spellings that count as the new answer.
        rephrases: other wordings of the same question (generality).
        locality: kind → prompts whose answers must not move; ``same_relation``, ``same_subject``, ...
        portability: axis → prompts whose answers follow from the new fact.
        id: how reports name the case; defaults to its place in the file.
        relation: optional relation id, used to find collisions.
    Raises:
        BadInput: prompt or target is empty.
    """

    prompt: str
    target: str
    subject: str = ""
    old: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    rephrases: tuple[str, ...] = ()
    locality: tuple[tuple[str, tuple[Ask, ...]], ...] = ()
    portability: tuple[tuple[str, tuple[Ask, ...]], ...] = ()
    id: str = ""
    relation: str = ""

    def __init__(  # a list is as good as a tuple to the caller; the record itself stays hashable
        self,
        prompt: str,
        target: str,
        subject: str = "",
        old: str | Sequence[str] = (),
        aliases: Sequence[str] = (),
        rephrases: Sequence[str] = (),
        locality: object = (),
        portability: object = (),
        id: str = "",
        relation: str = "",
    ) -> None:
        if not prompt.strip():
            raise BadInput("an edit has an empty prompt. Give the text that stands before the answer.")
        if not target.strip():
            raise BadInput(f"the edit {prompt!r} has an empty target. Give the answer the model should state.")
        values = {
            "prompt": prompt.rstrip(), "target": target.strip(), "subject": subject.strip(),
            "old": (old,) if isinstance(old, str) else tuple(old), "aliases": tuple(aliases),
            "rephrases": tuple(rephrases), "locality": _groups(locality), "portability": _groups(portability),
            "id": id, "relation": relation,
        }  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def read(cls, path: str | Path, *, limit: int | None = None, check: bool = False) -> list[Edit]:
        """``read_edits``."""
        return read_edits(path, limit=limit, check=check)

    @staticmethod
    def check(records: Sequence[Edit]) -> None:
        """``check_contradictions``."""
        check_contradictions(records)

    @property
    def answers(self) -> tuple[str, ...]:
        """The new answer in every accepted spelling."""
        return (self.target, *self.aliases)

    def need_subject(self) -> None:
        """Raise ``SubjectNotFound`` unless the subject occurs in the prompt."""
        if not self.subject:
            raise SubjectNotFound(f"the edit {self.prompt!r} names no subject. Add subject=..., a part of the prompt.")
        if self.subject not in self.prompt:
            raise SubjectNotFound(
                f"subject {self.subject!r} does not occur in prompt {self.prompt!r}. "
                "Write the subject exactly as the prompt does."
            )


def _groups(groups: Any) -> tuple[tuple[str, tuple[Ask, ...]], ...]:
    return tuple((kind, tuple(asks)) for kind, asks in (groups.items() if isinstance(groups, dict) else groups))


def prompt_key(prompt: str) -> str:
    """What two facts must share for the newer to supersede: the prompt, whatever its case and white space.

    Memories keep it in their logs, so another rule would need another format of them.
    """
    return " ".join(prompt.split()).casefold()


def check_contradictions(edits: Sequence[Edit], where: Sequence[str] | None = None) -> None:
    """Raise ``Contradiction`` listing every prompt that is asked to have two different targets.

    Args:
        where: how to name each edit in the message, e.g. ``line 12``; its place otherwise.
    """
    first: dict[str, int] = {}
    clashes: list[str] = []
    names = where or [f"edit {i}" for i in range(1, len(edits) + 1)]
    for i, edit in enumerate(edits):
        j = first.setdefault(prompt_key(edit.prompt), i)
        if edits[j].target.casefold() != edit.target.casefold():
            clashes.append(f"{names[j]} says {edits[j].target!r}, {names[i]} says {edit.target!r} for {edit.prompt!r}")
    if clashes:
        raise Contradiction("contradictory facts: " + "; ".join(clashes) + ". Keep one of each.")


def read_edits(
    path: str | Path, *, limit: int | None = None, seed: int | None = None, format: str | None = None,
    check: bool = False,
) -> list[Edit]:  # fmt: skip
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
    need = f"An edit needs at least prompt and target; the formats read are {', '.join(SHAPES)}."
    numbered = read_shapes(path, SHAPES, need, format)
    edits = [edit for _, edit in numbered]
    if check:
        check_contradictions(edits, [f"line {number}" for number, _ in numbered])
    return cut(edits, limit, seed)


def read_asks(path: str | Path, *, limit: int | None = None, seed: int | None = None) -> list[Ask]:
    """Read questions with answers (``question`` or ``prompt``, ``answers`` or ``answer``), as in NQ or PopQA."""

    def make(record: Line, _: int) -> Ask:
        return _ask(record.get("prompt", record.get("question")), record.get("answers", record.get("answer")))

    return cut([ask for _, ask in read_records(Path(path), make)], limit, seed)


def edit_from(record: Line, place: str) -> Edit:
    """The edit of a line in the shape ``lmpatch``; ``place`` names it where it has no id."""
    only(record, [field.name for field in fields(Edit)])
    return Edit(
        text_of(record, "prompt"),
        text_of(record, "target"),
        text_of(record, "subject", ""),
        _answers(record.get("old")),
        _answers(record.get("aliases")),
        _answers(record.get("rephrases")),
        _group_asks(record, "locality", "answers"),
        _group_asks(record, "portability", "answers"),
        str(record.get("id", place)),
        text_of(record, "relation", ""),
    )


def _target_new(record: Line, place: str) -> Edit:
    """Flat CounterFact and KnowEdit, whose sets differ in what they ask beside the edit."""
    locality = _group_asks(record, "locality", "ground_truth")
    if "locality_prompt" in record:
        locality["same_relation"] = [_ask(record["locality_prompt"], record.get("locality_ground_truth"))]
    return Edit(
        text_of(record, "prompt"),
        text_of(record, "target_new"),
        text_of(record, "subject"),
        _answers(record.get("ground_truth")),
        rephrases=_answers(record.get("rephrase", record.get("rephrase_prompt"))),
        locality=locality,
        portability=_group_asks(record, "portability", "ground_truth"),
        id=str(record.get("case_id", place)),
    )


def _rome(record: Line, place: str) -> Edit:
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, dict) or not isinstance(rewrite.get("target_new"), dict):
        raise BadRecord("requested_rewrite must be an object whose target_new is an object")
    subject, old = text_of(rewrite, "subject"), _answers(text_of(rewrite.get("target_true") or {}, "str", "") or None)
    return Edit(
        text_of(rewrite, "prompt").replace("{}", subject),
        text_of(rewrite["target_new"], "str"),
        subject,
        old,
        rephrases=_answers(record.get("paraphrase_prompts")),
        locality={"same_relation": _joined(_ask(near, old) for near in _answers(record.get("neighborhood_prompts")))},
        id=str(record.get("case_id", place)),
        relation=text_of(rewrite, "relation_id", ""),
    )


SHAPES: Shapes[Edit] = {
    "rome": (("requested_rewrite",), _rome),
    "counterfact": (("target_new", "locality_prompt"), _target_new),
    "knowedit": (("target_new",), _target_new),
    "lmpatch": (("prompt",), edit_from),
}


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
    answers: dict[str, list[str]] = {}
    for ask in asks:
        answers.setdefault(ask.prompt, []).extend(ask.answers)
    return [Ask(prompt, tuple(dict.fromkeys(texts))) for prompt, texts in answers.items()]


def _group_asks(record: Line, key: str, answers: str) -> dict[str, list[Ask]]:
    groups = record.get(key) or {}
    if not isinstance(groups, dict):
        raise BadRecord(f"{key} must be an object of lists, found {groups!r}")
    made = {}
    for name, items in groups.items():
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise BadRecord(f"{key}.{name} must be a list of objects with prompt and {answers}")
        if items:
            asks = _joined(_ask(item.get("prompt"), item.get(answers)) for item in items)
            made[KINDS.get(name, name.lower())] = asks
    return made
