"""``fit`` and ``train`` of RECIPE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch

from ...data.edit import Ask, Edit, prompt_key
from ...errors import BadInput, WrongModel
from ...inference.forward import HEAD_CHUNK
from ...models.lm import LM
from ...patches.base import fingerprint
from ...patches.editor import Editor, load_editor
from ...patches.memory.patch import MemoryPatch, Scope, build_memory
from ...patches.patch import Base, plain
from ...progress import Progress
from ...provenance import made_now
from ...resources import require_memory
from ...retrieval.encoder import Encoder, load_encoder, shared_encoder
from ...retrieval.network import Retriever, Shape
from .data import drawable, usable, without
from .losses import BATCH_TOKENS
from .trainer import train as run_training

TYPICAL = 256  # facts whose mean feature is taken for the centre of all
PACKAGED = Path(__file__).parents[1] / "editors"


@dataclass(frozen=True)
class Config(Scope):
    """How facts are used. Defaults: the paper's (Chen et al. 2024, arXiv:2405.03279)."""

    threshold: float = 0.45
    """Cosine of query and key that ``gate=cosine`` asks for. Default: for the packaged editor, on held-out facts of its
    training."""


@dataclass(frozen=True)
class Training:
    """How the editor is trained. Defaults for a 270M model on a CPU; the paper's numbers stand in the meanings."""

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
    adapt: int | None = 0
    """Rank of the encoder's adaptation; 0: none, and features of a text are computed once; none: all its weights are
    trained, as published."""
    pooler: bool = False
    """Features also hold what the encoder's own pooling layer says. Published: no; released code: yes."""
    width: int = 1024
    """R, the width of keys. Published: 4096."""
    content: int = 512
    """How many of these hold what is to be said and are compared with no query. Published: 0."""
    prompt_tokens: int = 6
    """P, prompt vectors of one fact. Published: 3."""
    target_tokens: int = 6
    """T, the first tokens of a target whose embeddings in the language model prompt vectors are made of too; at least
    P. Published: 0."""
    sentinel_tokens: int = 10
    """Learned input embeddings of the sentinel."""
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


