"""Second moments C = E[k kᵀ] of down-projection inputs, all layers in one pass, cached by what they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from ..errors import BadInput
from ..files import cache_dir, replacing
from ..inference.forward import blocks, logits, positions
from ..inference.tokens import encode_all
from ..models.hooks import Hook, hooked
from ..models.lm import LM
from ..patches.ledger import suspended
from ..progress import Progress
from ..provenance import hash_json
from .solve import factor, solve

LENGTH = 128  # tokens per row of text
ROWS = 8  # rows per forward
PROBES = 64  # keys that watch whether the estimate has settled
AGREE = 0.99  # median cosine of C_a⁻¹k and C_b⁻¹k at which two halves of the text say the same


@dataclass(frozen=True)
class Moments:
    """Second moments of one or more layers."""

    c: dict[int, Tensor]
    """Layer → [f, f] mean of k kᵀ, fp32, uncentred."""
    tokens: int
    """How many keys went in."""
    agreement: float
    """Lowest over layers of the median cosine between the two halves' C⁻¹k."""
    source: str
    """Hash of model, text and token count: the cache key."""


def second_moments(
    lm: LM,
    layers: Sequence[int],
    *,
    text: Sequence[str] | None = None,
    tokens: int,
    seed: int = 0,
    cache: bool = True,
    progress: Progress | None = None,
) -> Moments:
    """E[k kᵀ] of the down-projection inputs of several layers, from one pass over plain text.

    The pass stops after the highest layer and never touches the head. It ends early once two halves of the text
    agree: median cosine of C_a⁻¹k and C_b⁻¹k at least 0.99 over 64 keys, in every layer. Start tokens and padding
    stay out: their activations are outliers. Patches on the model are set aside meanwhile.

    Args:
        text: plain text; None: the model's own samples (temperature 1), so no corpus is needed.
        tokens: at most this many keys; 10 to 20 times the MLP width is enough.
        cache: keep the result in the user's cache, keyed by weights, text, count and seed.
    Source: Meng et al. 2022 (arXiv:2202.05262) app. E.5; that a few times d_ff tokens suffice: arXiv:2506.04226.
    """
    corpus = hash_json(list(text)) if text is not None else f"own samples, seed {seed}"
    with suspended(lm):
        source = hash_json([lm.fingerprint(), str(lm.dtype), corpus, tokens, seed, LENGTH, AGREE])
        kept = _read(folder(source), layers) if cache else None
        if kept is not None:
            return Moments(*kept, source)
        rows = _text_rows(lm, text, tokens) if text is not None else _own_rows(lm, tokens, seed, progress)
        found, count, agreement = _accumulate(lm, rows, sorted(set(layers)), progress)
    if cache:
        _write(folder(source), found, count, agreement)
    return Moments(found, count, agreement, source)


def folder(source: str) -> Path:
    """Where moments of that hash are cached, and what is computed from them."""
    return cache_dir() / "moments" / source[:32]


def memory(lm: LM, layers: int) -> int:
    """Bytes an estimate takes on top of the model: two halves and their sum per layer, and the factors in fp64."""
    return (3 * layers * 4 + 4 * 8) * max(lm.layout.widths) ** 2


