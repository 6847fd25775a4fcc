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
from .patches.patch import Patch
from .progress import Progress
from .provenance import hash_tensors
from .registry import method, names
from .resources import format_bytes, free_bytes

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

    Returns:
        hooks fire once; a no-op patch changes no bit; all mounts agree; removal restores every bit; padding moves
        nothing; replay equals the plain forward. A proof that raises counts as failed, with its message.
    """
    proofs = (_hooks_fire, _noop_is_exact, _mounts_agree, _removal_restores, _padding_is_safe, _replay_is_forward)
    findings = []
    for i, proof in enumerate(proofs):
        findings.append(_settled(proof, lm))
        if progress:
            progress(i + 1, len(proofs), "examining")
    return findings


def footprint(lm: LM) -> list[tuple[str, str]]:
    """(what, how much) of memory: the weights, what is free, one rank of a patch, and each method's own estimate."""
    layout = lm.layout
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    width = max(layout.widths)
    rank = (layout.d_model + width) * 4
    rows = [
        ("weights", format_bytes(weights)),
        (f"free on {lm.device}", format_bytes(free_bytes(lm.device))),
        ("one edit in one layer, as a patch", format_bytes(rank)),
        ("original kept per baked layer", format_bytes(layout.d_model * width * lm.dtype.itemsize)),
        ("second moments of one layer", format_bytes(width**2 * 4)),
    ]
    for name in names("methods"):
        found = method(name)
        if found.estimate:
            one, crowd = (format_bytes(found.estimate(lm, n, found.config())) for n in (1, CROWD))
            rows.append((f"fitting with {name}", f"{one} for 1 edit, {crowd} for {CROWD}"))
    return rows


def _settled(proof: Callable[[LM], Finding], lm: LM) -> Finding:
    try:
        return proof(lm)
    except LmpatchError as error:
        return Finding((proof.__doc__ or "").rstrip("."), False, str(error))


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


def _hooks_fire(lm: LM) -> Finding:
    """Every hook fires once per forward."""
    layout, fired = lm.layout, Counter[str]()
    inner = [name for group in (*layout.ups, *layout.attn_ins) for name in group]
    watched = [layout.embed, *layout.blocks, *layout.downs, *layout.attn_outs, *inner, *layout.tail]

    def count(name: str) -> Callable[..., None]:
        return lambda *_: fired.update([name])

    with hooked(*(Hook(lm.module(name), count(name)) for name in watched)):
        _logits(lm)
    wrong = [f"{name} fired {fired[name]} times" for name in watched if fired[name] != 1]
    return Finding("every hook fires once per forward", not wrong, "; ".join(wrong) or f"{len(watched)} modules")


def _noop_is_exact(lm: LM) -> Finding:
    """A patch of zeros changes no bit."""
    before = _logits(lm)
    differ = []
    for layer in range(lm.layout.n_layers):
        for patch in _trials(lm, layer, 0.0):
            for mount in patch.mounts:
                with apply(lm, patch, mount=mount):
                    if not torch.equal(before, _logits(lm)):
                        differ.append(f"{patch.kind}, {mount} at layer {layer}")
    return Finding("a patch of zeros changes no bit", not differ, "; ".join(differ) or f"{lm.layout.n_layers} layers")


def _mounts_agree(lm: LM) -> Finding:
    """All mounts give the same logits."""
    before = _logits(lm)
    holds, details = True, []
    for patch in (p for p in _trials(lm, lm.layout.n_layers // 2, STRENGTH) if len(p.mounts) > 1):
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
    return Finding("all mounts give the same logits", holds, "; ".join(details))


def _removal_restores(lm: LM) -> Finding:
    """Removal restores every bit."""
    before = hash_tensors(lm.model.state_dict().items(), exact=True)
    for patch in _trials(lm, lm.layout.n_layers // 2, STRENGTH):
        for mount in patch.mounts:
            apply(lm, patch, mount=mount).remove()
    after = hash_tensors(lm.model.state_dict().items(), exact=True)
    return Finding("removal restores every bit", before == after, f"SHA-256 {before[:12]} before, {after[:12]} after")


def _padding_is_safe(lm: LM) -> Finding:
    """A padded batch gives what single prompts give."""
    gap = _gap(hidden(lm, PROMPTS), _last_states(lm))
    return Finding("a padded batch gives what single prompts give", gap <= _tolerance(lm), f"they differ by {gap:.1e}")


@torch.no_grad()
def _replay_is_forward(lm: LM) -> Finding:
    """Replay equals the plain forward."""
    rows = [row.ids for row in encode_all(lm, PROMPTS)]
    at = [max(0, len(row) - 3) for row in rows]
    recording = record(lm, rows, at)
    layer = lm.layout.n_layers // 2
    replayed = recording.forward(recording.hidden[layer], layer)  # [n, S, d]
    ends = torch.tensor([len(row) - 1 - t for row, t in zip(rows, at, strict=True)], device=lm.device)
    gap = _gap(replayed[torch.arange(len(rows), device=lm.device), ends].float(), _last_states(lm))
    return Finding("replay equals the plain forward", gap <= _tolerance(lm), f"they differ by {gap:.1e}")


def _trials(lm: LM, layer: int, strength: float) -> list[Patch]:
    """A patch at that layer of every kind that has one to try."""
    patches = (kind.trial(lm, layer, strength) for kind in kinds())
    return [patch for patch in patches if patch is not None]


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.std())


def _tolerance(lm: LM) -> float:
    """Largest gap that counts as agreement; the half formats round each layer's output."""
    return 1e-4 if lm.dtype in (torch.float32, torch.float64) else 0.1
