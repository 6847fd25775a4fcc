"""``run`` of the probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...data.edits import Edit
from ...errors import BadInput
from ...inference.forward import HEAD_CHUNK, first, logits
from ...inference.replay import Recording, record
from ...inference.tokens import Row, encode
from ...models.hooks import Hook, hooked
from ...models.lm import LM
from ...progress import Progress
from .trace import Kind, Trace, Traces

Record = Edit


@dataclass(frozen=True)
class Config:
    """Causal tracing. Defaults: the paper's."""

    kind: Kind = "state"
    """What is restored: the whole state leaving a block, or the MLP's or the attention's output."""
    window: int = 10
    """Layers restored together for ``mlp`` and ``attention``, centred on the layer reported."""
    noise: float = 3.0
    """Standard deviation of the noise, in units of that of the subject tokens' embeddings."""
    samples: int = 10
    """Noise samples averaged."""
    seed: int = 0
    """Seed of the noise."""


def run(lm: LM, data: Sequence[Edit], cfg: Config, *, progress: Progress | None = None) -> Traces:
    """Trace each prompt for the token the model itself predicts.

    Noise is added to the subject's embeddings. Then, for every token from the subject on and every layer, the run
    is repeated with the clean activation put back there. All places travel in one batch (``models.replay``): a
    place in layer l joins the batch at l.

    Args:
        data: prompts with their subjects; targets are not used.
    Returns:
        one ``Trace`` a prompt.
    Raises:
        SubjectNotFound: a prompt does not contain its subject.
    Source: Meng et al. 2022 (arXiv:2202.05262), sec. 2.1 and app. B.
    """
    if cfg.samples < 1 or cfg.window < 1:
        raise BadInput(f"samples is {cfg.samples} and window {cfg.window}. Both must be at least 1.")
    for edit in data:
        edit.need_subject()
    traces = Traces()
    for i, edit in enumerate(data):
        traces.append(_trace(lm, edit, cfg))
        if progress:
            progress(i + 1, len(data), "tracing")
    return traces


@torch.no_grad()
def _trace(lm: LM, edit: Edit, cfg: Config) -> Trace:
    row = encode(lm, edit.prompt, subject=edit.subject)
    assert row.subject_first is not None and row.subject_last is not None
    begin, width = row.subject_first, row.subject_last + 1 - row.subject_first
    recording, outputs = _clean(lm, row, begin, cfg.kind)
    n_layers, s = lm.layout.n_layers, recording.suffix
    last = recording.hidden[n_layers][:, -1]
    p = logits(lm, last).softmax(-1)[0]
    answer = int(p.argmax())

    generator = torch.Generator().manual_seed(cfg.seed)
    start = recording.hidden[0]  # [1, S, d]
    sigma = cfg.noise * start[:, :width].float().std()
    noise = torch.zeros(cfg.samples, s, start.shape[-1])
    noise[:, :width] = torch.randn(cfg.samples, width, start.shape[-1], generator=generator)
    noisy = [start + (noise.to(start.device) * sigma).to(start.dtype)]  # per block [samples, S, d] entering it
    same = torch.zeros(cfg.samples, dtype=torch.long, device=start.device)
    for layer in range(n_layers):
        noisy.append(recording.forward(noisy[-1], layer, rows=same, end=layer + 1))

    def probability(states: Tensor) -> Tensor:
        parts = states.split(HEAD_CHUNK)
        return torch.cat([logits(lm, x).softmax(-1)[:, answer] for x in parts]).reshape(-1, cfg.samples).mean(-1)

    scores = torch.zeros(s, n_layers)
    for token in range(s):
        states = _restored(lm, recording, noisy, outputs, token, cfg)  # [layers * samples, d] at the last token
        scores[token] = probability(states).cpu()
    return Trace(
        edit.prompt, lm.tokenizer.decode([answer]), tuple(lm.tokenizer.decode([i]) for i in row.ids[begin:]), width,
        cfg.kind, float(p[answer]), float(probability(noisy[-1][:, -1])), scores,
    )  # fmt: skip


def _clean(lm: LM, row: Row, begin: int, kind: Kind) -> tuple[Recording, list[Tensor]]:
    """The recording, and for ``mlp`` and ``attention`` each layer's clean output [S, d]."""
    recording = record(lm, [row.ids], [begin], ends=[len(row.ids) - 1])
    if kind == "state":
        return recording, []
    outputs: list[Tensor] = []

    def see(_: Any, __: Any, output: Any) -> None:
        outputs.append(first(output).reshape(recording.suffix, -1))

    names = lm.layout.downs if kind == "mlp" else lm.layout.attn_outs
    with hooked(*(Hook(lm.module(name), see) for name in names)):
        recording.forward(recording.hidden[0], 0)
    return recording, outputs


def _restored(
    lm: LM, recording: Recording, noisy: list[Tensor], outputs: list[Tensor], token: int, cfg: Config
) -> Tensor:
    """States at the last token [layers * samples, d] with ``token`` restored in each layer in turn.

    A wavefront: the rows of layer l join where their restoration begins, at the state entering that block.
    """
    n, m = lm.layout.n_layers, cfg.samples
    half = cfg.window // 2
    spans = [(max(0, c - half), min(n, c - half + cfg.window)) for c in range(n)]  # layers restored for centre c
    joins = [c + 1 if cfg.kind == "state" else spans[c][0] for c in range(n)]
    names = lm.layout.downs if cfg.kind == "mlp" else lm.layout.attn_outs
    order: list[int] = []
    hidden = noisy[0][:0]
    for layer in range(n + 1):
        for c in (c for c in range(n) if joins[c] == layer):
            new = noisy[layer].clone()
            if cfg.kind == "state":
                new[:, token] = recording.hidden[layer][0, token]
            hidden = torch.cat([hidden, new])
            order.append(c)
        if layer == n or not order:
            continue
        rows = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        if cfg.kind == "state":
            hidden = recording.forward(hidden, layer, rows=rows, end=layer + 1)
            continue
        clean = outputs[layer]
        inside = torch.tensor([spans[c][0] <= layer < spans[c][1] for c in order], device=hidden.device)
        inside = inside.repeat_interleave(m)

        def put(_: Any, __: Any, output: Tensor, inside: Tensor = inside, clean: Tensor = clean) -> Tensor:
            changed = output.clone()
            whole = changed.reshape(len(inside), -1, clean.shape[-1])
            whole[inside, token] = clean[token]
            return whole.reshape(output.shape)

        with hooked(Hook(lm.module(names[layer]), put)):
            hidden = recording.forward(hidden, layer, rows=rows, end=layer + 1)
    back = torch.tensor(order).argsort()
    return hidden[:, -1].reshape(n, m, -1)[back].reshape(n * m, -1)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Data and settings that run in milliseconds on a tiny model."""
    return [Edit("The Eiffel Tower is in", subject="Eiffel Tower", target="Paris")], Config(samples=2, window=2)
