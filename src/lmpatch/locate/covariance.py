"""Second moments C = E[k kᵀ] of down-projection inputs, all layers in one pass, cached by what they depend on.

They are kept below ``files.cache_dir()`` in ``moments/{hash of model, text, count, seed}/``, one file a layer of
4 d_ff² bytes (17 MB for Gemma-3-270M), with their Cholesky factors and eigenvectors beside them. After Ctrl-C the sums
so far stay there as ``partial.safetensors``, twice that a layer, until the next call has gone on from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import tensor_file
from ..errors import BadInput
from ..files import cache_dir
from ..inference.forward import blocks, positions
from ..inference.tokens import encode_all
from ..models.hooks import Hook, hooked
from ..models.lm import LM
from ..patches.ledger import suspended
from ..progress import Progress
from ..provenance import hash_json, hash_tensor
from .samples import LENGTH, kept, own_rows
from .solve import JITTER, eigenvectors, factor, solve

ROWS = 8  # rows per forward
PARTIAL = "partial.safetensors"
PROBES = 64  # keys that watch whether the estimate has settled
TOO_FEW = "moment_tokens is {}, too few for second moments. Set it to at least {}, or leave it out."
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
    lm: LM, layers: Sequence[int], *, text: Sequence[str] | None = None, tokens: int | None = None,
    seed: int = 0, cache: bool = True, progress: Progress | None = None,
) -> Covariance:  # fmt: skip
    """E[k kᵀ] of the down-projection inputs of several layers, from one pass over plain text.

    The pass stops after the highest layer and never touches the head. It ends early once two halves of the text
    agree: median cosine of C_a⁻¹k and C_b⁻¹k at least 0.99 over 64 keys, in every layer. Start tokens and padding
    stay out: their activations are outliers. Patches on the model are set aside meanwhile.

    Args:
        text: plain text; None: the model's own samples (temperature 1), so no corpus is needed. They come with
            lmpatch for the packaged models at 10 d_ff tokens and seed 0; another model writes them first.
        tokens: at most this many keys; 10 to 20 times d_ff is enough. None: 10 times.
        cache: keep the result in the user's cache, keyed by weights, text, count and seed, and what an interrupted
            call has done.
    Raises:
        BadInput: too little text, or too few tokens.
    Source: Meng et al. 2022 (arXiv:2202.05262) app. E.5; that a few times d_ff tokens suffice: arXiv:2506.04226.
    """
    if tokens is None:
        tokens = max(10 * max(lm.layout.widths[i] for i in layers), 2 * ROWS * LENGTH if text is not None else 0)
    if text is None and tokens <= ROWS * (LENGTH - 1):  # what it writes would be one forward
        raise BadInput(TOO_FEW.format(tokens, 2 * ROWS * (LENGTH - 1)))
    rows = None if text is None else text_rows(lm, text, tokens)
    corpus = f"own samples, seed {seed}" if rows is None else hash_tensor(rows, exact=True)
    with suspended(lm):
        source = hash_json([lm.fingerprint(), str(lm.dtype), corpus, tokens, seed, LENGTH, AGREE])
        folder = _folder(source) if cache else None
        if folder and (found := _read(folder, layers)):
            return Covariance(*found, source)
        if rows is None:
            rows = own_rows(lm, tokens, seed, keep=cache, progress=progress)
        c, count, agreement = accumulate(lm, rows, sorted(set(layers)), folder, progress)
    if folder:
        for layer, value in c.items():
            head = _head(folder, layer) | {"tokens": str(count), "agreement": repr(agreement)}
            tensor_file.write(folder / f"{layer}.safetensors", head, {"c": value.cpu()})
        (folder / PARTIAL).unlink(missing_ok=True)
    return Covariance(c, count, agreement, source)


def memory(lm: LM, layers: int) -> int:
    """Bytes an estimate takes on top of the model: three sums per layer, and the factors in fp64."""
    return (3 * layers * 4 + 4 * 8) * max(lm.layout.widths) ** 2


@dataclass(frozen=True)
class _Sums:
    """What a pass over text has added up so far: one value, so that Ctrl-C finds each forward in it whole or not."""

    halves: tuple[dict[int, Tensor], ...]
    """Two halves of the text: layer → [f, f] sum of k kᵀ, fp32."""
    counts: tuple[int, ...] = (0, 0)
    """Keys in each half."""
    row: int = 0
    """The first row of text that is not in it."""
    looked: int = 0
    """Keys at the last look whether the halves agree."""
    agreement: float = 0.0
    """What was found then."""


def accumulate(
    lm: LM, rows: Tensor, layers: list[int], folder: Path | None = None, progress: Progress | None = None
) -> tuple[dict[int, Tensor], int, float]:
    """Means over rows [n, T] of ids, two halves apart, until they agree; how many keys, and how well they agree.

    Args:
        folder: where the sums stay after Ctrl-C, and what an earlier call has left there is gone on with.
    """
    what = f"second moments of {len(layers)} layer{'s' * (len(layers) > 1)}"
    sums = _read_sums(folder, lm, layers) if folder else None
    if sums is None:
        sizes = {i: lm.layout.widths[i] for i in layers}
        sums = _Sums(tuple({i: torch.zeros(f, f, device=lm.device) for i, f in sizes.items()} for _ in range(2)))
    try:
        while sums.row < len(rows) and sums.agreement < AGREE:
            sums = _added(lm, rows, layers, sums)
            if progress:
                progress(sums.row, len(rows), what)
    except KeyboardInterrupt:
        if folder and sums.row:
            tensors = {f"{half}.{i}": c.cpu() for half in range(2) for i, c in sums.halves[half].items()}
            facts = [*sums.counts, sums.row, sums.looked, sums.agreement]
            tensor_file.write(folder / PARTIAL, _head(folder, layers) | {"facts": json.dumps(facts)}, tensors)
        raise
    total = sum(sums.counts)
    if not min(sums.counts):
        raise BadInput(f"the text gives {total} tokens, too few for second moments. Give at least {2 * ROWS * LENGTH}.")
    a, b = sums.halves
    return {layer: (a[layer] + b[layer]) / total for layer in layers}, total, sums.agreement


def _added(lm: LM, rows: Tensor, layers: list[int], sums: _Sums) -> _Sums:
    """With one more forward; at 2 f keys, wherever they may agree from then on (the error falls with the keys at
    best), and at the end also a look whether the halves agree."""
    ids = rows[sums.row : sums.row + ROWS].to(lm.device)
    keys = _keys(lm, ids, layers)
    halves, counts, half = list(sums.halves), list(sums.counts), (sums.row // ROWS) % 2
    halves[half] = {i: c.addmm(keys[i].T, keys[i]) for i, c in halves[half].items()}
    counts[half] += len(keys[layers[0]])
    row, done, looked, agreement = sums.row + len(ids), sum(counts), sums.looked, sums.agreement
    widest = max(lm.layout.widths[i] for i in layers)
    due = max(2 * looked, looked * (1 - agreement) / (1 - AGREE), 2 * widest)
    if min(counts) and (row >= len(rows) or done >= due):
        looked = done
        agreement = min(_agreement([c[i] / n for c, n in zip(halves, counts, strict=True)], keys[i]) for i in layers)
    return _Sums(tuple(halves), tuple(counts), row, looked, agreement)


def _agreement(estimates: list[Tensor], keys: Tensor) -> float:
    a, b = (solve(factor(c), keys[:PROBES].T) for c in estimates)  # [f, probes]
    return float(F.cosine_similarity(a, b, dim=0).median())


@torch.no_grad()
def _keys(lm: LM, ids: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """Layer → [n, f] the down-projection's inputs, fp32, without those of start and padding tokens."""
    starts = {lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id, lm.tokenizer.pad_token_id} - {None}
    wanted = ~torch.isin(ids.reshape(-1), torch.tensor(sorted(starts), device=ids.device))
    keys: dict[int, Tensor] = {}

    def keep(layer: int, _: Any, args: tuple[Tensor, ...]) -> None:
        keys[layer] = args[0].reshape(-1, args[0].shape[-1])[wanted].float()

    mask = torch.ones_like(ids)
    with hooked(*(Hook(lm.module(lm.layout.downs[i]), partial(keep, i), before=True) for i in layers)):
        blocks(lm, ids, mask, position_ids=positions(mask), last=layers[-1])
    return keys


