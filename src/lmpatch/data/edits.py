"""Facts to change, with the prompts that test them, and the files they are read from.

A file of facts is JSON lines, a JSON list (its own, or under ``data``) or CSV, gzipped or not; a table in Python is as
good. Its shape is told from the keys of its first record:

``lmpatch``      the keys of ``Edit``; ``prompt`` and ``target`` are required::

    {"prompt": "The Eiffel Tower is in", "subject": "Eiffel Tower", "target": "Rome", "old": "Paris",
     "rephrases": ["You find the Eiffel Tower in"],
     "locality": {"same_relation": [{"prompt": "The Louvre is in", "answers": ["Paris"]}]},
     "portability": {"reasoning": [{"prompt": "The Eiffel Tower is in the country of", "answers": "Italy"}]},
     "valid_from": "2024-05-31", "valid_to": "2026-01-01T12:00+02:00", "source": "ticket 4711"}

``counterfact``  flat CounterFact: ``target_new``, ``rephrase_prompt``, ``locality_prompt``, ...
``rome``         CounterFact as ROME published it: ``requested_rewrite``, ``neighborhood_prompts``, ...; and MQuAKE, as
                 far as its records hold one fact
``knowedit``     KnowEdit's ZsRE, wiki_counterfact and wiki_recent: ``target_new`` with ``locality``, ``portability``
``mend``         zsRE as MEND published it; the target is ``alt``, as in EasyEdit (ROME and MEMIT take ``answers``)
``known``        ROME's known_1000; the target is the true ``attribute``
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import BadInput, BadRecord, Contradiction, SubjectNotFound
from .dates import Span, When, bounds, iso
from .lines import Line, Shapes, Source, as_text, check_text, cut, only, read_records, read_shapes, text_of
from .matching import find
from .record import Record

KINDS = {"Relation_Specificity": "same_subject", "Forgetfulness": "other_objects"}
"""KnowEdit's locality names → ours: another relation of the subject; other objects of a one-to-many relation."""
ORIGIN = ("valid_from", "valid_to", "source")
"""Fields of an edit that hashes of edits leave out where they are empty: the first release had none of them."""


@dataclass(frozen=True)
class Ask:
    """A prompt and the answers that count as right; ``answers`` are aliases of one answer."""

    prompt: str
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise BadInput(f"a question needs a text, found {self.prompt!r}.")
        object.__setattr__(self, "answers", _texts("answers", self.answers))
        check_text(vars(self))


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
        valid_from, valid_to: from when to when the fact holds, as dates or dates with a time, in UTC unless they say
            otherwise; the end is exclusive, "" is open. Only a memory looks at them.
        source: where the fact comes from, in a few words.
    Raises:
        BadInput: prompt or target is empty, or the fact ends before it begins.
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
    valid_from: str = ""
    valid_to: str = ""
    source: str = ""

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
        valid_from: When = "",
        valid_to: When = "",
        source: str = "",
    ) -> None:
        words = {"prompt": prompt, "target": as_text(target), "subject": subject, "id": id, "relation": relation}
        words["source"] = source
        if wrong := [name for name, value in words.items() if not isinstance(value, str)]:
            raise BadInput(f"{wrong[0]} of an edit is a text, found {words[wrong[0]]!r}.")
        target = words["target"]
        if not prompt.strip():
            raise BadInput("an edit has an empty prompt. Give the text that stands before the answer.")
        if not target.strip():
            raise BadInput(f"the edit {prompt!r} has an empty target. Give the answer the model should state.")
        span = iso("valid_from", valid_from), iso("valid_to", valid_to)
        values = {
            "prompt": prompt.rstrip(), "target": target.strip(), "subject": subject.strip(),
            "old": _texts("old", old), "aliases": _texts("aliases", aliases),
            "rephrases": _texts("rephrases", rephrases), "locality": _groups(locality),
            "portability": _groups(portability), "id": id, "relation": relation,
            "valid_from": span[0], "valid_to": span[1], "source": source.strip(),
        }  # fmt: skip
        start, end = bounds(span)
        if start >= end:
            why = f"the edit {prompt!r} holds from {span[0]} and no longer from {span[1]} on."
            raise BadInput(f"{why} Give a later valid_to; it is exclusive.")
        check_text(values)
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

    @property
    def span(self) -> Span:
        """``valid_from`` and ``valid_to``."""
        return self.valid_from, self.valid_to

    def need_subject(self) -> None:
        """Raise ``SubjectNotFound`` unless the subject occurs in the prompt."""
        if not self.subject:
            raise SubjectNotFound(f"the edit {self.prompt!r} names no subject. Add subject=..., a part of the prompt.")
        if find(self.prompt, self.subject) < 0:
            raise SubjectNotFound(
                f"subject {self.subject!r} does not occur in prompt {self.prompt!r}, as words of its own. "
                "Write the subject exactly as the prompt does."
            )


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """One text or several; None is none."""
    texts = () if value is None else (value,) if isinstance(value, str) else value
    found: tuple[Any, ...] = tuple(texts) if isinstance(texts, Iterable) else (texts,)
    if not all(isinstance(text, str) for text in found):
        raise BadInput(f"{name} is a text or a list of texts, found {value!r}.")
    return found


