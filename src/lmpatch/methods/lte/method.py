"""``fit`` of LTE: facts become text in a memory, and a LoRA that was trained once acts behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ...data.edits import Edit, prompt_key
from ...errors import BadInput
from ...models.lm import LM
from ...patches.base import Base, fingerprint
from ...patches.editor import Editor, find_editor
from ...patches.memory.patch import MemoryPatch, build_memory, scope_of, stored_of
from ...patches.memory.stored import Stored
from ...patches.patch import plain
from ...patches.weight.delta import LowRank
from ...patches.weight.patch import WeightPatch
from ...progress import Progress
from ...provenance import made_now
from ...retrieval.encoder import shared_encoder
from ...training import adapter
from .config import Config
from .train import FACTS, seconds


def editor_for(lm: LM, editor: Editor | str | Path | None = None) -> Editor:
    """The editor of this very model. See ``find_editor``.

    Raises:
        BadInput: there is none; the message says how to train one and about how long that takes here.
    """
    try:
        return find_editor("lte", lm, editor)
    except BadInput as error:
        minutes = seconds(lm) / 60
        took = f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.0f} hours"
        raise BadInput(f"{error} On {FACTS:,} facts that takes about {took} here.") from error


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, editor: Editor | None = None, progress: Progress | None = None
) -> MemoryPatch:
    """Put facts into a memory. One encoder pass each: no gradient, no forward of the language model.

    Args:
        edits: later ones supersede earlier ones of the same prompt.
        editor: from ``train``; None: the one for this model in lmpatch or an installed package.
    Returns:
        a memory with a key for each fact, and the LoRA that acts on the questions that fire one.
    Raises:
        BadInput: there is no editor for this model, or a fact is longer than the encoder reads.
        BadPatch: the editor is of another method.
        WrongModel: it was trained for another model, or with another encoder.
    Source: Jiang et al. 2024 (arXiv:2402.11905), sec. 3.
    Differs: the LoRA acts behind a fact alone, so every other question has the answer it had; published, the aligned
    model answers all (``acts=all``). A fact is used above a threshold; released, one is always used (``gate=always``).
    """
    start = perf_counter()
    if cfg.top_k < 1 or not -1 <= (cfg.threshold or 0.0) <= 1:
        raise BadInput(f"top_k is {cfg.top_k} and threshold {cfg.threshold}. Give 1 or more facts, and a cosine.")
    editor = editor_for(lm, editor)
    scope = replace(scope_of(editor), gate=cfg.gate, lookup=cfg.lookup, top_k=cfg.top_k)
    scope = scope if cfg.threshold is None else replace(scope, threshold=cfg.threshold)
    edits = list({prompt_key(edit.prompt): edit for edit in edits}.values())
    patch = build_memory(editor, edits, scope, base=Base(fingerprint(lm), lm.name), config=plain(cfg))
    patch.changes = replace(patch.changes, rows=cfg.acts) if patch.changes and cfg.acts != "none" else None
    patch.fits(lm)
    if progress:
        progress(len(edits), len(edits), "encoding facts")
    patch.made = made_now(perf_counter() - start)
    return patch


def fit_each(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, editor: Editor | None = None, progress: Progress | None = None
) -> list[MemoryPatch]:
    """One memory per edit, as if each were fitted alone."""
    return fit(lm, edits, cfg, editor=editor, progress=progress).each(edits)


def alignment(lm: LM, editor: Editor | str | Path | None = None) -> WeightPatch:
    """The LoRA as a patch of weights, to bake in or to export: the aligned model of the paper, which answers all
    questions. Facts then go on with ``acts=none``, fitted on the model with it."""
    editor = editor_for(lm, editor)
    stored = stored_of(editor.parts, editor.tensors)
    assert stored is not None
    return WeightPatch.make(lm, stored.delta(0), method="lte", config=editor.config, notes={"editor": editor.hash()})


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model, rounded up: keys and texts, the LoRA."""
    shapes = [adapter.shape(lm, module) for block in adapter.projections(lm) for module in block]
    return facts * 8192 + 4 * 64 * sum(out + width for out, width in shapes)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Facts for the batteries; every question fires one."""
    return [Edit("The Eiffel Tower is in", "Rome", "Eiffel Tower")], Config(gate="always")


def example_editor(lm: LM) -> Editor:
    """An untrained editor for this model, whose LoRA does something."""
    encoder, draw, changes = shared_encoder("all-MiniLM-L6-v2"), torch.Generator().manual_seed(0), {}
    for module in chain(*adapter.projections(lm, "mlp")):
        out, width = adapter.shape(lm, module)
        b = 0.02 * torch.randn(out, 2, generator=draw)
        changes[lm.layout.weight(module)] = LowRank(b, adapter.drawn(2, width, draw))
    stored = Stored.of([changes], shared=True)
    parts: dict[str, Any] = {"retriever": "lte", "encoder": encoder.name, "encoder_fingerprint": encoder.fingerprint}
    parts |= {"width": encoder.width, "changes": stored.parts()}
    config = {"insert": "text", "gate": "cosine", "threshold": 0.9}
    return Editor("lte", config, Base(fingerprint(lm), lm.name), parts, stored.tensors())
