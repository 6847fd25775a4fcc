"""Text that a model writes itself, for statistics that need text where no corpus is given.

Sampling 20,480 tokens from Gemma-3-270M takes minutes, so the ids that it writes come with lmpatch, in
``locate/sample_ids``, as those of the other packaged model do. Any other model samples once: the ids then stay below
``files.cache_dir()`` in ``samples/`` (four bytes a token), found by the model's fingerprint, its number format, the
count and the seed. What an interrupted run has written is kept there too, and the next goes on from it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from .. import tensor_file
from ..errors import LmpatchError
from ..files import cache_dir
from ..inference.forward import blocks, logits, positions
from ..models.lm import LM
from ..progress import Progress

LENGTH = 128  # tokens per row of text
SHIPPED = Path(__file__).with_name("sample_ids")
EVERY = 10.0  # seconds between two writes of unfinished rows
HEAD_ROWS = 64  # rows of the head at a time


def own_rows(lm: LM, tokens: int, seed: int, *, keep: bool = True, progress: Progress | None = None) -> Tensor:
    """Rows of text from the model itself: ids [n, LENGTH], sampled at temperature 1 from the start token.

    Args:
        tokens: at least this many, start tokens left out.
        keep: read and write the user's cache.
    """
    name, dtype = f"{lm.fingerprint()[:16]}-{tokens}-{seed}", str(lm.dtype).removeprefix("torch.")
    head = {"fingerprint": lm.fingerprint(), "tokens": str(tokens), "seed": str(seed)}
    found = kept(SHIPPED / f"{name}.safetensors", head)
    file = cache_dir() / "samples" / f"{name}-{dtype}.safetensors" if keep else None
    head["dtype"] = dtype
    if file and not found:
        found = kept(file, head)
    return found[1]["ids"].long() if found else _sample(lm, tokens, seed, file, head, progress)


@torch.no_grad()
def _sample(
    lm: LM, tokens: int, seed: int, file: Path | None, head: dict[str, str], progress: Progress | None
) -> Tensor:
    """Write the rows token by token. An interrupted run goes on from its draft, with the same draws."""
    start = lm.tokenizer.bos_token_id
    ids = torch.full((-(-tokens // (LENGTH - 1)), 1), lm.tokenizer.eos_token_id if start is None else start)
    generator = torch.Generator(lm.device).manual_seed(seed)
    draft = {"ids": ids.int(), "state": generator.get_state()}  # one value: Ctrl-C finds a token whole in it, or not
    unfinished = file and file.with_suffix(".partial")
    if unfinished and (found := kept(unfinished, head)):
        draft = found[1]
    ids = new = draft["ids"].long().to(lm.device)  # new: what the cache lacks
    generator.set_state(draft["state"])
    cache = DynamicCache(config=lm.model.config)
    banned = [i for i in lm.tokenizer.all_special_ids if i < lm.layout.vocab]
    begin, first, written, what = time.monotonic(), ids.shape[1], time.monotonic(), ""
    try:
        while ids.shape[1] < LENGTH:
            mask = torch.ones_like(ids)
            state = blocks(lm, new, mask, position_ids=positions(mask)[:, -new.shape[1] :], cache=cache)[:, -1]
            new = _draw(lm, state, banned, generator)
            ids = torch.cat([ids, new], 1)
            draft = {"ids": ids.cpu().int(), "state": generator.get_state()}
            if progress:
                what = what or _announce(tokens, (time.monotonic() - begin) * (LENGTH - first))
                progress(ids.shape[1] - 1, LENGTH - 1, what)
            if unfinished and time.monotonic() - written > EVERY:
                tensor_file.write(unfinished, head, draft)
                written = time.monotonic()
    except KeyboardInterrupt:
        if unfinished:
            tensor_file.write(unfinished, head, draft)
        raise
    if file and unfinished:
        tensor_file.write(file, head | {"model": lm.name}, {"ids": draft["ids"]})
        unfinished.unlink(missing_ok=True)
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


def kept(path: Path, head: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Tensor]] | None:
    """A file that ``tensor_file.write`` wrote with these words in its head; None where it must be made again: there
    is none, it is damaged, or it is of something else."""
    try:
        there, tensors = tensor_file.read(path)
    except LmpatchError:
        return None
    return (there, tensors) if head.items() <= there.items() else None