def train(
    lm: LM,
    edits: Sequence[Edit],
    cfg: Training,
    *,
    unrelated: Sequence[Ask] = (),
    encoder: str = "all-MiniLM-L6-v2",
    download: bool = False,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Editor:
    """Train an editor: retrieval that knows a fact in other words and leaves the rest alone, and prompt vectors that
    make the model state it.

    Args:
        edits: facts to learn editing from, with rephrases and locality prompts. None of them is remembered.
        unrelated: questions with answers that no fact touches.
        encoder: a sentence encoder, see ``models.encoder.load_encoder``.
        download: an encoder named by a hub id may be fetched.
        out: folder of the checkpoint and the curves. A run that is there goes on where it stopped.
    Returns:
        the editor; ``save`` writes one safetensors file.
    Raises:
        BadInput: too few facts, fewer ``target_tokens`` than ``prompt_tokens``, or ``out`` holds another run.
        NotEnoughMemory: training would need more than is free.
        Diverged: a loss left the finite numbers; the last checkpoint is good.
    Source: Chen et al. 2024 (arXiv:2405.03279) sec. 3.3.
    Differs: two parts, see ``Training``; keys of two parts, and prompt vectors that read the embeddings of the target's
    tokens, see ``patches.retriever``; the encoder stays as it is; prompt vectors have one length;
    queries are prompts alone, in training and after.
    """
    if cfg.target_tokens < cfg.prompt_tokens:
        raise BadInput(f"target_tokens is {cfg.target_tokens}, below the {cfg.prompt_tokens} of prompt_tokens.")
    edits = usable(without(edits, ()), unrelated)
    found = load_encoder(encoder, download=download)
    texts = drawable(edits, unrelated)
    _readable(found, texts)
    words = typical_embeddings(lm)
    shape = Shape(
        encoder=encoder,
        features=found.width,
        d_model=words.shape[1],
        width=cfg.width,
        content=cfg.content,
        prompt_tokens=cfg.prompt_tokens,
        target_tokens=cfg.target_tokens,
        sentinel_tokens=cfg.sentinel_tokens,
        adapt=cfg.adapt,
        pooler=cfg.pooler,
    )
    net = Retriever(shape, found)
    require_memory(_training_bytes(lm, net, len(texts)), lm.device, f"training on {len(edits)} facts")
    net.start(cfg.seed, words, [(e.prompt, e.target) for e in edits[:TYPICAL]])
    found.module.to(lm.device)
    trainer = run_training(
        lm, net.to(lm.device), edits, unrelated, cfg, Path(out) if out is not None else None, progress
    )
    made = {"steps": trainer.step, "facts": len(trainer.edits), "lm_dtype": str(lm.dtype).removeprefix("torch.")}
    return _editor(lm, net.cpu(), plain(cfg), made | made_now(trainer.spent()))


def _readable(encoder: Encoder, texts: Sequence[str]) -> None:
    """Raise ``BadInput`` if a text of the training is longer than the encoder reads."""
    long = [t for t, ids in zip(texts, encoder.tokenise(texts), strict=True) if len(ids) > encoder.limit]
    if long:
        raise BadInput(
            f"{len(long)} of {len(texts)} texts are longer than the {encoder.limit} tokens {encoder.name} reads: "
            f"{long[0][:60]!r}…. Leave them out or shorten them."
        )


def _training_bytes(lm: LM, net: Retriever, texts: int) -> int:
    """Features of all texts, the editor with gradients and moments, what autograd keeps of a batch, one head chunk."""
    layout = lm.layout
    features = 2 * net.inputs * texts
    learned = 16 * sum(p.numel() for p in net.parameters() if p.requires_grad)
    batch = BATCH_TOKENS * (12 * layout.n_layers * layout.d_model + 4 * sum(layout.widths))
    return features + learned + 4 * (batch + 3 * HEAD_CHUNK * layout.vocab)


def typical_embeddings(lm: LM) -> torch.Tensor:
    """What the embedding module hands on for the tokens of a sentence: [n, d_model]."""
    ids = lm.tokenizer("The quick brown fox jumps over the lazy dog near Paris in 1999.")["input_ids"]
    with torch.no_grad():
        out: torch.Tensor = lm.module(lm.layout.embed)(torch.tensor(ids, device=lm.device))
    return out.float().cpu()


def _editor(lm: LM, net: Retriever, config: dict[str, object], made: dict[str, object]) -> Editor:
    parts = {"shape": asdict(net.shape), "encoder_fingerprint": net.encoder.fingerprint}
    return Editor("recipe", config, Base(fingerprint(lm), lm.name), parts, net.tensors(), made)


def packaged_editor(lm: LM) -> Editor:
    """The editor that comes with lmpatch for this very model.

    Raises:
        BadInput: there is none.
    """
    for path in sorted(PACKAGED.glob("recipe-*.safetensors")):
        editor = load_editor(path)
        if editor.base.fingerprint == fingerprint(lm):
            return editor
    raise BadInput(
        f"no editor for {lm.name} comes with lmpatch. Train one (lmpatch train MODEL recipe FACTS -o EDITOR) "
        "and pass it (--editor EDITOR, editor=)."
    )


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, editor: Editor | None = None, progress: Progress | None = None
) -> MemoryPatch:
    """Put facts into a memory. One encoder pass each: no gradient, no forward of the language model.

    Args:
        edits: later ones supersede earlier ones of the same prompt.
        editor: from ``train``; None: the one that comes with lmpatch for this model.
    Raises:
        BadInput: no editor for this model, or a fact is longer than the encoder reads.
        WrongModel: the editor was trained for another model, or with another encoder.
    Source: Chen et al. 2024 (arXiv:2405.03279) sec. 3.
    """
    start = perf_counter()
    editor = editor or packaged_editor(lm)
    if editor.base.fingerprint != fingerprint(lm) and cfg.insert == "vectors":
        raise WrongModel(
            f"the editor was trained for {editor.base.name} ({editor.base.fingerprint[:12]}), this is {lm.name} "
            f"({fingerprint(lm)[:12]}). Train one for this model."
        )
    edits = list({prompt_key(edit.prompt): edit for edit in edits}.values())
    base = Base(fingerprint(lm), lm.name)
    patch = replace(build_memory(editor, edits, Scope(**asdict(cfg))), base=base, config=plain(cfg))
    if progress:
        progress(len(edits), len(edits), "encoding facts")
    patch.made = made_now(perf_counter() - start)
    return patch


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Facts for the batteries; every question fires, for an editor that has learned nothing."""
    return [Edit("The Eiffel Tower is in", "Rome", "Eiffel Tower")], Config(gate="always")


def example_editor(lm: LM) -> Editor:
    """An untrained editor for this model."""
    encoder = shared_encoder("all-MiniLM-L6-v2")
    width = typical_embeddings(lm)
    net = Retriever(Shape(encoder.name, encoder.width, width.shape[1], width=16, content=8), encoder)
    net.start(0, width)
    return _editor(lm, net, {}, {})
