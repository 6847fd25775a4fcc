"""What causal tracing finds: one ``Trace`` a record, as a table, JSON lines and heat maps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from ...errors import MissingExtra
from ...patches.patch import plain

Kind = Literal["state", "mlp", "attention"]


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

    def __repr__(self) -> str:
        token, layer = self.best()
        return f"Trace({self.prompt!r} -> {self.answer!r}: best at {self.tokens[token]!r}, layer {layer})"

    def best(self) -> tuple[int, int]:
        """(token, layer) whose restoration brings back most."""
        place = int(self.scores.argmax())
        return place // self.scores.shape[1], place % self.scores.shape[1]

    def plot(self, path: str | Path) -> None:
        """Write the heat map as a PNG."""
        heat_map(self, path)


class Traces(list[Trace]):
    """One ``Trace`` a record, in order."""

    def table(self) -> tuple[list[str], list[tuple[object, ...]]]:
        """Column names, and one row a record."""
        rows: list[tuple[object, ...]] = []
        for trace in self:
            token, layer = trace.best()
            best = float(trace.scores[token, layer])
            rows.append((trace.prompt, trace.answer, trace.clean, trace.corrupted, best, trace.tokens[token], layer))
        return ["prompt", "answer", "p clean", "p noisy", "p restored", "best at token", "layer"], rows

    def save(self, folder: Path) -> None:
        """Write the traces as JSON lines, and one heat map a record, into a folder that is there."""
        lines = [json.dumps(plain(trace), ensure_ascii=False) + "\n" for trace in self]
        (folder / "causal_trace.jsonl").write_text("".join(lines), encoding="utf-8")
        for i, trace in enumerate(self):
            trace.plot(folder / f"{i:03d}.png")


def heat_map(trace: Trace, path: str | Path) -> None:
    """Tokens down, layers across, p(answer) after restoring as colour; written as PNG."""
    try:
        from matplotlib.figure import Figure  # no pyplot: it keeps state and picks a screen
    except ImportError as error:
        raise MissingExtra('plots need matplotlib. Run: pip install "lmpatch[plot]"') from error
    what = {"state": "one state", "mlp": "MLP outputs", "attention": "attention outputs"}[trace.kind]
    figure = Figure(figsize=(7, 1.3 + 0.28 * len(trace.tokens)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(trace.scores.numpy(), aspect="auto", cmap="viridis", vmin=min(0.0, trace.corrupted))
    marks = ["*" if i < trace.subject else "" for i in range(len(trace.tokens))]
    axes.set_yticks(
        range(len(trace.tokens)), [t.replace("$", r"\$") + m for t, m in zip(trace.tokens, marks, strict=True)]
    )
    axes.set_xlabel("layer")
    axes.set_title(f"restoring {what}; * noised", fontsize=10)
    answer = trace.answer.strip().replace("$", r"\$")
    label = f"p({answer}), clean {trace.clean:.2f}, noised {trace.corrupted:.2f}"
    figure.colorbar(image, ax=axes).set_label(label, fontsize=8)
    figure.savefig(path, dpi=150, format="png")
