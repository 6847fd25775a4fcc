"""Second moments C = E[k kᵀ] of down-projection inputs, all layers in one pass, cached by what they depend on.

They are kept below ``files.cache_dir()`` in ``moments/{hash of model, text, count, seed}/``, one file a layer of
4 d_ff² bytes (17 MB for Gemma-3-270M), and may be deleted at any time. After Ctrl-C the sums so far stay there as
``partial.safetensors``, twice that a layer, until the next call has gone on from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import BadInput
from ..files import cache_dir, replacing
from ..inference.forward import blocks, positions
from ..inference.tokens import encode_all
from ..models.hooks import Hook, hooked
from ..models.lm import LM
from ..patches.ledger import suspended
from ..progress import Progress
from ..provenance import hash_json
from .samples import LENGTH, own_rows
from .solve import factor, solve

ROWS = 8  # rows per forward
PARTIAL = "partial.safetensors"
PROBES = 64  # keys that watch whether the estimate has settled
AGREE = 0.99  # median cosine of C_a⁻¹k and C_b⁻¹k at which two halves of the text say the same


@dataclass(frozen=True)
class Covariance:
    """Second moments of one or more layers."""

    c: dict[int, Tensor]
    """Layer → [f, f] mean of k kᵀ, fp32, uncentred."""
    tokens: int
    """How many keys went in."""
    agreement: float
    """Lowest over layers of the median cosine between the two halves' C⁻¹k."""
    source: str
    """Hash of model, text and token count: the cache key."""


def estimate_covariance(
    lm: LM,
    layers: Sequence[int],
    *,
    text: Sequence[str] | None = None,
    tokens: int,
    seed: int = 0,
    cache: bool = True,
    progress: Progress | None = None,
) -> Covariance:
    """E[k kᵀ] of the down-projection inputs of several layers, from one pass over plain text.

    The pass stops after the highest layer and never touches the head. It ends early once two halves of the text
    agree: median cosine of C_a⁻¹k and C_b⁻¹k at least 0.99 over 64 keys, in every layer. Start tokens and padding
    stay out: their activations are outliers. Patches on the model are set aside meanwhile.

    Args:
        text: plain text; None: the model's own samples (temperature 1), so no corpus is needed. They come with
            lmpatch for the packaged models at 10 d_ff tokens and seed 0; another model writes them first.
        tokens: at most this many keys; 10 to 20 times d_ff is enough.
        cache: keep the result in the user's cache, keyed by weights, text, count and seed, and what an interrupted
            call has done.
    Source: Meng et al. 2022 (arXiv:2202.05262) app. E.5; that a few times d_ff tokens suffice: arXiv:2506.04226.
    """
    corpus = hash_json(list(text)) if text is not None else f"own samples, seed {seed}"
    with suspended(lm):
        source = hash_json([lm.fingerprint(), str(lm.dtype), corpus, tokens, seed, LENGTH, AGREE])
        folder = cache_folder(source)
        kept = _read(folder, layers) if cache else None
        if kept is not None:
            return Covariance(*kept, source)
        if text is not None:
            rows = _text_rows(lm, text, tokens)
        else:
            rows = own_rows(lm, tokens, seed, keep=cache, progress=progress)
        wanted = sorted(set(layers))
        found, count, agreement = _accumulate(lm, rows, wanted, progress, folder if cache else None)
    if cache:
        _write(folder, found, count, agreement)
    return Covariance(found, count, agreement, source)


def cache_folder(source: str) -> Path:
    """Where moments of that hash are cached, and what is computed from them."""
    return cache_dir() / "moments" / source[:32]


def memory(lm: LM, layers: int) -> int:
    """Bytes an estimate takes on top of the model: two halves and their sum per layer, and the factors in fp64."""
    return (3 * layers * 4 + 4 * 8) * max(lm.layout.widths) ** 2