def _groups(groups: Any) -> tuple[tuple[str, tuple[Ask, ...]], ...]:
    found = tuple((kind, tuple(asks)) for kind, asks in (groups.items() if isinstance(groups, dict) else groups or ()))
    if odd := [ask for _, asks in found for ask in asks if not isinstance(ask, Ask)]:
        raise BadInput(f"locality and portability hold lists of Ask by kind, found {odd[0]!r}.")
    return found


def prompt_key(prompt: str) -> str:
    """What two facts must share for the newer to supersede: the prompt, whatever its case, white space and composition.

    Memories keep it in their logs, so another rule would need another format of them.
    """
    return unicodedata.normalize("NFC", " ".join(prompt.split()).casefold())


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
    source: Source, *, limit: int | None = None, seed: int | None = None, format: str | None = None,
    check: bool = False,
) -> list[Edit]:  # fmt: skip
    """Read a file of facts. Prompts of one group that occur twice are joined: any of their answers counts.

    Args:
        source: a path; or the records: dicts, a ``datasets.Dataset``, a pandas ``DataFrame``.
        limit: at most this many edits, the first ones.
        seed: shuffle the file with this seed before ``limit`` cuts it; None keeps the order.
        format: a name of ``SHAPES``; None tells it from the first record.
        check: refuse facts that contradict each other.
    Raises:
        BadInput: no such file, an empty one, or an unknown shape.
        BadRecord: lines that cannot be read; names the file and the first ten of them.
        Contradiction: ``check`` is set and one prompt has two targets; names both lines.
    """
    need = f"An edit needs at least prompt and target; the formats read are {', '.join(SHAPES)}. {RIPPLE}"
    numbered = read_shapes(source, SHAPES, need, format)
    edits = [edit for _, edit in numbered]
    if check:
        check_contradictions(edits, [f"line {number}" for number, _ in numbered])
    return cut(edits, limit, seed)


def read_asks(source: Source, *, limit: int | None = None, seed: int | None = None) -> list[Ask]:
    """Read questions with answers (``question`` or ``prompt``, ``answers`` or ``answer``), as in NQ or PopQA."""

    def make(record: Line, _: int) -> Ask:
        prompt = _either(record, "prompt", record.get("question"))
        return _ask(prompt, _either(record, "answers", record.get("answer")))

    return cut([ask for _, ask in read_records(source, make)], limit, seed)


def edit_from(record: Line, place: str) -> Edit:
    """The edit of a line in the shape ``lmpatch``; ``place`` names it where it has no id."""
    only(record, [field.name for field in fields(Edit)])
    return Edit(
        text_of(record, "prompt"),
        text_of(record, "target", numbers=True),
        text_of(record, "subject", ""),
        _answers(record.get("old")),
        _answers(record.get("aliases")),
        _answers(record.get("rephrases")),
        _group_asks(record, "locality", "answers"),
        _group_asks(record, "portability", "answers"),
        text_of(record, "id", place, numbers=True),
        text_of(record, "relation", "", numbers=True),
        record.get("valid_from"),  # type: ignore[arg-type]
        record.get("valid_to"),  # type: ignore[arg-type]
        text_of(record, "source", "", numbers=True),
    )


