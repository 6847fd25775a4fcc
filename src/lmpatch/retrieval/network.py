"""RECIPE's network: facts become keys, questions become queries, keys become prompt vectors.

It holds what an editor has learned. Training calls it with gradients, ``retrieval.recipe`` without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import BadInput, BadPatch
from ..inference.tokens import encode_all, join
from ..models.lm import LM
from . import Fact
from .encoder import Encoder, pooled
from .verifier import Verifier

LENGTH = 3.0  # of a prompt vector, in typical embeddings
FACTS = (("The capital of France is", "Paris"), ("Hamlet was written by", "Shakespeare"), ("Water boils at", "100 °C"))
GAIN = 1.7  # of keys and queries at the start: a match then scores about ten above the rest
NOTHING = "This is something that nobody has said anything about so far, and nobody asks."
"""Where the sentinel starts: its first tokens as the encoder embeds them."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is chosen of the retrieval's sizes. Published: Chen et al. 2024 (arXiv:2405.03279)."""

    width: int = 512
    """R, the width of keys. Published: 4096."""
    sentinel_tokens: int = 10
    """Learned input embeddings of the sentinel."""
    adapt: int | None = 0
    """Rank of the encoder's adaptation; 0: none, and features of a text are computed once; none: all its weights are
    trained, as published."""
    pooler: bool = False
    """Features also hold what the encoder's own pooling layer says. Published: no; released code: yes."""
    asked: bool = True
    """A key is made of the fact's prompt alone too, as a question would be, and not only of prompt and target.
    Published: no."""