@dataclass
class _Sums:
    """What a pass over text has added up so far."""

    halves: list[dict[int, Tensor]]
    """Two halves of the text: layer → [f, f] sum of k kᵀ, fp32."""
    counts: list[int]
    """Keys in each half."""
    row: int = 0
    """The first row of text that is not in it."""
    checked: int = 0
    """Keys at the last look whether the halves agree."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """Layer → [n, f] of the last forward."""


def _accumulate(
    lm: LM, rows: Tensor, layers: list[int], progress: Progress | None, folder: Path | None = None
) -> tuple[dict[int, Tensor], int, float]:
    """Sums over rows [n, T] of ids, two halves apart, until they agree. After Ctrl-C they stay in ``folder``."""
    widths = lm.layout.widths
    sums = (_read_sums(folder, lm, layers) if folder else None) or _Sums(
        [{i: torch.zeros(widths[i], widths[i], device=lm.device) for i in layers} for _ in range(2)],
        [0, 0],
    )
    try:
        agreement = _pass(lm, rows, layers, sums, progress)
    except KeyboardInterrupt:
        if folder and sums.row:
            _write_sums(folder, sums)
        raise
    total = sum(sums.counts)
    if not min(sums.counts):
        raise BadInput(f"the text gives {total} tokens, too few for second moments. Give at least {2 * ROWS * LENGTH}.")
    a, b = sums.halves
    return {layer: (a[layer] + b[layer]) / total for layer in layers}, total, agreement


def _pass(lm: LM, rows: Tensor, layers: list[int], sums: _Sums, progress: Progress | None) -> float:
    """Add the rows from ``sums.row`` on; ends once the halves agree, and returns how well they do."""
    widest = max(lm.layout.widths[i] for i in layers)
    agreement, what = 0.0, f"second moments of {len(layers)} layer{'s' * (len(layers) > 1)}"
    while sums.row < len(rows):
        half = (sums.row // ROWS) % 2
        ids = rows[sums.row : sums.row + ROWS].to(lm.device)
        pending = _keys(lm, ids, layers)
        sums.keys, count = dict(pending), len(pending[layers[0]])
        try:
            _add(sums.halves[half], pending)
        except KeyboardInterrupt:  # no layer may have a batch that another lacks
            _add(sums.halves[half], pending)
            raise
        finally:
            sums.counts[half] += count
            sums.row += len(ids)
        last, done = sums.row >= len(rows), sum(sums.counts)
        if progress:
            progress(sums.row, len(rows), what)
        if min(sums.counts) and (last or done >= 2 * max(sums.checked, widest)):  # at 2 f, 4 f, 8 f, ... keys
            sums.checked = done
            agreement = _agree(sums, layers)
            if agreement >= AGREE:
                break
    return agreement


@torch.no_grad()
def _keys(lm: LM, ids: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """Layer → [n, f] the down-projection's inputs, fp32, without those of start and padding tokens."""
    starts = {lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id, lm.tokenizer.pad_token_id} - {None}
    wanted = ~torch.isin(ids.reshape(-1), torch.tensor(sorted(starts), device=ids.device))
    keys: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            keys[layer] = args[0].reshape(-1, args[0].shape[-1])[wanted].float()

        return hook

    mask = torch.ones_like(ids)
    with hooked(*(Hook(lm.module(lm.layout.downs[i]), keep(i), before=True) for i in layers)):
        blocks(lm, ids, mask, position_ids=positions(mask), last=layers[-1])
    return keys


def _add(sums: dict[int, Tensor], pending: dict[int, Tensor]) -> None:
    """Add each layer's keys to its sum and take them off the list."""
    for layer in list(pending):
        keys = pending[layer]
        sums[layer].addmm_(keys.T, keys)
        del pending[layer]


def _agree(sums: _Sums, layers: list[int]) -> float:
    """The lowest agreement of the two halves over the layers, watched at some keys of the last forward."""
    (a, b), (n, m) = sums.halves, sums.counts
    return min(_agreement([a[layer] / n, b[layer] / m], sums.keys[layer][:PROBES]) for layer in layers)


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
    (folder / PARTIAL).unlink(missing_ok=True)


def _read_sums(folder: Path, lm: LM, layers: list[int]) -> _Sums | None:
    """The sums of an interrupted call for just these layers."""
    try:
        tensors = load_file(folder / PARTIAL, str(lm.device))
    except (OSError, SafetensorError):
        return None
    facts = tensors.pop("facts").tolist()
    if set(tensors) != {f"{half}.{layer}" for half in range(2) for layer in layers}:
        return None
    return _Sums([{i: tensors[f"{half}.{i}"] for i in layers} for half in range(2)], facts[:2], facts[2], facts[3])


def _write_sums(folder: Path, sums: _Sums) -> None:
    tensors = {f"{half}.{layer}": c.cpu() for half in range(2) for layer, c in sums.halves[half].items()}
    tensors["facts"] = torch.tensor([*sums.counts, sums.row, sums.checked])
    with replacing(folder / PARTIAL) as path:
        save_file(tensors, path)
