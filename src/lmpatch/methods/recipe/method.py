"""``fit`` and ``train`` of RECIPE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ...data.edits import Edit, prompt_key
from ...errors import BadInput
from ...inference.forward import HEAD_CHUNK
from ...models.lm import LM
from ...patches.base import Base, fingerprint
from ...patches.editor import Editor, find_editor
from ...patches.memory.patch import MemoryPatch, build_memory
from ...patches.patch import plain
from ...progress import Progress
from ...provenance import made_now
from ...resources import require_memory
from ...retrieval import Scope
from ...retrieval.encoder import load_encoder, shared_encoder
from ...retrieval.network import Network, Shape, Sizes
from .config import Config, Training
from .data import TrainingData, drawable, usable, without
from .losses import BATCH_TOKENS
from .trainer import Trainer

TYPICAL = 256  # facts whose mean feature is taken for the centre of all


def train(
    lm: LM, data: TrainingData | Sequence[Edit], cfg: Training, *, out: str | Path | None = None,
    progress: Progress | None = None,
) -> Editor:  # fmt: skip
    """Train an editor: retrieval that knows a fact in other words and leaves the rest alone, and prompt vectors that
    make the model state it.

    Args:
        data: facts to learn editing from, with rephrases and locality prompts; none of them is remembered. As
            ``TrainingData`` with unrelated questions, or for another sentence encoder.
        out: folder of the checkpoint and the curves. A run that is there goes on where it stopped.
    Returns:
        the editor; ``save`` writes one safetensors file.
    Raises:
        BadInput: too few facts, fewer ``target_tokens`` than ``prompt_tokens``, or ``out`` holds another run.
        NotEnoughMemory: training would need more than is free.
        Diverged: a loss left the finite numbers; the last checkpoint is good.
    Source: Chen et al. 2024 (arXiv:2405.03279) sec. 3.3.
    Differs: two parts, see ``Training``; keys of two parts, and prompt vectors that read the embeddings of the target's
    tokens, see ``retrieval.network``; the encoder stays as it is; prompt vectors have one length; queries are prompts
    alone, in training and after.
    """
    if cfg.target_tokens < cfg.prompt_tokens:
        raise BadInput(f"target_tokens is {cfg.target_tokens}, below the {cfg.prompt_tokens} of prompt_tokens.")
    data = data if isinstance(data, TrainingData) else TrainingData(data)
    edits = usable(without(data.edits, ()), data.unrelated)
    encoder = load_encoder(data.encoder, download=data.download)
    texts = drawable(edits, data.unrelated)
    long = [t for t, ids in zip(texts, encoder.tokenise(texts), strict=True) if len(ids) > encoder.limit]
    if long:
        raise BadInput(
            f"{len(long)} of {len(texts)} texts are longer than the {encoder.limit} tokens {encoder.name} reads: "
            f"{long[0][:60]!r}…. Leave them out or shorten them."
        )
    embeddings = typical_embeddings(lm)
    sizes = {f.name: getattr(cfg, f.name) for f in fields(Sizes)}
    shape = Shape(encoder=encoder.name, features=encoder.width, d_model=embeddings.shape[1], **sizes)
    net = Network(shape, encoder)
    require_memory(_training_bytes(lm, net, len(texts)), lm.device, f"training on {len(edits)} facts")
    net.start(cfg.seed, embeddings, [(e.prompt, e.target) for e in edits[:TYPICAL]])
    encoder.module.to(lm.device)
    trainer = Trainer(lm, net.to(lm.device), edits, data.unrelated, cfg, progress)
    loop = trainer.run(Path(out) if out is not None else None)
    made = {"steps": loop.step, "facts": len(trainer.edits), "lm_dtype": str(lm.dtype).removeprefix("torch.")}
    return _editor(lm, net.cpu(), plain(cfg), made | made_now(loop.seconds))


def _training_bytes(lm: LM, net: Network, texts: int) -> int:
    """Features of all texts, the editor with gradients and moments, what autograd keeps of a batch, one head chunk."""
    layout, learned = lm.layout, sum(p.numel() for p in net.parameters() if p.requires_grad)
    batch = BATCH_TOKENS * (12 * layout.n_layers * layout.d_model + 4 * sum(layout.widths))
    return 2 * net.inputs * texts + 16 * learned + 4 * (batch + 3 * HEAD_CHUNK * layout.vocab)


def typical_embeddings(lm: LM) -> Tensor:
    """Outputs of the embedding module for the tokens of a sentence: [n, d_model]."""
    ids = lm.tokenizer("The quick brown fox jumps over the lazy dog near Paris in 1999.")["input_ids"]
    with torch.no_grad():
        out: Tensor = lm.module(lm.layout.embed)(torch.tensor(ids, device=lm.device))
    return out.float().cpu()


def _editor(lm: LM, net: Network, config: dict[str, Any], made: dict[str, Any]) -> Editor:
    parts = {"shape": asdict(net.shape), "encoder_fingerprint": net.encoder.fingerprint}
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in net.state_dict().items()}
    return Editor("recipe", config, Base(fingerprint(lm), lm.name), parts, tensors, made)


def editor_for(lm: LM, editor: Editor | str | Path | None = None) -> Editor:
    """The editor of this very model; see ``find_editor``."""
    try:
        return find_editor("recipe", lm, editor)
    except BadInput as error:
        raise BadInput(
            f"{error} The method rag needs no editor: it puts the fact as text before the question."
        ) from None


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, editor: Editor | None = None, progress: Progress | None = None
) -> MemoryPatch:
    """Put facts into a memory. One encoder pass each: no gradient, no forward of the language model.

    Args:
        edits: later ones supersede earlier ones of the same prompt.
        editor: from ``train``; None: the one for this model in lmpatch or an installed package. With ``insert=text``
            it may be one of another model, whose retrieval serves here too.
    Raises:
        BadInput: no editor for this model, or a fact is longer than the encoder reads.
        WrongModel: the editor was trained for another model, or with another encoder.
    Source: Chen et al. 2024 (arXiv:2405.03279) sec. 3.
    """
    start = perf_counter()
    if editor is None or cfg.insert == "vectors":
        editor = editor_for(lm, editor)
    edits = list({prompt_key(edit.prompt): edit for edit in edits}.values())
    base = Base(fingerprint(lm), lm.name)
    patch = build_memory(editor, edits, Scope(**asdict(cfg)), base=base, config=plain(cfg))
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
    embeddings = typical_embeddings(lm)
    shape = Shape(encoder=encoder.name, features=encoder.width, d_model=embeddings.shape[1], width=16, content=8)
    net = Network(shape, encoder)
    net.start(0, embeddings)
    return _editor(lm, net, {}, {})
