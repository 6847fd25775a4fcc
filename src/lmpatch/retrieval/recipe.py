"""RECIPE's retriever: a trained network with a learned gate, the knowledge sentinel; it inserts prompt vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..config import resolve
from ..errors import WrongModel
from ..inference.interventions import Insert
from ..inference.tokens import statement
from ..models.lm import LM
from . import Fact, Form, Scope
from .encoder import Encoder, same_encoder
from .network import Network, Shape, target_embeddings


@dataclass(eq=False)
class Recipe:
    """The network of an editor, in bf16 as the editor keeps it."""

    shape: Shape
    encoder_fingerprint: str
    editor_hash: str
    learned: dict[str, Tensor]

    name = "recipe"
    unit = False

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
        return {"shape": asdict(self.shape), **parts}

    def tensors(self) -> dict[str, Tensor]:
        """What the editor learned, bf16."""
        return self.learned

    def describe(self, form: Form) -> str:
        """What it inserts, and the encoder."""
        inserts = f"{self.shape.prompt_tokens} prompt vectors" if form == "vectors" else "the fact as text"
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
    def sentinel(self) -> Tensor:
        """[M] the key that stands for "no fact"."""
        return self.network.sentinel()

    def keys(self, facts: Sequence[Fact]) -> Tensor:
        """Keys [n, R] of facts; the encoder reads prompt and target."""
        return self.network.keys(facts)

    def queries(self, prompts: Sequence[str]) -> Tensor:
        """Queries [m, M] of questions: the prompt alone."""
        return self.network.queries(prompts)

    def gate(self, queries: Tensor) -> Tensor:
        """Inner products [m] fp64 of queries [m, M] with the sentinel."""
        return queries.double() @ self.sentinel.double()

    def insert(self, lm: LM, facts: Sequence[Fact], keys: Tensor, form: Form) -> list[Insert]:
        """P prompt vectors, from the fact's key [R] and the embeddings of its target; or the fact as a sentence."""
        if form == "text":
            return [Insert(text=f"{statement(*fact)} ") for fact in facts]
        targets = target_embeddings(lm, facts, self.shape.target_tokens)
        return [Insert(vectors=vectors) for vectors in self.network.prompts(keys, targets)]

    def check(self, lm: LM, scope: Scope) -> None:
        """Raise ``WrongModel`` if its prompt vectors are no embeddings of this model."""
        width = lm.parameter(lm.layout.weight(lm.layout.embed)).shape[1]
        if scope.insert == "vectors" and self.shape.d_model != width:
            raise WrongModel(f"prompt vectors of width {self.shape.d_model} do not fit {lm.name}.")


def load(parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Recipe:
    """The retriever a patch or an editor keeps; nothing is allocated for a shape that the tensors do not have."""
    shape, names = resolve(Shape, dict(parts["shape"])), (parts["encoder_fingerprint"], parts["editor_hash"])
    d, content, inputs = shape.d_model, shape.content, (3 + shape.pooler) * shape.features
    sizes: dict[str, tuple[int, ...]] = {"key.first.weight": (shape.matched, inputs), "turn.weight": (d, d)}
    sizes |= {"sentinel_embeddings": (shape.sentinel_tokens, shape.features), "mix.bias": (content,)}
    sizes |= {"out.bias": (shape.prompt_tokens * d,), "say.weight": (content, shape.target_tokens * d)}
    learned = {name: tensor for name, tensor in tensors.items() if name.startswith("learned.")}
    ranks = {tensor.shape[:1] for name, tensor in learned.items() if name.endswith("/lora_a")}
    adapted = bool(learned) == (shape.adapt != 0) and ranks == ({(shape.adapt,)} if shape.adapt else set())
    if not adapted or any(tensors[name].shape != size or 0 in size for name, size in sizes.items()):
        raise ValueError("its tensors have not the sizes it names")
    if not all(isinstance(name, str) for name in names):
        raise TypeError("its parts are not as lmpatch writes them")
    return Recipe(shape, *names, dict(tensors))
