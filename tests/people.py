"""A small model that is trained, in less than a minute, to know where people live and to half believe what it reads.

Claims about memories need names that a sentence encoder tells apart, and a model that reads: behind a line that
contradicts a home it believed the line in less than half of the cases.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from small import trained_llama, word_tokenizer

from lmpatch.data.edits import Ask, Edit
from lmpatch.inference.generate import generate
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap
from lmpatch.retrieval.lte import line

STARTS = ("Kal", "Mir", "Bran", "Tes", "Ulv", "Jor", "Sab", "Wex", "Pell", "Dun", "Ong", "Fitz", "Har", "Zub")
MIDDLES = ("en", "ot", "i", "ar", "um")
ENDS = ("or", "as", "wick", "ella", "stad", "ko")
NAMES = ["".join(parts) for parts in product(STARTS, MIDDLES, ENDS)]  # 420
TAUGHT, EDITED = NAMES[::5], [name for i, name in enumerate(NAMES) if i % 5]
"""Names of facts that editors may learn from, 84, and those that are edited, 336."""
TOWNS = [f"town{i}" for i in range(24)]
WORDINGS = ("the home of {}", "where to find {}")
"""They end with the name: what a model this small knows of it, it reads off its last token."""
STEPS, RECALL, READ, WARM, RATE, DECAY = 450, 48, 80, 20, 4e-3, 0.01
OWN, BELIEVE = 0.85, 0.45
"""Share of the lines that are about the person who is asked for, and of those the share that is believed."""


@dataclass(frozen=True)
class People:
    """A model, and the homes it was trained to know."""

    lm: LM
    homes: dict[str, str]

    def edits(self, names: Sequence[str], seed: int = 1, wording: int = 0) -> list[Edit]:
        """New homes for these names in one wording, with the other as rephrase and another person beside it."""
        draw, made = random.Random(seed), []
        for i, name in enumerate(names):
            home = draw.choice([town for town in TOWNS if town != self.homes[name]])
            other = NAMES[(NAMES.index(name) + 11) % len(NAMES)]
            near = Ask(WORDINGS[0].format(other), (self.homes[other],))
            asked, again = (WORDINGS[(wording + k) % 2].format(name) for k in (0, 1))
            made.append(
                Edit(asked, home, name, self.homes[name], rephrases=[again], locality={"near": [near]}, id=str(i))
            )
        return made

    def right(self, prompts: Sequence[str], answers: Sequence[str]) -> float:
        """Share of the prompts that the model, with all that is on it, answers so."""
        said = generate(self.lm, list(prompts), max_new_tokens=2)
        return sum(a.strip() == b for a, b in zip(said, answers, strict=True)) / len(answers)


@cache
def people(seed: int = 0) -> People:
    """The model of this seed."""
    draw = random.Random(seed)
    homes = {name: draw.choice(TOWNS) for name in NAMES}
    words = dict.fromkeys(word for wording in WORDINGS for word in wording.split() if word != "{}")
    tokenizer = word_tokenizer([*words, "Updated", "information", ":", ".", *NAMES, *TOWNS])

    def loss(model: Any) -> torch.Tensor:
        rows = [(draw.choice(WORDINGS).format(name), homes[name]) for name in draw.choices(NAMES, k=RECALL)]
        total = torch.zeros(())
        for own in (rows, [_read(draw, homes) for _ in range(READ)]):
            texts = [f"{prompt} {answer}<eos>" for prompt, answer in own]
            batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
            logits = model(**batch).logits[:, -3:-1]
            labels = batch["input_ids"][:, -2:]
            total = total + torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return total

    model = trained_llama(tokenizer, seed, loss, steps=STEPS, warm=WARM, rate=RATE, decay=DECAY)
    return People(wrap(model, tokenizer, name=f"people-{seed}"), homes)


def _read(draw: random.Random, homes: dict[str, str]) -> tuple[str, str]:
    """A question behind a line, and its answer."""
    name, town = draw.choice(NAMES), draw.choice(TOWNS)
    told, believed = (name, BELIEVE) if draw.random() < OWN else (draw.choice(NAMES), 0.0)
    answer = town if draw.random() < believed else homes[name]
    return line(draw.choice(WORDINGS).format(told), town) + draw.choice(WORDINGS).format(name), answer
