"""RECIPE's network: facts become keys, questions become queries, keys become prompt vectors.

It holds what an editor has learned. Training calls it with gradients, ``retrieval.recipe`` without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import BadPatch
from ..inference.tokens import batches_of_rows, encode_all, join
from ..models.lm import LM
from . import Fact
from .encoder import Encoder, pooled

SLASHED = "encoder/"
LENGTH = 3.0  # of a prompt vector, in typical embeddings
BATCH = 64  # texts of one encoder forward
LORA = ("/lora_a", "/lora_b")
FACTS = (("The capital of France is", "Paris"), ("Hamlet was written by", "Shakespeare"), ("Water boils at", "100 °C"))
GAIN = 1.7  # of keys and queries at the start: a match then scores about ten above the rest
NOTHING = "This is something that nobody has said anything about so far, and nobody asks."
"""Where the sentinel starts: its first tokens as the encoder embeds them."""


@dataclass(frozen=True)
class Shape:
    """What decides the sizes of the network."""

    encoder: str
    """Name of the sentence encoder."""
    features: int
    """Width of one encoder state."""
    d_model: int
    """Width of the language model's embeddings."""
    width: int = 1024
    """R, the width of keys."""
    content: int = 512
    """The last components of a key, which no question is compared with: prompt vectors are made of them."""
    prompt_tokens: int = 6
    """P, the continuous prompt vectors of one fact."""
    target_tokens: int = 6
    """T, the first tokens of a target that prompt vectors are made of too; at least P."""
    sentinel_tokens: int = 10
    """Learned input embeddings behind the knowledge sentinel."""
    adapt: int | None = 0
    """Rank of the encoder's adaptation; 0: it stays as it is; None: all its weights are learned."""
    pooler: bool = False
    """Features also hold the output of the encoder's own pooling layer, as in the released code."""

    @property
    def matched(self) -> int:
        """M, the width of queries: the components of a key that questions are compared with."""
        return self.width - self.content