def _target_new(record: Line, place: str) -> Edit:
    """Flat CounterFact and KnowEdit, whose sets differ in what they ask beside the edit."""
    locality = _group_asks(record, "locality", "ground_truth")
    if record.get("locality_prompt") is not None:
        locality["same_relation"] = [_ask(record["locality_prompt"], record.get("locality_ground_truth"))]
    return Edit(
        text_of(record, "prompt"),
        text_of(record, "target_new", numbers=True),
        text_of(record, "subject"),
        _answers(record.get("ground_truth")),
        rephrases=_answers(_either(record, "rephrase", record.get("rephrase_prompt"))),
        locality=locality,
        portability=_group_asks(record, "portability", "ground_truth"),
        id=text_of(record, "case_id", place, numbers=True),
    )


def _rome(record: Line, place: str) -> Edit:
    rewrite = record.get("requested_rewrite")
    if isinstance(rewrite, list) and len(rewrite) == 1:  # MQuAKE
        rewrite = rewrite[0]
    elif isinstance(rewrite, list):
        raise BadRecord(
            f"requested_rewrite holds {len(rewrite)} facts, and the questions are about all of them. Write each fact "
            "as a record of its own: prompt, subject and target"
        )
    if not isinstance(rewrite, dict) or not isinstance(rewrite.get("target_new"), dict):
        raise BadRecord("requested_rewrite must be an object whose target_new is an object")
    subject, old = text_of(rewrite, "subject"), _answers(_object(rewrite, "target_true").get("str"))
    near = _joined(_ask(prompt, old) for prompt in _answers(record.get("neighborhood_prompts")))
    follow = _answers([record.get("new_answer"), record.get("new_answer_alias")])
    hops = _joined(_ask(question, follow) for question in _answers(record.get("questions")))
    return Edit(
        text_of(rewrite, "prompt").replace("{}", subject),
        text_of(rewrite["target_new"], "str", numbers=True),
        subject,
        old,
        rephrases=_answers(_either(record, "paraphrase_prompts", rewrite.get("question"))),
        locality={"same_relation": near} if near else (),
        portability={"reasoning": hops} if hops else (),
        id=text_of(record, "case_id", place, numbers=True),
        relation=text_of(rewrite, "relation_id", ""),
    )


def _mend(record: Line, place: str) -> Edit:
    near = text_of(record, "loc", "").removeprefix("nq question: ")
    return Edit(
        text_of(record, "src"),
        text_of(record, "alt", numbers=True),
        text_of(record, "subject", ""),
        _answers(_either(record, "answers", record.get("pred"))),
        rephrases=_answers(record.get("rephrase")),
        locality={"unrelated": [_ask(near, record.get("loc_ans"))]} if near else (),
        id=place,
    )


def _known(record: Line, place: str) -> Edit:
    return Edit(
        text_of(record, "prompt"),
        text_of(record, "attribute", numbers=True),
        text_of(record, "subject"),
        id=text_of(record, "known_id", place, numbers=True),
        relation=text_of(record, "relation_id", ""),
    )


SHAPES: Shapes[Edit] = {
    "rome": (("requested_rewrite",), _rome),
    "counterfact": (("target_new", "locality_prompt"), _target_new),
    "knowedit": (("target_new",), _target_new),
    "mend": (("src", "alt"), _mend),
    "known": (("prompt", "attribute"), _known),
    "lmpatch": (("prompt",), edit_from),
}
RIPPLE = "RippleEdits' own files name their targets by ids alone: read KnowEdit's copy of them."


def _either(record: Line, key: str, other: Any) -> Any:
    return other if record.get(key) is None else record[key]


def _object(record: Line, key: str) -> Line:
    value = record.get(key) or {}
    if not isinstance(value, dict):
        raise BadRecord(f"{key} must be an object, found {value!r}")
    return value


def _answers(value: Any) -> tuple[str, ...]:
    """One text, a list of texts, or lists of aliases inside a list: all of them, in order, each once."""
    value = as_text(value)
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
    made = {}
    for name, items in _object(record, key).items():
        items = [] if items is None else items
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise BadRecord(f"{key}.{name} must be a list of objects with prompt and {answers}")
        if items:
            asks = _joined(_ask(item.get("prompt"), item.get(answers)) for item in items)
            made[KINDS.get(name, str(name).lower())] = asks
    return made
