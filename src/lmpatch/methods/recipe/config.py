"""Settings of RECIPE: how facts are used, and how an editor is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...retrieval import Lookup
from ...retrieval.network import Sizes
from ...retrieval.prompts import PromptSizes


@dataclass(frozen=True)
class Config(Lookup):
    """How facts are used. Defaults: the paper's (Chen et al. 2024, arXiv:2405.03279), but for ``insert``."""

    threshold: float = 0.45
    """Cosine of query and key that ``gate=cosine`` asks for. Default: for the packaged editor, on held-out facts of its
    training."""
    insert: Literal["auto", "vectors", "text", "both"] = "auto"
    """What goes before the question: continuous prompt vectors, as published, the fact as a sentence (RAG), or both.
    auto: both on a model that has prompt vectors, text on any other."""
    at: Literal["front", "after_bos"] | None = None
    """Vectors go before everything, as published, or behind the start token, which keeps its place as sink. none: where
    they were when the editor was trained."""


@dataclass(frozen=True)
class Training(Sizes, PromptSizes):
    """How the editor is trained. Defaults for a 270M model on a CPU; the paper's numbers stand in the meanings."""

    faithful: bool = False
    """Train the published method: every weight of the encoder, whole keys from which three prompt vectors are made,
    retrieval and language model in one part with the published losses, no end of the answer."""
    key_steps: int = 0
    """Steps of the first part, which never asks the language model: heads and sentinel learn retrieval. 0: the
    retrieval that comes with lmpatch. Published: one part, all losses together."""
    key_batch: int = 256
    """Facts of one such step."""
    rivals: int = 2048
    """Keys of this many facts outside the batch are rivals in such a step too. Published: 0."""
    verifier_steps: int = 0
    """Steps of the part after it: the verifier learns which questions ask for a fact that was found. 0: there is none,
    or the one of the retrieval that comes with lmpatch. Published: 0."""
    verifier: int = 256
    """Width of the verifier's layer."""
    verifier_batch: int = 1024
    """Pairs of a fact and a question of one such step."""
    prompt_steps: int = 350
    """Steps of the second part: retrieval stands still, and what makes the prompt vectors learns from the language
    model. Published: run until stopped, chosen by the smoothed loss."""
    prompt_batch: int = 32
    """Facts of one such step, each told in one of its two wordings. Published: 8, in both."""
    text_share: float = 0.6
    """Share of these that also have the fact as a sentence before the question. Published: 0."""
    lr: float = 2e-3
    """AdamW's rate in the first two parts. Published: 1e-5, with every weight of the encoder trained."""
    prompt_lr: float = 3e-3
    """AdamW's rate in the second part."""
    encoder_lr: float = 1e-4
    """AdamW's rate for the encoder's weights or their adaptation, if there are any to train."""
    decay: float = 0.1
    """AdamW's weight decay."""
    dropout: float = 0.3
    """Share of the features that heads do not see in a step of the first part. Published: 0."""
    exchanged: float = 0.5
    """Share of the facts of a step of the second part that get another target, by halves another fact's and some word
    of the model's vocabulary: what is said must come from the target, not from what the rest suggests. Published: 0."""
    warmup: int = 50
    """Steps until the full rate, in each part."""
    final: float = 0.05
    """Share of the rate that is left at the last step of each part."""
    clip: float = 1.0
    """Gradients are cut to this norm."""
    margin: float | None = None
    """Hinge: what is this many times likelier than every rival costs nothing. none: no hinge. Published: 1.2."""
    other_share: float = 0.125
    """Share of the questions that a fact does not touch that go through the language model in a step, drawn anew.
    Published: 1."""
    other_weight: float = 0.5
    """Weight of the loss that keeps answers to these and to those ``beside``, against that of stating facts. Published:
    1."""
    beside: int = 8
    """Questions of a step that are about a fact's subject and not answered by its target. Where the answer follows from
    the fact, what the model answers behind the fact as text is to stay, else what it answers without it. Published:
    0."""
    answer_tokens: int | None = 12
    """An answer's tokens beyond these are left out of the language model's rows. none: all, as published."""
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
