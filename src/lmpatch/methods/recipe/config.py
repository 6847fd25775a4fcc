"""Settings of RECIPE: how facts are used, and how an editor is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...retrieval import Scope
from ...retrieval.network import Sizes


@dataclass(frozen=True)
class Config(Scope):
    """How facts are used. Defaults: the paper's (Chen et al. 2024, arXiv:2405.03279)."""

    threshold: float = 0.45
    """Cosine of query and key that ``gate=cosine`` asks for. Default: for the packaged editor, on held-out facts of its
    training."""


@dataclass(frozen=True)
class Training(Sizes):
    """How the editor is trained. Defaults for a 270M model on a CPU; the paper's numbers stand in the meanings."""

    ends: bool = True
    prompt_tokens: int = 8
    target_tokens: int = 8

    key_steps: int = 1200
    """Steps of the first part, which never asks the language model: heads and sentinel learn retrieval. Published: one
    part, all losses together."""
    key_batch: int = 256
    """Facts of one such step."""
    prompt_steps: int = 800
    """Steps of the second part: retrieval stands still, and what makes the prompt vectors learns from the language
    model's three losses. Published: run until stopped, chosen by the smoothed loss."""
    prompt_batch: int = 32
    """Facts of one such step, each told in one of its two wordings. Published: 8, in both."""
    lr: float = 2e-3
    """AdamW's rate in the first part. Published: 1e-5, with every weight of the encoder trained."""
    prompt_lr: float = 1e-3
    """AdamW's rate in the second part."""
    encoder_lr: float = 1e-4
    """AdamW's rate for the encoder's weights or their adaptation, if there are any to train."""
    decay: float = 0.1
    """AdamW's weight decay."""
    dropout: float = 0.3
    """Share of the features that heads do not see in a step of the first part."""
    exchanged: float = 0.5
    """Share of the facts of a step of the second part that get another target, by halves another fact's and some word
    of the model's vocabulary: what is said must come from the target, not from what the rest suggests."""
    warmup: int = 50
    """Steps until the full rate, in each part."""
    final: float = 0.05
    """Share of the rate that is left at the last step of each part."""
    clip: float = 1.0
    """Gradients are cut to this norm."""
    margin: float | None = None
    """Hinge: what is this many times likelier than every rival costs nothing. none: no hinge. Published: 1.2."""
    other_share: float = 0.125
    """Share of the unrelated questions that go through the language model in a step, drawn anew. Published: 1."""
    answer_tokens: int | None = 8
    """An answer's tokens beyond these are left out of the language model's rows. none: all, as published."""
    after_tokens: int = 6
    """So many tokens that the model itself would say behind a target, up to the end of the sentence, cost the KL
    divergence from what it says with the target and without the vectors; an end of the answer behind such a sentence is
    said like a target. Published: 0."""
    at: Literal["front", "after_bos"] = "after_bos"
    """Where the vectors go; see ``Config``."""
    seed: int = 0
    """Starting weights, order and draws."""
    validate: int = 256
    """Facts held out for validation."""
    validate_lm: int = 64
    """How many of them the language model is asked about."""
    validate_every: int = 100
    """Steps between validations."""
    save_every: int = 50
    """Steps between checkpoints."""
    bf16: bool = True
    """The encoder computes in bf16 while the editor is trained."""
