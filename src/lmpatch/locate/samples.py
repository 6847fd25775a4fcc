"""Text that a model writes itself, for statistics that need text where no corpus is given.

Sampling 20,480 tokens from Gemma-3-270M takes minutes, so the ids that it writes come with lmpatch, in
``locate/sample_ids``, as those of the other packaged model do. Any other model samples once: the ids then stay below
``files.cache_dir()`` in ``samples/`` (four bytes a token), found by the model's fingerprint, its number format, the
count and the seed. What an interrupted run has written is kept there too, and the next goes on from it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from ..files import cache_dir, replacing
from ..inference.forward import blocks, logits, positions
from ..models.lm import LM
from ..progress import Progress

LENGTH = 128  # tokens per row of text
SHIPPED = Path(__file__).with_name("sample_ids")
EVERY = 10.0  # seconds between two writes of unfinished rows
HEAD_ROWS = 64  # rows of the head at a time


@dataclass(frozen=True)
class Draft:
    """Rows of text, finished or not."""

    ids: Tensor
    """[n, t] token ids."""
    state: Tensor | None = None
    """Of the generator, where rows are not finished."""


def own_rows(lm: LM, tokens: int, seed: int, *, keep: bool = True, progress: Progress | None = None) -> Tensor:
    """Rows of text from the model itself: ids [n, LENGTH], sampled at temperature 1 from the start token.

    Args:
        tokens: at least this many, start tokens left out.
        keep: read and write the user's cache.
    """
    name = f"{lm.fingerprint()[:16]}-{tokens}-{seed}"
    shipped = _read(SHIPPED / f"{name}.safetensors", lm)
    if shipped is not None:
        return shipped.ids
    if not keep:
        return _sample(lm, tokens, seed, None, progress)
    file = cache_dir() / "samples" / f"{name}-{str(lm.dtype).removeprefix('torch.')}.safetensors"
    kept = _read(file, lm)
    return kept.ids if kept is not None else _sample(lm, tokens, seed, file, progress)


@torch.no_grad()
def _sample(lm: LM, tokens: int, seed: int, file: Path | None, progress: Progress | None) -> Tensor:
    """Write the rows token by token. An interrupted run goes on from its draft, with the same draws."""
    count = -(-tokens // (LENGTH - 1))
    start = lm.tokenizer.bos_token_id
    ids = torch.full((count, 1), lm.tokenizer.eos_token_id if start is None else start, device=lm.device)
    generator = torch.Generator(lm.device).manual_seed(seed)
    partial = file and file.with_suffix(".partial")
    draft = _read(partial, lm) if partial else None
    if draft is not None and draft.state is not None:
        ids = draft.ids.to(lm.device)
        generator.set_state(draft.state)
    cache, new = DynamicCache(config=lm.model.config), ids  # new: what the cache lacks
    banned = [i for i in lm.tokenizer.all_special_ids if i < lm.layout.vocab]
    begin, first, written = time.monotonic(), ids.shape[1], time.monotonic()
    what = ""
    try:
        while ids.shape[1] < LENGTH:
            mask = torch.ones_like(ids)
            state = blocks(lm, new, mask, position_ids=positions(mask)[:, -new.shape[1] :], cache=cache)[:, -1]
            new = _draw(lm, state, banned, generator)
            ids = torch.cat([ids, new], 1)
            if progress:
                what = what or _announce(tokens, (time.monotonic() - begin) * (LENGTH - first))
                progress(ids.shape[1] - 1, LENGTH - 1, what)
            if partial and time.monotonic() - written > EVERY:
                _write(partial, lm, Draft(ids, generator.get_state()))
                written = time.monotonic()
    except KeyboardInterrupt:
        if partial:
            _write(partial, lm, Draft(ids, generator.get_state()))
        raise
    if file and partial:
        _write(file, lm, Draft(ids))
        partial.unlink(missing_ok=True)
    return ids.cpu()


def _draw(lm: LM, state: Tensor, banned: list[int], generator: torch.Generator) -> Tensor:
    """The next token of each row, [n, 1]."""
    chosen = []
    for part in state.split(HEAD_ROWS):
        z = logits(lm, part)
        z[:, banned] = -torch.inf  # a text that ends would leave its row to noise
        chosen.append(torch.multinomial(z.softmax(-1), 1, generator=generator))
    return torch.cat(chosen)


def _announce(tokens: int, seconds: float) -> str:
    """What is being done, and how long it takes by the first token's time."""
    length = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{max(seconds, 1):.0f} seconds"
    return f"the model writes {tokens} tokens of sample text, once (about {length}; text= takes yours instead)"


def _read(file: Path, lm: LM) -> Draft | None:
    """Rows that this model wrote; None where there are none, or another model's, or a torn file."""
    try:
        with safe_open(file, "pt") as opened:
            if (opened.metadata() or {}).get("fingerprint") != lm.fingerprint():
                return None
            state = opened.get_tensor("state") if "state" in opened.keys() else None  # noqa: SIM118
            return Draft(opened.get_tensor("ids").long(), state)
    except (OSError, SafetensorError):
        return None


def _write(file: Path, lm: LM, draft: Draft) -> None:
    tensors = {"ids": draft.ids.cpu().int().contiguous()}
    if draft.state is not None:
        tensors["state"] = draft.state
    with replacing(file) as path:
        save_file(tensors, path, {"fingerprint": lm.fingerprint(), "model": lm.name})