class Head(nn.Module):
    """y = W1 x + b1, r = ReLU(W2 y + b2) + y."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.first, self.second = _linear(features, width), _linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.second(y).relu() + y
        return out


class Network(nn.Module):
    """Encoder, heads, sentinel and prompt map. The encoder itself is shared and never written.

    Source: Chen et al. 2024 (arXiv:2405.03279) sec. 3.
    Differs: a key has two parts. Questions are compared with the first; prompt vectors are made of the second. As one,
    each pulled the other away from what it was for. And prompt vectors are made of the embeddings of the target's
    tokens too, those of the language model: no sentence encoder tells every name from its neighbours.
    """

    def __init__(self, shape: Shape, encoder: Encoder) -> None:
        super().__init__()
        self.shape = shape
        self._encoder = [encoder]  # in a list: its weights are not parameters of this module
        self.inputs = inputs = (3 + shape.pooler) * shape.features
        self.key, self.query = Head(inputs, shape.matched), Head(inputs, shape.matched)
        self.content = Head(inputs, shape.content)
        # say, mix, out, turn: how prompt vectors are made; editor files know them by these names
        self.say = _linear(shape.target_tokens * shape.d_model, shape.content, bias=False)
        self.mix = _linear(shape.content, shape.content)
        self.out = _linear(shape.content, shape.prompt_tokens * shape.d_model)
        self.turn = _linear(shape.d_model, shape.d_model, bias=False)
        self.sentinel_embeddings = nn.Parameter(torch.zeros(shape.sentinel_tokens, shape.features))
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.centre = nn.Parameter(torch.zeros(inputs), requires_grad=False)
        self.spread = nn.Parameter(torch.ones(inputs), requires_grad=False)
        self.learned = nn.ParameterDict()
        if shape.adapt is None:
            for name, p in encoder.module.named_parameters():
                if shape.pooler or "pooler" not in name:
                    self.learned[_safe(name)] = nn.Parameter(p.detach().clone())
        elif shape.adapt:
            for name, (out, width) in encoder.linears().items():
                self.learned[_safe(name) + LORA[0]] = nn.Parameter(torch.empty(shape.adapt, width))
                self.learned[_safe(name) + LORA[1]] = nn.Parameter(torch.zeros(out, shape.adapt))

    @property
    def encoder(self) -> Encoder:
        """The sentence encoder as it was loaded."""
        return self._encoder[0]

    def start(self, seed: int, embeddings: Tensor, facts: Sequence[Fact] = FACTS) -> None:
        """Draw the starting weights. Both heads start as the same map, so a question scores highest with the fact that
        the encoder finds most alike.

        Args:
            embeddings: [n, d_model] typical outputs of the language model's embedding module.
            facts: typical ones; features are measured in their mean and spread.
        """
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            heads = (self.key.first, self.key.second, self.content.first, self.content.second)
            for module in (*heads, self.say, self.mix, self.out):
                bound = module.in_features**-0.5
                for p in module.parameters():
                    p.uniform_(-bound, bound, generator=draw)
            for name, p in self.learned.items():
                if name.endswith(LORA[0]):
                    p.normal_(0, p.shape[1] ** -0.5, generator=draw)
            self.turn.weight.copy_(torch.eye(self.shape.d_model))
            self.key.first.weight.mul_(GAIN)
            self.query.load_state_dict(self.key.state_dict())
            features = self.features([join(*fact) for fact in facts] + [prompt for prompt, _ in facts])
            variance = features.var(0)
            self.centre.copy_(features.mean(0))
            self.spread.copy_((variance + variance.mean()).sqrt())  # the second term keeps a rare feature from towering
            start = self.encoder.embedded(NOTHING)
            self.sentinel_embeddings.copy_(start[torch.arange(self.shape.sentinel_tokens) % len(start)])
            self.scale.fill_(embeddings.float().pow(2).mean().sqrt())

    def encoder_weights(self) -> dict[str, Tensor]:
        """Parameter name of the encoder -> its adapted value."""
        own = dict(self.encoder.module.named_parameters())
        weights: dict[str, Tensor] = {}
        for key, value in self.learned.items():
            if key.endswith(LORA[0]):
                name = _dotted(key.removesuffix(LORA[0]))
                weights[name] = own[name] + self.learned[key.removesuffix(LORA[0]) + LORA[1]] @ value
            elif not key.endswith(LORA[1]):
                weights[_dotted(key)] = value
        return weights

    def features(self, texts: Sequence[str], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Features [n, F] of texts; F is 3 w, with the pooler 4 w. Texts run in batches of near lengths, so little is
        padded.

        Args:
            weights: of the encoder; None: its adapted ones. A caller that asks often passes them in.
        """
        weights = self.encoder_weights() if weights is None else weights
        rows = self.encoder.tokenise(texts)
        parts = batches_of_rows([len(row) for row in rows], BATCH)
        batches = [self._pooled(*self.encoder.states([rows[i] for i in part], weights), weights) for part in parts]
        order = torch.tensor([i for part in parts for i in part])
        return torch.cat(batches)[order.argsort().to(batches[0].device)]

    def keys(self, facts: Sequence[Fact], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Keys [n, R] of facts."""
        return self.keys_of(self.features([join(*fact) for fact in facts], weights))

    def queries(self, prompts: Sequence[str], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Queries [n, M] of questions: the prompt alone."""
        return self.queries_of(self.features(prompts, weights))

    def keys_of(self, features: Tensor) -> Tensor:
        """Keys [n, R] of the features of facts: what questions are compared with [n, M], then the content."""
        return torch.cat([self.matched_of(features), self.content_of(features)], -1)

    def matched_of(self, features: Tensor) -> Tensor:
        """The first part of keys, [n, M]."""
        out: Tensor = self.key(self._standard(features))
        return out

    def content_of(self, features: Tensor) -> Tensor:
        """The second part of keys, [n, R - M]."""
        out: Tensor = self.content(self._standard(features))
        return out

    def queries_of(self, features: Tensor) -> Tensor:
        """Queries [n, M] of the features of questions."""
        out: Tensor = self.query(self._standard(features))
        return out

    def sentinel(self, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """r_Θ [M]: the key that stands for "no fact"."""
        weights = self.encoder_weights() if weights is None else weights
        states = self.encoder.stack(self.sentinel_embeddings, weights)
        mask = torch.ones(states.shape[:2], device=states.device)
        return self.matched_of(self._pooled(states, mask, weights))[0]

    def _pooled(self, states: Tensor, mask: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        out = pooled(states, mask)
        return torch.cat([self.encoder.pooler(states, weights), out], -1) if self.shape.pooler else out

    def _standard(self, features: Tensor) -> Tensor:
        """Features in their own mean and spread: a large common part would make every step of Adam move all alike."""
        return (features - self.centre) / self.spread

    def prompts(self, keys: Tensor, targets: Tensor) -> Tensor:
        """Prompt vectors [n, P, d_model] of keys [n, R]; ``targets`` as for ``prompts_of``."""
        return self.prompts_of(keys[:, self.shape.matched :], targets)

    def prompts_of(self, content: Tensor, targets: Tensor) -> Tensor:
        """Prompt vectors [n, P, d_model], each ``LENGTH`` times as long as a typical embedding.

        Left free, they grew to fifty times that in training, where the model's norms pass no gradient back.

        Args:
            content: [n, R - M] the second part of keys.
            targets: [n, T, d_model] embeddings of the targets' tokens, see ``target_embeddings``.
        """
        targets = targets / self.scale
        content = nn.functional.layer_norm(content, content.shape[-1:])  # else steps of Adam grow with the keys
        content = content + self.say(targets.flatten(1))
        mixed = self.mix(content).relu() + content
        vectors = self.out(mixed).float().reshape(len(content), self.shape.prompt_tokens, self.shape.d_model)
        vectors = vectors + self.turn(targets[:, : self.shape.prompt_tokens])
        scaled: Tensor = vectors * (LENGTH * self.scale / vectors.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-12))
        return scaled

    def tensors(self) -> dict[str, Tensor]:
        """Everything it has learned, bf16, by name."""
        return {name: p.detach().to(torch.bfloat16).contiguous() for name, p in self.state_dict().items()}

    @classmethod
    def of(cls, shape: Shape, encoder: Encoder, tensors: Mapping[str, Tensor]) -> Network:
        """The network with these learned tensors, frozen, in fp32.

        Raises:
            BadPatch: they do not fit the shape or the encoder.
        """
        network = cls(shape, encoder)
        own = {name: p.shape for name, p in network.state_dict().items()}
        given = {name: t.shape for name, t in tensors.items()}
        if own != given:
            wrong = sorted(name for name in {*own, *given} if own.get(name) != given.get(name))
            raise BadPatch(f"the editor's tensors do not fit {encoder.name}: {', '.join(wrong[:3])}.")
        network.load_state_dict({name: t.float() for name, t in tensors.items()})
        return network.requires_grad_(False)


@torch.no_grad()
def target_embeddings(lm: LM, facts: Sequence[Fact], count: int) -> Tensor:
    """Embeddings [n, count, d_model] fp32 of each target's first tokens behind its prompt; the last one repeats."""
    rows = encode_all(lm, [prompt for prompt, _ in facts], [target for _, target in facts])
    targets = [row.ids[row.target :][:count] for row in rows]
    ids = torch.tensor([[*own, *[own[-1]] * (count - len(own))] for own in targets], device=lm.device)
    out: Tensor = lm.module(lm.layout.embed)(ids)
    return out.float()


def _linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """Without starting weights, which would be drawn from the global random state."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    return layer


def _safe(name: str) -> str:
    """A parameter name without dots, which torch takes for nesting."""
    return SLASHED + name.replace(".", "/")


def _dotted(key: str) -> str:
    return key.removeprefix(SLASHED).replace("/", ".")