def _accumulate(
    lm: LM, rows: Tensor, layers: list[int], progress: Progress | None
) -> tuple[dict[int, Tensor], int, float]:
    """Sums over rows [n, T] of ids, two halves apart, until they agree."""
    widths, device = lm.layout.widths, lm.device
    halves = [{i: torch.zeros(widths[i], widths[i], device=device) for i in layers} for _ in range(2)]
    f = max(widths[i] for i in layers)
    counts = [0, 0]
    seen: dict[int, Tensor] = {}
    agreement, checked = 0.0, 0
    starts = {lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id, lm.tokenizer.pad_token_id} - {None}
    skip = torch.tensor(sorted(starts), device=device)
    for start in range(0, len(rows), ROWS):
        ids = rows[start : start + ROWS].to(device)
        mask = torch.ones_like(ids)
        wanted = ~torch.isin(ids.reshape(-1), skip)
        half = (start // ROWS) % 2

        def add(layer: int, half: int = half, wanted: Tensor = wanted) -> Any:
            def hook(_: Any, args: tuple[Tensor, ...]) -> None:
                keys = args[0].reshape(-1, args[0].shape[-1])[wanted].float()
                halves[half][layer].addmm_(keys.T, keys)
                seen[layer] = keys

            return hook

        hooks = [Hook(lm.module(lm.layout.downs[i]), add(i), before=True) for i in layers]
        with torch.no_grad(), hooked(*hooks):
            blocks(lm, ids, mask, position_ids=positions(mask), last=layers[-1])
        counts[half] += int(wanted.sum())
        done = sum(counts)
        if progress:
            progress(min(start + ROWS, len(rows)), len(rows), "second moments")
        last = start + ROWS >= len(rows)
        if min(counts) and (last or done >= 2 * max(checked, f)):  # at 2 f, 4 f, 8 f, ... keys
            checked = done
            agreement = min(
                _agreement([half[layer] / n for half, n in zip(halves, counts, strict=True)], seen[layer][:PROBES])
                for layer in layers
            )
            if agreement >= AGREE:
                break
    total = sum(counts)
    if not min(counts):
        raise BadInput(f"the text gives {total} tokens, too few for second moments. Give at least {2 * ROWS * LENGTH}.")
    return {layer: (halves[0][layer] + halves[1][layer]) / total for layer in layers}, total, agreement


def _agreement(estimates: list[Tensor], keys: Tensor) -> float:
    a, b = (solve(factor(c), keys.T) for c in estimates)  # [f, probes]
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0).median())


def _text_rows(lm: LM, text: Sequence[str], tokens: int) -> Tensor:
    """Token ids [n, LENGTH] of the text, each row opened as the tokenizer opens a text."""
    opening = encode_all(lm.plain, ["x"])[0].ids[:-1]  # the start token, where there is one
    body: list[int] = []
    for start in range(0, len(text), 64):
        for row in encode_all(lm.plain, [t for t in text[start : start + 64] if t.strip()]):
            body += row.ids[len(opening) :]
        if len(body) >= tokens:
            break
    step = LENGTH - len(opening)
    rows = [[*opening, *body[i : i + step]] for i in range(0, min(len(body), tokens) - step + 1, step)]
    if len(rows) < 2 * ROWS:
        raise BadInput(
            f"the text gives {len(body)} tokens, too few for second moments. Give at least {2 * ROWS * step}."
        )
    return torch.tensor(rows)


@torch.no_grad()
def _own_rows(lm: LM, tokens: int, seed: int, progress: Progress | None) -> Tensor:
    """Text the model writes itself: ids [n, LENGTH], sampled at temperature 1 from the start token."""
    count = -(-tokens // (LENGTH - 1))
    start = lm.tokenizer.bos_token_id
    ids = torch.full((count, 1), lm.tokenizer.eos_token_id if start is None else start, device=lm.device)
    rows = [ids]
    cache = DynamicCache(config=lm.model.config)
    generator = torch.Generator(lm.device).manual_seed(seed)
    banned = [i for i in lm.tokenizer.all_special_ids if i < lm.layout.vocab]
    mask = torch.ones_like(ids)
    for step in range(LENGTH - 1):
        state = blocks(lm, ids, mask, position_ids=positions(mask)[:, -1:], cache=cache)[:, -1]
        chosen = []
        for part in state.split(64):
            z = logits(lm, part)
            z[:, banned] = -torch.inf  # a text that ends would leave its row to noise
            chosen.append(torch.multinomial(z.softmax(-1), 1, generator=generator))
        ids = torch.cat(chosen)
        rows.append(ids)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        if progress:
            progress(step + 1, LENGTH - 1, "writing sample text")
    return torch.cat(rows, 1).cpu()


def _read(folder: Path, layers: Sequence[int]) -> tuple[dict[int, Tensor], int, float] | None:
    found: dict[int, Tensor] = {}
    facts = torch.tensor([0.0, 1.0])
    for layer in layers:
        try:
            tensors = load_file(folder / f"{layer}.safetensors")
        except (OSError, SafetensorError):
            return None
        found[layer] = tensors["c"]
        facts = torch.stack([tensors["facts"][0], torch.minimum(facts[1], tensors["facts"][1])])
    return found, int(facts[0]), float(facts[1])


def _write(folder: Path, found: dict[int, Tensor], tokens: int, agreement: float) -> None:
    for layer, c in found.items():
        tensors = {"c": c.cpu().contiguous(), "facts": torch.tensor([float(tokens), agreement])}
        with replacing(folder / f"{layer}.safetensors") as path:
            save_file(tensors, path)
