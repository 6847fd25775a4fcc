"""RECIPE's retriever: a trained network with a learned gate, the knowledge sentinel; it inserts vectors, text or both.

The network asks no language model. Prompt vectors come from the map that a model has beside it (``prompts.PromptMap``);
in the published form and in that of the first release, from the network itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..config import resolve
from ..errors import BadInput, WrongModel
from ..inference.interventions import Insert
from ..inference.tokens import premise
from ..models.lm import LM
from . import Fact, Form, Scope
from .encoder import Encoder, same_encoder
from .network import Network, Shape, target_embeddings
from .prompts import PromptMap, PromptShape, target_rows

OLD = {"asked": False, "verifier": 0}  # of shapes that do not say it: those of the first release
PREFIX = "prompt."  # of the prompt map's tensors
KEPT = 4096
"""Texts whose features are kept."""


@dataclass(eq=False)
class Recipe:
    """The network of an editor and the prompt map of a model, in bf16 as the editor keeps them."""

    shape: Shape
    encoder_fingerprint: str
    editor_hash: str
    learned: dict[str, Tensor]
    prompt_shape: PromptShape | None = None
    """None: there is no prompt map."""
    prompt_learned: dict[str, Tensor] = field(default_factory=dict)
    _known: OrderedDict[str, Tensor] = field(default_factory=OrderedDict, init=False, repr=False)  # text -> features
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    name = "recipe"
    unit = False
    rivals = 0

    @property
    def width(self) -> int:
        return self.shape.width

    @property
    def matched(self) -> int:
        return self.shape.matched

    @property
    def scale(self) -> float:
        return float(self.shape.matched**0.5)

    def parts(self) -> dict[str, Any]:
        """What is not a tensor, as JSON."""
        parts = {"encoder_fingerprint": self.encoder_fingerprint, "editor_hash": self.editor_hash}
        prompt = {"prompt": asdict(self.prompt_shape)} if self.prompt_shape else {}
        return {"shape": asdict(self.shape), **prompt, **parts}

    def tensors(self) -> dict[str, Tensor]:
        """What the editor learned, bf16."""
        return {**self.learned, **{f"{PREFIX}{name}": tensor for name, tensor in self.prompt_learned.items()}}

    def describe(self, form: Form) -> str:
        """What it inserts, and the encoder."""
        vectors = f"{self.shape.prompt_tokens} prompt vectors" if self.shape.d_model else "prompt vectors"
        inserts = {"vectors": vectors, "both": f"{vectors} and the fact as text"}.get(form, "the fact as text")
        return f"inserts {inserts}; queries by {self.shape.encoder}"

    @property
    def encoder(self) -> Encoder:
        """The sentence encoder it was trained with."""
        return same_encoder(self.shape.encoder, self.encoder_fingerprint)

    @cached_property
    def network(self) -> Network:
        """The network in fp32, without gradients."""
        return Network.of(self.shape, self.encoder, self.learned)

    @cached_property
    def prompt_map(self) -> PromptMap | None:
        """The prompt map in fp32, without gradients."""
        return PromptMap.of(self.prompt_shape, self.prompt_learned) if self.prompt_shape else None

    @cached_property
    def sentinel(self) -> Tensor:
        """[M] the key that stands for "no fact"."""
        return self.network.sentinel()

    def keys(self, facts: Sequence[Fact]) -> Tensor:
        """Keys [n, R] of facts; the encoder reads prompt and target."""
        return self.network.keys(facts)

    def queries(self, prompts: Sequence[str]) -> Tensor:
        """Queries [m, M] of questions: the prompt alone."""
        return self.network.queries_of(self._features(prompts))

    @property
    def verifies(self) -> bool:
        """It has a verifier."""
        return self.shape.verifier > 0

    def verify(self, facts: Sequence[Fact], prompts: Sequence[str]) -> Tensor:
        """Chances [n, 3] of ``verifier.KINDS`` for pairs of a fact and a question; ``BadInput``: it has no verifier."""
        told = [prompt for prompt, _ in facts]
        features = self._features([*told, *prompts])
        return self.network.verify(features[: len(told)], features[len(told) :]).exp()

    def _features(self, texts: Sequence[str]) -> Tensor:
        """Features [n, F] of texts, those of the last ``KEPT`` from memory."""
        with self._lock:
            known = {text: self._known[text] for text in texts if text in self._known}
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(new, self.network.features(new), strict=True) if new else ())
        with self._lock:
            for text, features in known.items():
                self._known[text] = features
                self._known.move_to_end(text)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return torch.stack([known[text] for text in texts])

    def gate(self, queries: Tensor) -> Tensor:
        """Inner products [m] fp64 of queries [m, M] with the sentinel."""
        return queries.double() @ self.sentinel.double()

    def rank(self, query: Tensor, keys: Tensor) -> tuple[Tensor, bool]:
        """Raise ``BadInput``: it compares once; its verifier looks at one fact at a time."""
        raise BadInput("RECIPE's retriever ranks facts once.")

    def insert(self, lm: LM, facts: Sequence[Fact], keys: Tensor, form: Form) -> list[Insert]:
        """Prompt vectors, the fact as a sentence, or both; of published and old editors the vectors read the keys."""
        texts = ["" if form == "vectors" else premise(*fact) for fact in facts]
        vectors = [None] * len(texts) if form == "text" else self._vectors(lm, facts, keys)
        return [Insert(text, own) for text, own in zip(texts, vectors, strict=True)]

    def _vectors(self, lm: LM, facts: Sequence[Fact], keys: Tensor) -> list[Tensor]:
        if self.prompt_map is not None:
            rows, counts = target_rows(lm, facts, self.prompt_map.shape.target_tokens)
            return self.prompt_map.forward(rows, counts)
        count = self.shape.target_tokens
        return list(self.network.prompts(keys, target_embeddings(lm, facts, count) if count else None))

    def check(self, lm: LM, scope: Scope) -> None:
        """Raise ``BadInput`` or ``WrongModel`` if it has no prompt vectors to insert, or none for this model."""
        width = self.prompt_shape.d_model if self.prompt_shape else self.shape.d_model
        if scope.insert == "text" or width == lm.parameter(lm.layout.weight(lm.layout.embed)).shape[1]:
            return
        if not width:
            raise BadInput(f"this editor has no prompt vectors for {lm.name}. Use insert='text', or train some.")
        raise WrongModel(f"prompt vectors of width {width} do not fit {lm.name}.")


def load(parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Recipe:
    """The retriever a patch or an editor keeps; nothing is allocated for a shape that the tensors do not have."""
    shape, names = resolve(Shape, OLD | parts["shape"]), (parts["encoder_fingerprint"], parts["editor_hash"])
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
    prompt = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    d, told, inputs = shape.d_model, shape.content or shape.width, (3 + shape.pooler) * shape.features
    sizes: dict[str, tuple[int, ...]] = {"key.first.weight": (shape.matched, inputs)}
    sizes |= {"sentinel_embeddings": (shape.sentinel_tokens, shape.features)}
    if shape.verifier:
        sizes |= {"verifier.first.weight": (shape.verifier, 2 * inputs)}
    if d:
        sizes |= {"mix.bias": (told,), "out.bias": (shape.prompt_tokens * d,)}
    if shape.target_tokens:
        sizes |= {"turn.weight": (d, d), "say.weight": (told, shape.target_tokens * d)}
    learned = {name: tensor for name, tensor in own.items() if name.startswith("learned.")}
    ranks = {tensor.shape[:1] for name, tensor in learned.items() if name.endswith("/lora_a")}
    adapted = bool(learned) == (shape.adapt != 0) and ranks == ({(shape.adapt,)} if shape.adapt else set())
    if not d and (shape.content or shape.prompt_tokens or shape.target_tokens):
        raise ValueError("it names prompt vectors of no width")
    if not adapted or any(own[name].shape != size or 0 in size for name, size in sizes.items()):
        raise ValueError("its tensors have not the sizes it names")
    if not all(isinstance(name, str) for name in names):
        raise TypeError("its parts are not as lmpatch writes them")
    prompt_shape = resolve(PromptShape, dict(parts["prompt"])) if "prompt" in parts else None
    if prompt_shape is None and prompt:
        raise ValueError("it holds tensors of prompts without their shape")
    if prompt_shape is not None:
        PromptMap.check(prompt_shape, prompt)
    return Recipe(shape, *names, own, prompt_shape, prompt)
