"""Pictures of what probes found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import MissingExtra

if TYPE_CHECKING:
    from .probe import Trace


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
