"""RAG: facts are kept as text, and the one nearest to a question goes before it. No training, no editor, any model.

The baseline that RECIPE is compared with: what an off-the-shelf sentence encoder and the model's own reading achieve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

from ..data.edits import Edit, prompt_key
from ..models.lm import LM
from ..patches.base import Base, fingerprint
from ..patches.editor import Editor
from ..patches.memory.patch import MemoryPatch, build_memory
from ..patches.patch import plain
from ..progress import Progress
from ..provenance import made_now
from ..retrieval import Scope
from ..retrieval.encoder import PACKAGED, load_encoder, shared_encoder

AIM = "facts"
Record = Edit


@dataclass(frozen=True)
class Config:
    """When a fact is used."""

    gate: Literal["cosine", "always"] = "cosine"
    """A fact is used if it reaches a cosine, or always."""
    threshold: float = 0.75
    """Cosine of the question and a fact's prompt that ``gate=cosine`` asks for. Default: with the packaged encoder, on
    the facts of ``examples/facts.jsonl``, 62 % of the rewordings then find their fact, and 5 % of the questions about
    another subject find one."""
    lookup: Literal["last", "whole"] = "last"
    """What of a prompt is looked up: the last message of a chat, the last paragraph of a text and its last sentence
    alone, or the whole."""
    top_k: int = 1
    """Facts used at most."""


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, editor: Editor | None = None, progress: Progress | None = None
) -> MemoryPatch:
    """Put facts into a memory. One pass of the sentence encoder each: no gradient, no forward of the language model.

    Args:
        edits: later ones supersede earlier ones of the same prompt.
        editor: another sentence encoder, from ``editor_for``; None: the packaged MiniLM.
    Raises:
        BadInput: a fact is longer than the encoder reads.
        WrongModel: the encoder of that name is another one here.
    Source: Lewis et al. 2020 (arXiv:2005.11401).
    Differs: nothing is trained, and one short fact goes before the question as it is; a threshold keeps it away from
    questions that are about something else.
    """
    start = perf_counter()
    editor = editor or editor_for(lm)
    edits = list({prompt_key(edit.prompt): edit for edit in edits}.values())
    base = Base(fingerprint(lm), lm.name)
    patch = build_memory(editor, edits, Scope(**_scope(cfg)), base=base, config=plain(cfg))
    if progress:
        progress(len(edits), len(edits), "encoding facts")
    patch.made = made_now(perf_counter() - start)
    return patch


def editor_for(lm: LM, encoder: str = "all-MiniLM-L6-v2", *, download: bool = False) -> Editor:
    """An editor that has learned nothing: it names the sentence encoder. A memory on disk is made with it.

    Args:
        encoder: the packaged one, a folder or a hub id, see ``retrieval.encoder.load_encoder``.
        download: a hub id that is not in the local cache may be fetched.
    Raises:
        MissingExtra: the packaged encoder is not installed.
        BadInput: nothing can be loaded from there.
    """
    sentence = shared_encoder(encoder) if encoder in PACKAGED else load_encoder(encoder, download=download)
    parts: dict[str, Any] = {"retriever": "cosine", "encoder": encoder}
    parts |= {"encoder_fingerprint": sentence.fingerprint, "width": sentence.width}
    return Editor("rag", _scope(Config()), Base(fingerprint(lm), lm.name), parts, {})


def _scope(cfg: Config) -> dict[str, Any]:
    return {**plain(cfg), "insert": "text"}


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Facts for the batteries; every question is answered behind one."""
    return [Edit("The Eiffel Tower is in", "Rome", "Eiffel Tower")], Config(gate="always")
