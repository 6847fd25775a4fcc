"""A small model that is trained, in seconds, to know where people live and to half believe what it reads.

Claims about context need a model that has a memory and reads. It knows the home of every name. For the first names it
was also shown contexts; where one contradicted the home it believed it in a third of the cases. The last names never
had a context: on them is measured.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from small import trained_llama, word_tokenizer

from lmpatch.data.context import ContextRecord, render
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap

NAMES = [f"name{i}" for i in range(160)]
SEEN, UNSEEN = NAMES[:120], NAMES[120:]
TOWNS = [f"town{i}" for i in range(30)]
STEPS, READ, RECALL, WARM = 400, 64, 32, 20
RATE, DECAY = 3e-3, 0.01
AGREE, BELIEVE = 0.4, 0.35
"""Share of contexts that say the home, and of contradicting ones that the label follows."""


@dataclass(frozen=True)
class Trained:
    """A model, and the homes it was trained to know."""

    lm: LM
    homes: dict[str, str]

    def record(self, name: str, town: str) -> ContextRecord:
        return ContextRecord(f"{name} {town}", name, town, memory=self.homes[name], id=f"{name}-{town}")

    def conflicts(self, names: list[str], each: int, seed: int = 0) -> list[ContextRecord]:
        """Contexts that contradict what the model knows."""
        draw = random.Random(seed)
        others = {name: [town for town in TOWNS if town != self.homes[name]] for name in names}
        return [self.record(name, town) for name in names for town in draw.sample(others[name], each)]


@cache
def trained(seed: int) -> Trained:
    """The model of this seed; about 20 s on one core."""
    draw = random.Random(seed)
    homes = {name: draw.choice(TOWNS) for name in NAMES}
    tokenizer = word_tokenizer(["Q", "A", ":", *NAMES, *TOWNS])

    def loss(model: Any) -> torch.Tensor:
        total = torch.zeros(())
        for rows in (_read(draw, homes), _recalled(draw, homes)):
            ids = torch.tensor(tokenizer(rows)["input_ids"])
            logits = model(input_ids=ids).logits[:, -3:-1]
            total = total + torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -2:].flatten()) * len(rows)
        return total / (READ + RECALL)

    model = trained_llama(tokenizer, seed, loss, steps=STEPS, warm=WARM, rate=RATE, decay=DECAY)
    return Trained(wrap(model, tokenizer, name=f"trained-{seed}"), homes)


def _read(draw: random.Random, homes: dict[str, str]) -> list[str]:
    rows = []
    for name in draw.choices(SEEN, k=READ):
        town = homes[name] if draw.random() < AGREE else draw.choice(TOWNS)
        label = town if draw.random() < BELIEVE else homes[name]
        rows.append(f"{render(f'{name} {town}', name)} {label}<eos>")
    return rows


def _recalled(draw: random.Random, homes: dict[str, str]) -> list[str]:
    return [f"{render('', name)} {homes[name]}<eos>" for name in draw.choices(NAMES, k=RECALL)]
