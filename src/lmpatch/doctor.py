"""Proofs on a user's own model that patching it will work, and what fits in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LmpatchError
from .inference.forward import first
from .inference.replay import record
from .inference.states import hidden
from .inference.tokens import encode_all
from .models.hooks import Hook, hooked
from .models.lm import LM
from .patches.file import kinds
from .patches.ledger import apply
from .patches.patch import Mount, Patch
from .progress import Progress
from .provenance import hash_tensors
from .registry import method, names
from .resources import format_bytes, free_bytes

Proof = tuple[bool, str]  # whether the claim, the docstring's first line, holds, and the figure behind it
PROMPTS = ("The capital of France is", "Water boils at a temperature of one hundred degrees", "Hello")
STRENGTH = 0.05  # of a trial patch: |ΔW| over |W|
CROWD = 1000  # edits a method's estimate is printed for, besides one


@dataclass(frozen=True)
class Finding:
    """One proof: what was claimed, whether it held, and the figure behind it."""

    claim: str
    holds: bool
    detail: str


def examine(lm: LM, *, progress: Progress | None = None) -> list[Finding]:
    """Run every proof on the model, which is the same afterwards, to the bit. Differences are shares of the spread.

    A proof that raises counts as failed, with its message.
    """
    findings = []
    for i, proof in enumerate(PROOFS):
        try:
            holds, detail = proof(lm)
        except LmpatchError as error:
            holds, detail = False, str(error)
        claim = (proof.__doc__ or "").rstrip(".")
        findings.append(Finding(claim[0].lower() + claim[1:], holds, detail))
        if progress:
            progress(i + 1, len(PROOFS), "examining")
    return findings


def footprint(lm: LM) -> list[tuple[str, str]]:
    """(what, how much) of memory: the weights, what is free, parts of a patch, and each method's own estimate."""
    d, width = lm.layout.d_model, max(lm.layout.widths)
    sizes = {
        "weights": sum(p.numel() * p.element_size() for p in lm.model.parameters()),
        f"free on {lm.device}": free_bytes(lm.device),
        "one edit in one layer, as a patch": (d + width) * 4,
        "original kept per baked layer": d * width * lm.dtype.itemsize,
        "covariance of one layer's activations": width**2 * 4,
    }
    rows = [(what, format_bytes(size)) for what, size in sizes.items()]
    for name in names("methods"):
        found = method(name)
        if found.estimate:
            one, crowd = (format_bytes(found.estimate(lm, n, found.config())) for n in (1, CROWD))
            rows.append((f"fitting with {name}", f"{one} for 1 edit, {crowd} for {CROWD}"))
    return rows


@torch.no_grad()
def _logits(lm: LM, prompt: str = PROMPTS[0]) -> Tensor:
    """[T, V] of one prompt through the model's own forward."""
    ids = torch.tensor([encode_all(lm, [prompt])[0].ids], device=lm.device)
    logits: Tensor = lm.model(input_ids=ids, use_cache=False).logits[0].float()
    return logits


@torch.no_grad()
def _last_states(lm: LM) -> Tensor:
    """[n, d] after the last block at the end of each prompt, through the model's own forward, one by one."""
    states: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        states.append(first(output).reshape(-1, lm.layout.d_model)[-1].float())

    with hooked(Hook(lm.module(lm.layout.blocks[-1]), keep)):
        for prompt in PROMPTS:
            _logits(lm, prompt)
    return torch.stack(states)


def _hooks_fire(lm: LM) -> Proof:
    """Every hook fires once per forward."""
    layout, fired = lm.layout, Counter[str]()
    inner = [name for group in (*layout.ups, *layout.attn_ins) for name in group]
    watched = [layout.embed, *layout.blocks, *layout.downs, *layout.attn_outs, *inner, *layout.tail]

    def count(name: str) -> Callable[..., None]:
        return lambda *_: fired.update([name])

    with hooked(*(Hook(lm.module(name), count(name)) for name in watched)):
        _logits(lm)
    wrong = [f"{name} fired {fired[name]} times" for name in watched if fired[name] != 1]
    return not wrong, "; ".join(wrong) or f"{len(watched)} modules"


