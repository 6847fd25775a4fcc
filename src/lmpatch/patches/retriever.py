"""The network behind retrieved prompts: texts become keys, questions become queries, keys become prompt vectors.

It holds what an editor has learned. Training calls it with gradients, a memory patch without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import BadPatch
from ..models.encoder import Encoder, pooled

SLASHED = "encoder/"
BATCH = 64  # texts of one encoder forward
LORA = ("/lora_a", "/lora_b")
TEXTS = ("The capital of France is Paris.", "Who wrote Hamlet?", "Water boils at 100 degrees.")
GAIN = 1.7  # of keys and queries at the start: a match then scores about ten above the rest
NOTHING = "This is something that nobody has said anything about so far, and nobody asks."
"""Where the sentinel starts: its first tokens as the encoder embeds them."""
APART = 3
"""At the start, queries leave out one in so many components of a key, which are free for what is to be said."""


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
    """R, the width of keys and queries."""
    prompt_tokens: int = 3
    """P, the continuous prompt vectors of one fact."""
    sentinel_tokens: int = 10
    """Learned input embeddings behind the knowledge sentinel."""
    adapt: int | None = None
    """Rank of the encoder's adaptation; 0: it stays as it is; None: all its weights are learned."""
    pooler: bool = False
    """Features also hold what the encoder's own pooling layer says, as released code has it."""


class Head(nn.Module):
    """y = W1 x + b1, r = ReLU(W2 y + b2) + y."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.first, self.second = _linear(features, width), _linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.second(y).relu() + y
        return out


class Retriever(nn.Module):
    """Encoder, two heads, sentinel and prompt map. The encoder itself is shared and never written.

    Source: Chen et al. 2024 (arXiv:2405.03279) sec. 3.
    """

    def __init__(self, shape: Shape, encoder: Encoder) -> None:
        super().__init__()
        self.shape = shape
        self._encoder = [encoder]  # in a list: its weights are not parameters of this module
        inputs = (3 + shape.pooler) * shape.features
        self.key, self.query = Head(inputs, shape.width), Head(inputs, shape.width)
        self.mix = _linear(shape.width, shape.width)
        self.out = _linear(shape.width, shape.prompt_tokens * shape.d_model)
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

    def start(self, seed: int, embeddings: Tensor, texts: Sequence[str] = TEXTS) -> None:
        """Draw the starting weights. Both heads start as the same map, so a question scores highest with the fact that
        the encoder finds most alike.

        Args:
            embeddings: [n, d_model] typical outputs of the language model's embedding module; prompt vectors have
                their RMS.
            texts: typical facts and questions; features are measured in their mean and spread.
        """
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in (self.key.first, self.key.second, self.mix, self.out):
                bound = module.in_features**-0.5
                for p in module.parameters():
                    p.uniform_(-bound, bound, generator=draw)
            for name, p in self.learned.items():
                if name.endswith(LORA[0]):
                    p.normal_(0, p.shape[1] ** -0.5, generator=draw)
            self.key.first.weight.mul_(GAIN)
            self.query.load_state_dict(self.key.state_dict())
            silent = self.shape.width - self.shape.width // APART
            for module in (self.query.first, self.query.second):
                module.weight[silent:], module.bias[silent:] = 0, 0
            found = self.features(texts)
            variance = found.var(0)
            self.centre.copy_(found.mean(0))
            self.spread.copy_((variance + variance.mean()).sqrt())  # the second term keeps a rare feature from towering
            start = self.encoder.embedded(NOTHING)
            self.sentinel_embeddings.copy_(start[torch.arange(self.shape.sentinel_tokens) % len(start)])
            self.scale.fill_(embeddings.float().pow(2).mean().sqrt())

    def encoder_weights(self) -> dict[str, Tensor]:
        """Parameter name of the encoder -> its adapted value."""
        own = dict(self.encoder.module.named_parameters())
        found: dict[str, Tensor] = {}
        for key, value in self.learned.items():
            if key.endswith(LORA[0]):
                name = _dotted(key.removesuffix(LORA[0]))
                found[name] = own[name] + self.learned[key.removesuffix(LORA[0]) + LORA[1]] @ value
            elif not key.endswith(LORA[1]):
                found[_dotted(key)] = value
        return found

    def features(self, texts: Sequence[str], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Features [n, 3 w] of texts (4 w with the pooler). They run in batches of near lengths, so little is padded.

        Args:
            weights: of the encoder; None: its adapted ones. A caller that asks often passes them in.
        """
        weights = self.encoder_weights() if weights is None else weights
        rows = self.encoder.tokenise(texts)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        parts = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        states = (self.encoder.states([rows[i] for i in part], weights) for part in parts)
        out = torch.cat([self._pooled(*pair, weights) for pair in states])
        return out[torch.tensor(order).argsort().to(out.device)]

    def keys(self, texts: Sequence[str], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Keys [n, R] of statements: ``prompt target``."""
        out: Tensor = self.key(self._standard(self.features(texts, weights)))
        return out

    def queries(self, texts: Sequence[str], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Queries [n, R] of questions: the prompt alone."""
        out: Tensor = self.query(self._standard(self.features(texts, weights)))
        return out

    def sentinel(self, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """r_Θ [R]: the key that stands for "no fact"."""
        weights = self.encoder_weights() if weights is None else weights
        states = self.encoder.stack(self.sentinel_embeddings, weights)
        mask = torch.ones(states.shape[:2], device=states.device)
        out: Tensor = self.key(self._standard(self._pooled(states, mask, weights)))
        return out[0]

    def _pooled(self, states: Tensor, mask: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        found = pooled(states, mask)
        return torch.cat([self.encoder.pooler(states, weights), found], -1) if self.shape.pooler else found

    def _standard(self, features: Tensor) -> Tensor:
        """Features in their own mean and spread: a large common part would make every step of Adam move all alike."""
        return (features - self.centre) / self.spread

    def prompts(self, keys: Tensor) -> Tensor:
        """Prompt vectors [n, P, d_model] of keys [n, R], each as long as a typical output of the embedding module.

        Left free, they grew to fifty times that in training, where the model's norms pass no gradient back.
        """
        keys = nn.functional.layer_norm(keys, keys.shape[-1:])  # else steps of Adam grow with the keys
        mixed = self.mix(keys).relu() + keys
        found: Tensor = self.out(mixed).float().reshape(len(keys), self.shape.prompt_tokens, self.shape.d_model)
        return found * (self.scale / found.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-12))

    def tensors(self) -> dict[str, Tensor]:
        """Everything it has learned, bf16, by name."""
        return {name: p.detach().to(torch.bfloat16).contiguous() for name, p in self.state_dict().items()}

    @classmethod
    def of(cls, shape: Shape, encoder: Encoder, tensors: Mapping[str, Tensor]) -> Retriever:
        """The network with these learned tensors, frozen, in fp32.

        Raises:
            BadPatch: they do not fit the shape or the encoder.
        """
        made = cls(shape, encoder)
        wanted = {name: p.shape for name, p in made.state_dict().items()}
        found = {name: t.shape for name, t in tensors.items()}
        if wanted != found:
            wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
            raise BadPatch(f"the editor's tensors do not fit {encoder.name}: {', '.join(wrong[:3])}.")
        made.load_state_dict({name: t.float() for name, t in tensors.items()})
        return made.requires_grad_(False)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Without starting weights, which would be drawn from the global random state."""
    made: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    return made


def _safe(name: str) -> str:
    """A parameter name without dots, which torch takes for nesting."""
    return SLASHED + name.replace(".", "/")


def _dotted(key: str) -> str:
    return key.removeprefix(SLASHED).replace("/", ".")
