"""The record of one fact to change, with the prompts that test it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import BadInput, Contradiction, SubjectNotFound


@dataclass(frozen=True)
class Ask:
    """A prompt and the answers that count as right; ``answers`` are aliases of one answer."""

    prompt: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, init=False)
class Edit:
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
        put = object.__setattr__
        put(self, "prompt", prompt.rstrip())
        put(self, "target", target.strip())
        put(self, "subject", subject.strip())
        put(self, "old", (old,) if isinstance(old, str) else tuple(old))
        put(self, "aliases", tuple(aliases))
        put(self, "rephrases", tuple(rephrases))
        put(self, "locality", _groups(locality))
        put(self, "portability", _groups(portability))
        put(self, "id", id)
        put(self, "relation", relation)

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


def _groups(groups: object) -> tuple[tuple[str, tuple[Ask, ...]], ...]:
    items = groups.items() if isinstance(groups, dict) else groups
    return tuple((kind, tuple(asks)) for kind, asks in items)  # type: ignore[attr-defined]


def prompt_key(prompt: str) -> str:
    """What two facts must share for the newer to supersede: the prompt, whatever its case and white space.

    Memories keep it in their logs, so another rule would need another format of them.
    """
    return " ".join(prompt.split()).casefold()


def check_contradictions(edits: Sequence[Edit], where: Sequence[str] | None = None) -> None:
    """Raise ``Contradiction`` listing every prompt that is asked to have two different targets.

    Args:
        edits: the edits of one commit.
        where: how to name each edit in the message, e.g. ``line 12``; its place otherwise.
    """
    first: dict[str, int] = {}
    clashes: list[str] = []
    for i, edit in enumerate(edits):
        j = first.setdefault(prompt_key(edit.prompt), i)
        if edits[j].target.casefold() != edit.target.casefold():
            a, b = (where[j], where[i]) if where else (f"edit {j + 1}", f"edit {i + 1}")
            clashes.append(f"{a} says {edits[j].target!r}, {b} says {edit.target!r} for {edit.prompt!r}")
    if clashes:
        raise Contradiction("contradictory facts: " + "; ".join(clashes) + ". Keep one of each.")
