"""Prompts in the model's own words: a fact learned in one wording alone holds in one wording alone.

The key of a reworded prompt differs from the bare prompt's, so ROME and MEMIT state a fact in other words less often.
The model is shown a few prompts with rewordings and writes some for each fact; what does not name the subject, or says
the answer, is dropped. No corpus and no second model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..data.edits import Edit
from ..data.matching import find
from ..inference.generate import generate
from ..inference.score import score
from ..models.lm import LM
from ..progress import Progress

SHOWN = """\
Each line gives the beginning of a sentence, and another beginning that the same words complete.
The mother tongue of Danielle Darrieux is -> Danielle Darrieux grew up speaking
Toyota has its headquarters in -> Toyota is a company that is based in the city of
What Ernest Rutherford is known for is the science of -> Ernest Rutherford worked all his life in the field of
The Colosseum can be found in -> To see the Colosseum, travel to
Thierry Henry plays the position of -> On the field, Thierry Henry is a
Tolstoy's "War and Peace" was written in -> The language in which Tolstoy wrote "War and Peace" is
"""
DRAWS = 4  # for each one that is wanted
TOKENS, TEMPERATURE = 24, 0.8


def reworded(lm: LM, edits: Sequence[Edit], count: int, seed: int, progress: Progress | None = None) -> list[list[str]]:
    """At most ``count`` other wordings of each prompt, fewer where the model writes none that can be used.

    Half of the draws begin with the subject. Of what can be used those are taken behind which the model's own answer to
    the prompt is likeliest: they ask for the same thing.
    """
    plain, each = lm.plain, DRAWS * count
    begun = [(edit, edit.subject if draw % 2 else "") for edit in edits for draw in range(each)]
    prompts = [f"{SHOWN}{edit.prompt} ->{' ' + start if start else ''}" for edit, start in begun]
    told = generate(
        plain, prompts, max_new_tokens=TOKENS, stop=["\n"], temperature=TEMPERATURE, seed=seed, progress=progress
    )
    texts = [_tidy(start + text) for (_, start), text in zip(begun, told, strict=True)]
    usable = [
        [text for text in dict.fromkeys(texts[i * each : (i + 1) * each]) if _says(text, edit)]
        for i, edit in enumerate(edits)
    ]
    answers = [text.strip() for text in generate(plain, [edit.prompt for edit in edits], max_new_tokens=3)]
    asked = [(i, text) for i, own in enumerate(usable) if answers[i] for text in own]
    scores = score(plain, [text for _, text in asked], [answers[i] for i, _ in asked]) if asked else []
    likely = {pair: found.total for pair, found in zip(asked, scores, strict=True)}
    ranked = [sorted((-likely.get((i, text), 0.0), k) for k, text in enumerate(own)) for i, own in enumerate(usable)]
    return [[own[k] for _, k in order[:count]] for own, order in zip(usable, ranked, strict=True)]


def _tidy(text: str) -> str:
    """Without what would end the sentence, and without a second arrow."""
    return text.partition("->")[0].strip().rstrip(".?!:,;").rstrip()


def _says(text: str, edit: Edit) -> bool:
    """It names the subject, leaves the answer open, and is another text than the prompt."""
    answers = [answer for answer in (edit.target, *edit.aliases, *edit.old) if answer]
    said = any(find(text.casefold(), answer.casefold()) >= 0 for answer in answers)
    longer = len(text) > len(edit.subject) + 3
    return find(text, edit.subject) >= 0 and not said and longer and text != edit.prompt.strip()
