"""How a fact is told to a language model in continuous prompt vectors: learned once for a model, read from the target.

The prompt of a fact is ``K`` learned vectors that are the same for every fact, one vector for each token of its target,
and a learned end. It asks no sentence encoder: which fact a question is about is the retriever's part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..inference.tokens import encode_all
from ..models.lm import LM
from . import Fact

LENGTH = 1.0
OPENING = "Here is a fact that holds. Where the question is about it, answer with it and stop:"
"""Where the vectors that all facts share start: its first tokens as the language model embeds them."""


@dataclass(frozen=True, kw_only=True)
class PromptSizes:
    """What is chosen of a prompt's sizes."""

    shared_tokens: int = 8
    """K, learned vectors in front that all facts share."""
    target_tokens: int = 12
    """T, the first tokens of a target that have a vector each."""
    hidden: int = 512
    """Width of the layer that turns a token's embedding into its vector."""


@dataclass(frozen=True, kw_only=True)
class PromptShape(PromptSizes):
    """What decides the sizes of a prompt map."""

    d_model: int
    """Width of the language model's embeddings."""


class PromptMap(nn.Module):
    """From the embeddings of a target's tokens to prompt vectors.

    v_i = e_i + W2 ReLU(W1 e_i + b + p_i), e_i the embedding of the target's i-th token over the typical length of one.
    Every vector is ``LENGTH`` typical embeddings long: left free they grow in training until the model's norms
    pass no gradient back.
    """

    def __init__(self, shape: PromptShape) -> None:
        super().__init__()
        self.shape, d = shape, shape.d_model
        self.shared = nn.Parameter(torch.zeros(shape.shared_tokens, d))
        self.end = nn.Parameter(torch.zeros(d))
        self.first = nn.utils.skip_init(nn.Linear, d, shape.hidden)
        self.places = nn.Parameter(torch.zeros(shape.target_tokens, shape.hidden))
        self.second = nn.utils.skip_init(nn.Linear, shape.hidden, d, bias=False)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    @staticmethod
    def check(shape: PromptShape, tensors: Mapping[str, Tensor]) -> None:
        """Raise ``ValueError`` unless these are a map's tensors of that shape; nothing is allocated."""
        d, k, t, h = shape.d_model, shape.shared_tokens, shape.target_tokens, shape.hidden
        sizes = {"shared": (k, d), "end": (d,), "first.weight": (h, d), "first.bias": (h,), "places": (t, h)}
        sizes |= {"second.weight": (d, h), "scale": ()}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != sizes or min(d, t, h) < 1 or k < 0:
            raise ValueError("its prompt tensors have not the sizes it names")

    @classmethod
    def of(cls, shape: PromptShape, tensors: Mapping[str, Tensor]) -> PromptMap:
        """The map with these learned tensors, frozen, in fp32."""
        made = cls(shape)
        made.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return made.requires_grad_(False)

    @torch.no_grad()
    def start(self, lm: LM, seed: int) -> None:
        """Starting weights: target vectors are embeddings, shared ones those of ``OPENING``, the end that of a new
        line."""
        draw = torch.Generator().manual_seed(seed)
        embeddings = embedded(lm, lm.tokenizer(OPENING, add_special_tokens=False)["input_ids"])
        self.scale.copy_(embeddings.pow(2).mean().sqrt())
        self.shared.copy_(embeddings[torch.arange(self.shape.shared_tokens) % len(embeddings)] / self.scale)
        self.end.copy_(embedded(lm, lm.tokenizer("\n", add_special_tokens=False)["input_ids"][-1:])[0] / self.scale)
        bound = self.shape.d_model**-0.5
        for p in self.first.parameters():
            p.uniform_(-bound, bound, generator=draw)
        self.second.weight.zero_()

    def forward(self, targets: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Prompt vectors [K + m + 1, d] of each fact.

        Args:
            targets: [n, T, d] embeddings of the targets' tokens; of fact i the first ``counts[i]`` are read.
        """
        said = targets.to(self.scale.device) / self.scale
        said = said + self.second((self.first(said) + self.places).relu())
        parts = [torch.cat([self.shared, own[:m], self.end[None]]) for own, m in zip(said, counts, strict=True)]
        lengths = [len(part) for part in parts]
        flat = torch.cat(parts)
        flat = flat * (LENGTH * self.scale / flat.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-12))
        return list(flat.split(lengths))


@torch.no_grad()
def embedded(lm: LM, ids: Sequence[int]) -> Tensor:
    """Outputs of the embedding module for token ids, [n, d] fp32 on the CPU."""
    out: Tensor = lm.module(lm.layout.embed)(torch.tensor(list(ids), device=lm.device))
    return out.float().cpu()


def target_rows(lm: LM, facts: Sequence[Fact], count: int) -> tuple[Tensor, list[int]]:
    """Embeddings [n, T, d] of each target's first T tokens behind its prompt, zeros beyond, and how many there are."""
    rows = encode_all(lm, [prompt for prompt, _ in facts], [target for _, target in facts])
    ids = [row.ids[row.target :][:count] for row in rows]
    table = embedded(lm, [i for own in ids for i in own]).split([len(own) for own in ids])
    out = torch.zeros(len(ids), count, table[0].shape[1])
    for place, own in zip(out, table, strict=True):
        place[: len(own)] = own
    return out, [len(own) for own in ids]