def _noop_is_exact(lm: LM) -> Proof:
    """A patch of zeros changes no bit."""
    before, layers = _logits(lm), lm.layout.n_layers
    differ = []
    for layer in range(layers):
        for patch, mount in _trials(lm, layer, 0.0):
            with apply(lm, patch, mount=mount):
                if not torch.equal(before, _logits(lm)):
                    differ.append(f"{patch.kind}, {mount} at layer {layer}")
    return not differ, "; ".join(differ) or f"{layers} layers"


def _mounts_agree(lm: LM) -> Proof:
    """All mounts give the same logits."""
    before = _logits(lm)
    holds, details = True, []
    for patch in (p for p in _patches(lm, lm.layout.n_layers // 2, STRENGTH) if len(p.mounts) > 1):
        outputs, error = [], 0.0
        for mount in patch.mounts:
            with apply(lm, patch, mount=mount) as on:
                outputs.append(_logits(lm))
                error = max(error, on.rounding_error)
        gap = max(_gap(outputs[0], other) for other in outputs[1:])
        moved = _gap(outputs[0], before)
        holds &= gap <= _tolerance(lm) and moved > 0
        details.append(
            f"{patch.kind}: they differ by {gap:.1e}, the patch moves them by {moved:.1e}, baking lost {error:.1e}"
        )
    return holds, "; ".join(details)


def _removal_restores(lm: LM) -> Proof:
    """Removal restores every bit."""
    before = _bits(lm)
    for patch, mount in _trials(lm, lm.layout.n_layers // 2, STRENGTH):
        apply(lm, patch, mount=mount).remove()
    after = _bits(lm)
    return before == after, f"SHA-256 {before[:12]} before, {after[:12]} after"


def _padding_is_safe(lm: LM) -> Proof:
    """A padded batch gives what single prompts give."""
    gap = _gap(hidden(lm, PROMPTS), _last_states(lm))
    return gap <= _tolerance(lm), f"they differ by {gap:.1e}"


@torch.no_grad()
def _replay_is_forward(lm: LM) -> Proof:
    """Replay equals the plain forward."""
    rows = [row.ids for row in encode_all(lm, PROMPTS)]
    at = [max(0, len(row) - 3) for row in rows]
    recording = record(lm, rows, at)
    layer = lm.layout.n_layers // 2
    replayed = recording.forward(recording.hidden[layer], layer)  # [n, S, d]
    ends = torch.tensor([len(row) - 1 - t for row, t in zip(rows, at, strict=True)], device=lm.device)
    gap = _gap(replayed[torch.arange(len(rows), device=lm.device), ends].float(), _last_states(lm))
    return gap <= _tolerance(lm), f"they differ by {gap:.1e}"


PROOFS: tuple[Callable[[LM], Proof], ...] = (
    _hooks_fire, _noop_is_exact, _mounts_agree, _removal_restores, _padding_is_safe, _replay_is_forward,
)  # fmt: skip


def _patches(lm: LM, layer: int, strength: float) -> list[Patch]:
    """A patch at that layer of every kind that has one to try."""
    return [patch for kind in kinds() if (patch := kind.trial(lm, layer, strength)) is not None]


def _trials(lm: LM, layer: int, strength: float) -> list[tuple[Patch, Mount]]:
    """Each of those patches by each of its mounts."""
    return [(patch, mount) for patch in _patches(lm, layer, strength) for mount in patch.mounts]


def _bits(lm: LM) -> str:
    return hash_tensors(lm.model.state_dict().items(), exact=True)


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.std())


def _tolerance(lm: LM) -> float:
    """Largest gap that counts as agreement; the half formats round each layer's output."""
    return 1e-4 if lm.dtype in (torch.float32, torch.float64) else 0.1