def text_rows(lm: LM, text: Sequence[str], tokens: int) -> Tensor:
    """Token ids [n, LENGTH] of the text, each row opened as the tokenizer opens a text.

    Raises:
        BadInput: too little text, or too few tokens.
    """
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
        least = 2 * ROWS * step
        if tokens <= len(body):
            raise BadInput(TOO_FEW.format(tokens, least))
        raise BadInput(f"the text gives {len(body)} tokens, too few for second moments. Give at least {least}.")
    return torch.tensor(rows)


def _folder(source: str) -> Path:
    return cache_dir() / "moments" / source[:32]


def _head(folder: Path, layers: int | list[int]) -> dict[str, str]:
    return {"moments": folder.name, "layers": str(layers)}


def _read(folder: Path, layers: Sequence[int]) -> tuple[dict[int, Tensor], int, float] | None:
    found = [kept(folder / f"{layer}.safetensors", _head(folder, layer)) for layer in layers]
    files = [file for file in found if file]
    if len(files) < len(layers):
        return None
    c = {layer: tensors["c"] for layer, (_, tensors) in zip(layers, files, strict=True)}
    return c, int(files[-1][0]["tokens"]), min(float(head["agreement"]) for head, _ in files)


def _read_sums(folder: Path, lm: LM, layers: list[int]) -> _Sums | None:
    """The sums of an interrupted call for just these layers."""
    if not (file := kept(folder / PARTIAL, _head(folder, layers))):
        return None
    n, m, row, looked, agreement = json.loads(file[0]["facts"])
    halves = tuple({i: file[1][f"{half}.{i}"].to(lm.device) for i in layers} for half in range(2))
    return _Sums(halves, (n, m), row, looked, agreement)


