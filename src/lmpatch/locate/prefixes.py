"""The words under which a fact must hold: its prompt, the prompt behind other texts, and other words for it.

Released code samples prefixes from the model without a seed and keeps them in a module global; two runs differ, and a
second model in the process reuses the first one's. Fixed texts, and samples with a seed, make a run repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.edits import Edit
from ..inference.generate import generate
from ..inference.tokens import End, Row, encode_all, ended
from ..models.lm import LM
from ..progress import Progress
from .rewordings import reworded

SHORT = ("The weather was fine. ", "It is well known. ", "In other news, ", "As he said, ", "Last year, ")
LONG = (
    "We met at the station shortly before noon. ",
    "The report was published at the end of the month. ",
    "She closed the book and looked out of the window. ",
    "Most of the shops in the street were already open. ",
    "After a long discussion, the committee came to this result. ",
)
OPENINGS = ("The", "In", "A", "I", "It", "When", "He", "They", "There", "One")  # of what the model goes on with


def prefixes(short: int, long: int) -> tuple[str, ...]:
    """The empty prefix, ``short`` texts of about five tokens and ``long`` ones of about ten."""
    return ("", *SHORT[:short], *LONG[:long])


def sampled(lm: LM, count: int, seed: int) -> tuple[str, ...]:
    """Prefixes of about ten tokens that the model writes itself, at temperature 1."""
    begun = [OPENINGS[i % len(OPENINGS)] for i in range(count)]
    texts = generate(lm.plain, begun, max_new_tokens=9, temperature=1.0, seed=seed)
    return tuple(f"{start}{text.rstrip().rstrip('.')}. " for start, text in zip(begun, texts, strict=True))


@dataclass(frozen=True)
class Wordings:
    """Of each fact as many texts, the bare prompt first."""

    texts: tuple[tuple[tuple[str, int], ...], ...]
    """Fact → texts, each with the place where the search for its subject begins."""
    reworded: tuple[int, ...]
    """How many prompts in its own words the model wrote for each fact."""

    @property
    def count(self) -> int:
        """Texts of a fact."""
        return len(self.texts[0]) if self.texts else 0

    def of(self, pick: Sequence[int]) -> Wordings:
        """Those of these facts alone."""
        return Wordings(tuple(self.texts[i] for i in pick), tuple(self.reworded[i] for i in pick))

    def rows(self, lm: LM, edits: Sequence[Edit], *, targets: bool, end: End | None = None) -> list[Row]:
        """One row for each text, fact after fact, with its subject's place and, if asked, its target and its end."""
        each = [(edit, *one) for edit, own in zip(edits, self.texts, strict=True) for one in own]
        rows = encode_all(
            lm,
            [text for _, text, _ in each],
            [edit.target for edit, _, _ in each] if targets else None,
            [edit.subject for edit, _, _ in each],
            [after for _, _, after in each],
        )
        return ended(lm, rows, end if targets else None)


def wordings(
    lm: LM, edits: Sequence[Edit], heads: Sequence[str], *, rewordings: int = 0, seed: int = 0,
    progress: Progress | None = None,
) -> Wordings:  # fmt: skip
    """Each prompt behind every prefix of ``heads``, and ``rewordings`` prompts in the model's own words.

    Of a fact that the model words in fewer ways the prompt stands behind further fixed prefixes, which say as much as
    those of any other fact.
    """
    own = reworded(lm, edits, rewordings, seed, progress) if rewordings else [[] for _ in edits]
    spare = [head for head in (*SHORT, *LONG) if head not in heads]
    texts = []
    for edit, other in zip(edits, own, strict=True):
        fill = [spare[i % len(spare)] if spare else "" for i in range(rewordings - len(other))]
        behind = [(head + edit.prompt, len(head)) for head in (*heads, *fill)]
        texts.append((*behind, *((text, 0) for text in other)))
    return Wordings(tuple(texts), tuple(map(len, own)))
