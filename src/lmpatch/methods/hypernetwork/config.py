"""Settings of training that both methods have; each has its own defaults."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import BadInput
from ...inference.tokens import End


@dataclass(frozen=True)
class Training:
    """How the network is trained."""

    layers: int
    """So many blocks are written, the last ones."""
    rank: int
    """Width inside the network's two blocks. Published: 1920."""
    steps: int
    """Steps of Adam. Published: until it is no better on held-out facts, up to a million."""
    batch: int
    """Facts of a step."""
    strength: float
    """What a change is multiplied by at the start; each module learns its own."""
    strength_lr: float
    """Adam's rate for these."""
    lr: float
    """Adam's rate for the network."""
    clip: float
    """Gradients are cut to this norm."""
    warmup: int = 20
    """Steps until the full rate. Published: 0."""
    final: float = 0.1
    """Share of the rate that is left at the last step. Published: 1."""
    edit_weight: float = 0.1
    """Weight of the loss of stating facts in other words."""
    keep_weight: float = 1.0
    """Weight of the loss that keeps other answers, a KL divergence in nats."""
    answer_tokens: int | None = 12
    """An answer's tokens beyond these are left out. none: all."""
    end: End | None = None
    """What is learned behind a target, in training and in every edit, so that an answer ends with it. ``answer``: a new
    line, or of a chat model the end of its turn. ``eos``: the end-of-sequence token."""
    seed: int = 0
    """Starting weights, order and draws."""
    validate: int = 64
    """Facts held out for validation, a quarter at most."""
    validate_every: int = 100
    """Steps between validations."""
    save_every: int = 50
    """Steps between checkpoints."""


def check(cfg: Training) -> None:
    """Raise ``BadInput`` for numbers that no training can have."""
    whole = ("layers", "rank", "steps", "batch", "validate_every", "save_every")
    if wrong := [name for name in whole if getattr(cfg, name) < 1]:
        raise BadInput(f"{wrong[0]} is {getattr(cfg, wrong[0])}. Give a whole number from 1.")
    if wrong := [name for name in ("lr", "clip") if getattr(cfg, name) <= 0]:
        raise BadInput(f"{wrong[0]} is {getattr(cfg, wrong[0])}. Give a number above 0.")
    most, least = cfg.answer_tokens, min(cfg.edit_weight, cfg.keep_weight, cfg.strength_lr)
    if (most is not None and most < 1) or least < 0:
        raise BadInput("answer_tokens is from 1, and no weight or rate is below 0. Correct the one that is not.")