def cholesky(
    moments: Covariance, layer: int, device: torch.device, *, weight: float = 1.0, ridge: float = 0.0
) -> Tensor:
    """Cholesky factor [f, f] of weight · C + (ridge + jitter) · weight · tr(C)/f · I, see ``solve.factor``."""

    def compute(c: Tensor) -> Tensor:
        weighted = c.double() if weight == 1.0 else weight * c.double()
        if ridge:
            weighted = weighted + ridge * weighted.diagonal().mean() * torch.eye(len(c), device=c.device)
        return factor(weighted)

    return _once(moments, layer, device, ["cholesky", weight, ridge, JITTER], compute)


def null_space(moments: Covariance, layer: int, device: torch.device, share: float) -> Tensor:
    """That share of directions which the corpus uses least: orthonormal columns [f, r], lowest eigenvalues first."""
    vectors = _once(moments, layer, device, ["eigenvectors"], eigenvectors)
    return vectors[:, : round(share * len(vectors))]


def _once(
    moments: Covariance, layer: int, device: torch.device, what: list[object], compute: Callable[[Tensor], Tensor]
) -> Tensor:
    """Read it from the cache, or compute it and write it there."""
    c = moments.c[layer]
    head = {"factor": hash_json([hash_tensor(c, exact=True), *what])}
    path = _folder(moments.source) / f"{layer}-{what[0]}-{head['factor'][:16]}.safetensors"
    if file := kept(path, head):
        return file[1]["value"].to(device)
    value = compute(c.to(device))
    tensor_file.write(path, head, {"value": value.cpu()})
    return value
