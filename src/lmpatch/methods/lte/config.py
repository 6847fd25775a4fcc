"""Settings of LTE: how facts are used, and how a model is aligned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...inference.tokens import End


@dataclass(frozen=True)
class Config:
    """How facts are used."""

    gate: Literal["cosine", "always"] = "cosine"
    """A fact is used if it reaches a cosine, or always, as released."""
    threshold: float | None = None
    """Cosine of the question and a fact's prompt that ``gate=cosine`` asks for. none: the one that was calibrated when
    the editor was trained."""
    lookup: Literal["last", "whole"] = "last"
    """What of a prompt is looked up: the last message of a chat and the last paragraph of a text, or the whole."""
    top_k: int = 1
    """Facts used at most."""
    acts: Literal["fired", "all", "none"] = "fired"
    """Which questions the aligned model answers: those that fire a fact, all, as published, or none. none: the model is
    aligned already (``alignment``), or the facts alone are to be measured."""


@dataclass(frozen=True)
class Training:
    """How a model is aligned. Defaults: the paper's LoRA (Jiang et al. 2024, arXiv:2402.11905) of a higher rank, in
    small batches for a CPU."""

    rank: int = 16
    """Rank of the LoRA on every linear projection of every block. Published: 8."""
    alpha: float = 32.0
    """The change is alpha / rank times B A. Published: 16, which is the same factor."""
    epochs: int = 3
    """Passes over the facts."""
    batch: int = 8
    """Facts of a step; each has four rows. Published: 128 rows."""
    lr: float = 3e-4
    """AdamW's rate."""
    warmup: int = 20
    """Steps until the full rate, which then falls in a line."""
    clip: float = 1.0
    """Gradients are cut to this norm."""
    verbatim: float = 0.3
    """Share of the questions that are a fact's own prompt; the others are its rephrases and what follows from it."""
    several: float = 0.5
    """Share of the questions behind two or three facts, by halves; the others are near facts. Published: 0.5."""
    near: int = 5
    """Nearest facts from which the others are drawn."""
    answer_tokens: int = 12
    """An answer's tokens beyond these are left out; the model's own answers end here."""
    end: End | None = "answer"
    """What is trained behind the target, so that an answer ends with it. ``answer``: a new line, or of a chat model the
    end of its turn. ``eos``: the end-of-sequence token."""
    false_fires: float = 0.01
    """Share of the unrelated questions that may fire a fact: the threshold is calibrated to it. Published: every
    question has a fact before it."""
    seed: int = 0
    """Starting weights, order and draws."""
    validate: int = 64
    """Facts held out for the curves and the threshold."""
    validate_every: int = 50
    """Steps between validations."""
    save_every: int = 25
    """Steps between checkpoints."""