@dataclass(frozen=True, kw_only=True)
class Shape(Sizes):
    """What decides the sizes of the network. A network with ``d_model`` makes prompt vectors of its keys: the published
    one of whole keys, that of the first release of a part of them and of the target's embeddings."""

    encoder: str
    """Name of the sentence encoder."""
    features: int
    """Width of one encoder state."""
    d_model: int = 0
    """Width of the language model's embeddings; 0: keys are for retrieval alone, see ``retrieval.prompts``."""
    content: int = 0
    """How many components of a key hold what is to be said and are compared with no query. Published: 0."""
    prompt_tokens: int = 0
    """P, prompt vectors of one fact. Published: 3."""
    verifier: int = 0
    """Width of the verifier's layer; 0: there is none. Published: 0."""
    target_tokens: int = 0
    """T, the first tokens of a target whose embeddings in the language model prompt vectors are made of too; at least
    P. Published: 0."""

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
    """Heads, sentinel and prompt map, and how the encoder is adapted. The encoder itself is shared and never written.

    Source: Chen et al. 2024 (arXiv:2405.03279) sec. 3.
    """

    def __init__(self, shape: Shape, encoder: Encoder) -> None:
        super().__init__()
        self.shape = shape
        self._encoder = [encoder]  # in a list: its weights are not parameters of this module
        self._fixed: Encoder | None = None  # the adapted one, once nothing learns
        self.inputs = inputs = (3 + shape.pooler) * shape.features
        self.key, self.query = Head(inputs, shape.matched), Head(inputs, shape.matched)
        told = shape.content or shape.width  # components that prompt vectors are made of
        # content, say, mix, out, turn: how prompt vectors are made; editor files know them by these names
        if shape.content:
            self.content = Head(inputs, shape.content)
        if shape.target_tokens:
            self.say = _linear(shape.target_tokens * shape.d_model, told, bias=False)
            self.turn = _linear(shape.d_model, shape.d_model, bias=False)
        if shape.d_model:
            self.mix, self.out = _linear(told, told), _linear(told, shape.prompt_tokens * shape.d_model)
            self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.sentinel_embeddings = nn.Parameter(torch.zeros(shape.sentinel_tokens, shape.features))
        self.centre = nn.Parameter(torch.zeros(inputs), requires_grad=False)
        self.spread = nn.Parameter(torch.ones(inputs), requires_grad=False)
        self.verifier = Verifier(inputs, shape.verifier) if shape.verifier else None
        self.learned = nn.ParameterDict()  # slashes in its names: torch takes dots for nesting
        if shape.adapt is None:
            for name, p in encoder.module.named_parameters():
                if shape.pooler or "pooler" not in name:
                    self.learned[f"encoder/{name.replace('.', '/')}"] = nn.Parameter(p.detach().clone())
        elif shape.adapt:
            for name, layer in encoder.module.named_modules():
                if isinstance(layer, nn.Linear) and "pooler" not in name:
                    place = f"encoder/{name.replace('.', '/')}/weight"
                    self.learned[f"{place}/lora_a"] = nn.Parameter(torch.empty(shape.adapt, layer.in_features))
                    self.learned[f"{place}/lora_b"] = nn.Parameter(torch.zeros(layer.out_features, shape.adapt))

    @classmethod
    def of(cls, shape: Shape, encoder: Encoder, tensors: Mapping[str, Tensor]) -> Network:
        """The network with these learned tensors, frozen, in fp32.

        Raises:
            BadPatch: they do not fit the shape or the encoder.
        """
        if shape.features != encoder.width:
            raise BadPatch(f"its network reads states of width {shape.features}; {encoder.name} has {encoder.width}.")
        network = cls(shape, encoder)
        own, given = ({name: t.shape for name, t in part.items()} for part in (network.state_dict(), tensors))
        if wrong := sorted(name for name in {*own, *given} if own.get(name) != given.get(name)):
            raise BadPatch(f"the editor's tensors do not fit {encoder.name}: {', '.join(wrong[:3])}.")
        network.load_state_dict({name: t.float() for name, t in tensors.items()})
        network.requires_grad_(False)
        network._fixed = network.adapted()
        return network

    @property
    def encoder(self) -> Encoder:
        """The sentence encoder as it was loaded."""
        return self._encoder[0]

    @torch.no_grad()
    def start(self, seed: int, facts: Sequence[Fact] = FACTS, embeddings: Tensor | None = None) -> None:
        """Draw the starting weights. Both heads start as the same map, so a question scores highest with the fact that
        the encoder finds most alike. Typical are the facts, features are measured in their mean and spread, and the
        ``embeddings`` [n, d_model], outputs of the language model's embedding module: prompt vectors start as long."""
        draw = torch.Generator().manual_seed(seed)
        drawn = ("key.", "query.", "content.", "say", "mix", "out")
        for module in (m for name, m in self.named_modules() if isinstance(m, nn.Linear) and name.startswith(drawn)):
            bound = module.in_features**-0.5
            for p in module.parameters():
                p.uniform_(-bound, bound, generator=draw)
        for name, p in self.learned.items():
            if name.endswith("/lora_a"):
                p.normal_(0, p.shape[1] ** -0.5, generator=draw)
        if self.verifier is not None:
            self.verifier.start(draw)
        self.key.first.weight.mul_(GAIN)
        self.query.load_state_dict(self.key.state_dict())
        features = self.features([join(*fact) for fact in facts] + [prompt for prompt, _ in facts])
        variance = features.var(0)
        self.centre.copy_(features.mean(0))
        self.spread.copy_((variance + variance.mean()).sqrt())  # the second term keeps a rare feature from towering
        start = self.encoder.embedded(NOTHING)
        self.sentinel_embeddings.copy_(start[torch.arange(self.shape.sentinel_tokens) % len(start)])
        if embeddings is not None:
            self.scale.fill_(embeddings.float().pow(2).mean().sqrt())
            made = self.prompts(self.keys(facts))
            self.out.weight.mul_(self.scale / made.pow(2).mean().sqrt())

    def adapted(self) -> Encoder:
        """The encoder with what was learned of it."""
        if self._fixed is not None:
            return self._fixed
        own, weights = dict(self.encoder.module.named_parameters()), {}
        for key, value in self.learned.items():
            name, _, factor = key.removeprefix("encoder/").replace("/", ".").partition(".lora_")
            if factor == "a":
                weights[name] = own[name] + self.learned[f"{key[:-1]}b"] @ value
            elif not factor:
                weights[name] = value
        return replace(self.encoder, weights=weights)

    def features(self, texts: Sequence[str]) -> Tensor:
        """Features [n, F] of texts; F is 3 w, with the pooler 4 w."""
        encoder = self.adapted()
        return encoder.encode(texts, lambda states, mask: self._pooled(encoder, states, mask))

    def _pooled(self, encoder: Encoder, states: Tensor, mask: Tensor) -> Tensor:
        out = pooled(states, mask)
        return torch.cat([encoder.pooler(states), out], -1) if self.shape.pooler else out

    def keys(self, facts: Sequence[Fact]) -> Tensor:
        """Keys [n, R] of facts: what questions are compared with [n, M], then the content."""
        features = self.of_facts(facts, self.features)
        matched = self.matched_of(features)
        return torch.cat([matched, self.content(self._standard(features))], -1) if self.shape.content else matched

    def of_facts(self, facts: Sequence[Fact], features: Callable[[Sequence[str]], Tensor]) -> Tensor:
        """What keys are made of, [n, F], given how texts become features."""
        told = features([join(*fact) for fact in facts])
        return (told + features([prompt for prompt, _ in facts])) / 2 if self.shape.asked else told

    def queries(self, prompts: Sequence[str]) -> Tensor:
        """Queries [n, M] of questions: the prompt alone."""
        return self.queries_of(self.features(prompts))

    def matched_of(self, features: Tensor) -> Tensor:
        """The first part of keys, [n, M]."""
        out: Tensor = self.key(self._standard(features))
        return out

    def queries_of(self, features: Tensor) -> Tensor:
        """Queries [n, M] of the features of questions."""
        out: Tensor = self.query(self._standard(features))
        return out

    def verify(self, facts: Tensor, questions: Tensor) -> Tensor:
        """``Verifier`` over features [n, F] of the prompts of facts and of questions. ``BadInput``: there is none."""
        if self.verifier is None:
            raise BadInput("this editor has no verifier. Use doubt=1, or train one with verifier_steps.")
        out: Tensor = self.verifier(self._standard(facts), self._standard(questions))
        return out

    def _standard(self, features: Tensor) -> Tensor:
        """Features in their own mean and spread: a large common part would make every step of Adam move all alike."""
        return (features - self.centre) / self.spread

    def sentinel(self) -> Tensor:
        """r_Θ [M]: the key that stands for "no fact"."""
        encoder = self.adapted()
        states = encoder.stack(self.sentinel_embeddings)
        return self.matched_of(self._pooled(encoder, states, torch.ones(states.shape[:2], device=states.device)))[0]

    def prompts(self, keys: Tensor, targets: Tensor | None = None) -> Tensor:
        """Prompt vectors [n, P, d_model] of whole keys [n, R] and ``target_embeddings`` [n, T, d_model].

        Published: a layer of the key and a linear map. With a content of its own they are made of that and of the
        target, each ``LENGTH`` times as long as a typical embedding.
        """
        shape = self.shape
        told = nn.functional.layer_norm(keys[:, shape.matched :], (shape.content,)) if shape.content else keys
        if targets is not None:
            targets = targets / self.scale
            told = told + self.say(targets.flatten(1))
        mixed = self.mix(told).relu() + told
        vectors: Tensor = self.out(mixed).float().reshape(len(keys), shape.prompt_tokens, shape.d_model)
        if targets is not None:
            vectors = vectors + self.turn(targets[:, : shape.prompt_tokens])
        if shape.content:
            vectors = vectors * (LENGTH * self.scale / vectors.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-12))
        return vectors


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
