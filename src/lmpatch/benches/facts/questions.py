"""One prompt that a case asks, and what is measured behind it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

PACK = "pack/"
PASSAGE = 80  # new tokens of a long answer, which no new line ends


@dataclass(frozen=True)
class Question:
    """One prompt to score for one case."""

    case: int
    """Place of the edit in its chunk."""
    kind: str
    """``edit``, ``rephrase``, ``loc/<kind>``, ``port/<axis>`` or ``pack/<probe>``."""
    prompt: str
    answers: tuple[str, ...]
    old: tuple[str, ...] = ()
    whole: str = ""
    """What the model reads, where that is more than ``prompt``."""
    flag: str = ""
    """Why it is not asked: superseded, repeated, collided or duplicate."""
    form: Literal["", "scored", "passage"] = ""
    """Generated; only two likelihoods compared; generated at length."""
    against: str = ""
    """Of ``scored``: the answer behind this text is what the answer is compared with. "": the old one is."""

    @property
    def text(self) -> str:
        """What the model reads."""
        return self.whole or self.prompt

    @property
    def key(self) -> str:
        """Under what the answer is kept; a short and a long one to one prompt are two."""
        return self._key(self.text)

    @property
    def base_key(self) -> str:
        """The same of the prompt alone, which the unpatched model was asked."""
        return self._key(self.prompt)

    def _key(self, text: str) -> str:
        return f"passage\n{text}" if self.form == "passage" else text

    def identity(self) -> dict[str, Any]:
        """Its fields, of the last two only those that are set: what was cached before they came keeps its name."""
        return {key: value for key, value in asdict(self).items() if value or key not in ("form", "against")}

    def scores(self, forced: bool) -> list[tuple[str, str]]:
        """(text, answer) of the likelihoods it needs: the wanted answer's, and the old one's where there is one.

        Args:
            forced: also of questions whose answer is generated.
        """
        if self.form == "scored":
            other = (self.against, self.answers[0]) if self.against else (self.text, self.old[0])
            return [(self.text, self.answers[0]), other]
        if not forced or self.kind.startswith(PACK):
            return []
        return [(self.text, answer[0]) for answer in (self.answers, self.old) if answer]
