"""Causal tracing: which states, restored one at a time, bring back a fact that noise has destroyed.

Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (arXiv:2202.05262), sec. 2.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.edits import Edit
from ..errors import BadInput, MissingExtra
from ..inference.forward import HEAD_CHUNK, first, logits
from ..inference.replay import Recording, record
from ..inference.tokens import encode
from ..models.hooks import Hook, hooked
from ..models.lm import LM
from ..patches.patch import plain
from ..progress import Progress

Record = Edit
NOT_LOWERED = "noise did not lower the probability"
Kind = Literal["state", "mlp", "attention"]


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


@dataclass(frozen=True, repr=False)
class Trace:
    """What restoring each (token, layer) brings back."""

    prompt: str
    answer: str
    """The token the clean model predicts; its probability is what is traced."""
    tokens: tuple[str, ...]
    """Tokens from the subject's first on; earlier ones are out of the noise's reach."""
    subject: int
    """How many of ``tokens`` are the subject's."""
    kind: Kind
    clean: float
    """p(answer) without noise."""
    corrupted: float
    """p(answer) with noise, nothing restored."""
    scores: Tensor
    """[tokens, layers] p(answer) with noise and that place restored, mean over samples."""

    @property
    def lowered(self) -> bool:
        """The noise lowered p(answer). Else nothing was lost that a place could bring back: leave it out of means."""
        return self.corrupted < self.clean

    def __repr__(self) -> str:
        token, layer = self.best()
        found = f"best at {self.tokens[token]!r}, layer {layer}" if self.lowered else NOT_LOWERED
        return f"Trace({self.prompt!r} -> {self.answer!r}: {found})"

    def best(self) -> tuple[int, int]:
        """(token, layer) whose restoration brings back most; it means nothing unless the noise ``lowered`` p."""
        return divmod(int(self.scores.argmax()), self.scores.shape[1])

    def plot(self, path: str | Path) -> None:
        """Write a heat map as PNG: tokens down, layers across, p(answer) after restoring as colour."""
        try:
            from matplotlib.figure import Figure  # no pyplot: it keeps state and picks a screen
        except ImportError as error:
            raise MissingExtra('plots need matplotlib. Run: pip install "lmpatch[plot]"') from error
        what = {"state": "one state", "mlp": "MLP outputs", "attention": "attention outputs"}[self.kind]
        figure = Figure(figsize=(7, 1.3 + 0.28 * len(self.tokens)), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(self.scores.numpy(), aspect="auto", cmap="viridis", vmin=min(0.0, self.corrupted))
        labels = [t.replace("$", r"\$") + "*" * (i < self.subject) for i, t in enumerate(self.tokens)]
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel("layer")
        axes.set_title(f"restoring {what}; * noised" + f"\n{NOT_LOWERED}" * (not self.lowered), fontsize=10)
        answer = self.answer.strip().replace("$", r"\$")
        label = f"p({answer}), clean {self.clean:.2f}, noised {self.corrupted:.2f}"
        figure.colorbar(image, ax=axes).set_label(label, fontsize=8)
        figure.savefig(path, dpi=150, format="png")


class Traces(list[Trace]):
    """One ``Trace`` a record, in order."""

    def table(self) -> tuple[list[str], list[tuple[object, ...]]]:
        """Column names, and one row a record."""
        rows: list[tuple[object, ...]] = []
        for trace in self:
            token, layer = trace.best()
            found = (float(trace.scores.max()), trace.tokens[token], layer) if trace.lowered else ("", NOT_LOWERED, "")
            rows.append((trace.prompt, trace.answer, trace.clean, trace.corrupted, *found))
        return ["prompt", "answer", "p clean", "p noisy", "p restored", "best at token", "layer"], rows

    def save(self, folder: Path) -> None:
        """Write the traces as JSON lines, and one heat map a record, into a folder that is there."""
        lines = [json.dumps(plain(trace) | {"lowered": trace.lowered}, ensure_ascii=False) + "\n" for trace in self]
        (folder / "causal_trace.jsonl").write_text("".join(lines), encoding="utf-8")
        for i, trace in enumerate(self):
            trace.plot(folder / f"{i:03d}.png")


def run(lm: LM, data: Sequence[Edit], cfg: Config, *, progress: Progress | None = None) -> Traces:
    """Trace each prompt for the token the model itself predicts.

    Noise is added to the subject's embeddings. Then, for every token from the subject on and every layer, the run
    is repeated with the clean activation put back there. All places travel in one batch (``inference.replay``): a
    place in layer l joins the batch at l.

    Args:
        data: prompts with their subjects; targets are not used.
    Raises:
        SubjectNotFound: a prompt does not contain its subject.
    Source: Meng et al. 2022 (arXiv:2202.05262), sec. 2.1 and app. B.
    """
    if cfg.samples < 1 or cfg.window < 1:
        raise BadInput(f"samples is {cfg.samples} and window {cfg.window}. Both must be at least 1.")
    for edit in data:
        edit.need_subject()
    traces = Traces()
    for edit in data:
        traces.append(_trace(lm, edit, cfg))
        if progress:
            progress(len(traces), len(data), "tracing")
    return traces


@torch.no_grad()
def _trace(lm: LM, edit: Edit, cfg: Config) -> Trace:
    row = encode(lm, edit.prompt, subject=edit.subject)
    assert row.subject_first is not None and row.subject_last is not None
    begin, width = row.subject_first, row.subject_last + 1 - row.subject_first
    recording = record(lm, [row.ids], [begin], ends=[len(row.ids) - 1])
    n_layers, s = lm.layout.n_layers, recording.suffix
    sites = {"state": [], "mlp": lm.layout.downs, "attention": lm.layout.attn_outs}[cfg.kind]
    clean: list[tuple[nn.Module, Tensor]] = []  # of each site, [S, d]

    def see(module: nn.Module, _: Any, output: Any) -> None:
        clean.append((module, first(output).reshape(s, -1)))

    if sites:
        with hooked(*(Hook(lm.module(name), see) for name in sites)):
            recording.forward(recording.hidden[0], 0)
    p = logits(lm, recording.hidden[n_layers][:, -1]).softmax(-1)[0]
    answer = int(p.argmax())

    generator = torch.Generator().manual_seed(cfg.seed)
    start = recording.hidden[0]  # [1, S, d]
    sigma = cfg.noise * start[:, :width].float().std()
    noise = torch.zeros(cfg.samples, s, start.shape[-1])
    noise[:, :width] = torch.randn(cfg.samples, width, start.shape[-1], generator=generator)
    noisy = [start + (noise.to(start.device) * sigma).to(start.dtype)]  # per block [samples, S, d] entering it
    for layer in range(n_layers):
        noisy.append(recording.forward(noisy[-1], layer, rows=_first(noisy[-1]), end=layer + 1))

    def probability(states: Tensor) -> Tensor:
        parts = states.split(HEAD_CHUNK)
        return torch.cat([logits(lm, x).softmax(-1)[:, answer] for x in parts]).reshape(-1, cfg.samples).mean(-1)

    scores = torch.stack([probability(_restored(recording, noisy, clean, token, cfg)) for token in range(s)])
    return Trace(
        edit.prompt, lm.tokenizer.decode([answer]), tuple(lm.tokenizer.decode([i]) for i in row.ids[begin:]), width,
        cfg.kind, float(p[answer]), float(probability(noisy[-1][:, -1])), scores.cpu(),
    )  # fmt: skip


def _first(hidden: Tensor) -> Tensor:
    """All rows continue the only recorded one."""
    return torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)


