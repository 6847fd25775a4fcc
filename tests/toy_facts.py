"""A small model, trained in a minute at most to know where people live; asked in three ways, it answers two words.

Claims about editors need a model that knows facts in several wordings. Edits are asked in the first one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from small import trained_llama, word_tokenizer

from lmpatch.data.edits import Edit
from lmpatch.inference.generate import generate
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap

NAMES = [f"name{i}" for i in range(240)]
HELD_OUT, OTHERS = NAMES[140:180], NAMES[180:]
"""Names that are measured on, and names that editors may see."""
TOWNS, STREETS = [f"town{i}" for i in range(24)], [f"street{i}" for i in range(24)]
WORDINGS = ("{} lives in", "the home of {} is", "who asks for {} goes to")
STEPS, ROWS, WARM, RATE, DECAY = 500, 96, 20, 4e-3, 0.01


class Shares(NamedTuple):
    """Shares of right answers."""

    exact: float
    reworded: float
    others: float


@dataclass(frozen=True)
class Toy:
    """A model, and the homes it was trained to know."""

    lm: LM
    homes: dict[str, str]

    def edits(self, count: int, words: int = 1, seed: int = 1) -> list[Edit]:
        """New homes for the first names, their town alone or the street too, in the first wording; the other wordings
        are the rephrases."""
        draw, made = random.Random(seed), []
        for name in NAMES[:count]:
            old = self.homes[name].split()
            new = [draw.choice([one for one in kind if one not in old]) for kind in (TOWNS, STREETS)]
            first, *others = (wording.format(name) for wording in WORDINGS)
            target, before = (" ".join(home[:words]) for home in (new, old))
            made.append(Edit(first, target=target, subject=name, old=[before], rephrases=others))
        return made

    def unrelated(self, wordings: int = len(WORDINGS), answers: bool = False) -> list[str]:
        """Prompts about the last names, with or without their answers."""
        prompts = [(wording.format(name), self.homes[name]) for name in OTHERS for wording in WORDINGS[:wordings]]
        return [f"{prompt} {home}" if answers else prompt for prompt, home in prompts]

    def says(self, asked: Sequence[tuple[str, str]]) -> float:
        """Share of prompts that are continued as said."""
        texts = generate(self.lm, [prompt for prompt, _ in asked], max_new_tokens=2)
        return sum(text.strip().startswith(want) for text, (_, want) in zip(texts, asked, strict=True)) / len(asked)

    def shares(self, edits: Sequence[Edit]) -> Shares:
        """Of the model as it is now: edits answered in their own wording, in the others, and other names."""
        exact = self.says([(edit.prompt, edit.target) for edit in edits])
        reworded = self.says([(prompt, edit.target) for edit in edits for prompt in edit.rephrases])
        held_out = [(wording.format(name), self.homes[name]) for name in HELD_OUT for wording in WORDINGS]
        return Shares(exact, reworded, self.says(held_out))


@cache
def toy(seed: int = 0) -> Toy:
    """The model of this seed; a minute at most on one core."""
    draw = random.Random(seed)
    homes = {name: f"{draw.choice(TOWNS)} {draw.choice(STREETS)}" for name in NAMES}
    words = dict.fromkeys(word for wording in WORDINGS for word in wording.split() if word != "{}")
    tokenizer = word_tokenizer([*words, *NAMES, *TOWNS, *STREETS])

    def loss(model: Any) -> torch.Tensor:
        names = draw.choices(NAMES, k=ROWS)
        rows = [f"{draw.choice(WORDINGS).format(name)} {homes[name]}<eos>" for name in names]
        batch = tokenizer(rows, padding=True, padding_side="left", return_tensors="pt")
        logits = model(**batch).logits[:, -4:-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, -3:].flatten())

    model = trained_llama(tokenizer, seed, loss, steps=STEPS, warm=WARM, rate=RATE, decay=DECAY)
    return Toy(wrap(model, tokenizer, name=f"toy-{seed}"), homes)