def _restored(
    recording: Recording, noisy: list[Tensor], clean: list[tuple[nn.Module, Tensor]], token: int, cfg: Config
) -> Tensor:
    """States at the last token [layers * samples, d] with ``token`` restored in each layer in turn.

    A wavefront: the rows of layer l join where their restoration begins, at the state entering that block.
    """
    n, m, half = recording.lm.layout.n_layers, cfg.samples, cfg.window // 2
    spans = [range(max(0, c - half), min(n, c - half + cfg.window)) for c in range(n)]  # layers restored for centre c
    joins = [spans[c].start if clean else c + 1 for c in range(n)]
    order: list[int] = []
    hidden = noisy[0][:0]
    for layer in range(n + 1):
        for c in (c for c in range(n) if joins[c] == layer):
            new = noisy[layer].clone()
            if not clean:
                new[:, token] = recording.hidden[layer][0, token]
            hidden = torch.cat([hidden, new])
            order.append(c)
        if layer == n or not order:
            continue
        hooks = []
        if clean:
            module, whole = clean[layer]
            inside = torch.tensor([layer in spans[c] for c in order], device=hidden.device).repeat_interleave(m)
            hooks = [Hook(module, partial(_put, inside, token, whole))]
        with hooked(*hooks):
            hidden = recording.forward(hidden, layer, rows=_first(hidden), end=layer + 1)
    back = torch.tensor(order).argsort()
    return hidden[:, -1].reshape(n, m, -1)[back].reshape(n * m, -1)


def _put(rows: Tensor, token: int, clean: Tensor, _: Any, __: Any, output: Tensor) -> Tensor:
    """The output with ``clean`` [S, d] at one token of these rows."""
    whole = output.clone().reshape(len(rows), -1, clean.shape[-1])
    whole[rows, token] = clean[token]
    return whole.reshape(output.shape)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Data and settings that run in milliseconds on a tiny model."""
    return [Edit("The Eiffel Tower is in", subject="Eiffel Tower", target="Paris")], Config(samples=2, window=2)
