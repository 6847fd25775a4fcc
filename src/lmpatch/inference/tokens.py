"""From text to token rows: where the target begins, where the subject ends, padding."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.matching import find
from ..errors import BadInput, SubjectNotFound
from ..models.lm import LM


@dataclass(frozen=True)
class Row:
    """One tokenised text, beginning-of-sequence token included where the tokenizer adds one."""

    ids: tuple[int, ...]
    target: int
    """Index of the first target token; ``len(ids)`` without a target."""
    subject_last: int | None = None
    """Index of the last token that overlaps the subject."""
    subject_first: int | None = None
    """Index of the first one."""


def join(prompt: str, target: str) -> str:
    """Prompt and target as one text.

    A blank goes between them only if neither side has white space there and neither is written in a script
    without blanks (CJK).
    """
    if not prompt or not target or prompt[-1].isspace() or target[0].isspace():
        return prompt + target
    if _wide(prompt[-1]) or _wide(target[0]):
        return prompt + target
    return f"{prompt} {target}"


def statement(prompt: str, target: str) -> str:
    """The fact as a sentence: ``The Eiffel Tower is in Rome.``"""
    text = join(prompt, target)
    return text if text[-1] in ".!?" else text + "."


def _wide(char: str) -> bool:
    return unicodedata.east_asian_width(char) in "WF"


def encode(lm: LM, prompt: str, target: str = "", subject: str = "") -> Row:
    """Tokenise prompt and target once, as one text, and find their border by character offsets.

    Tokenising the target alone would add a second beginning-of-sequence token on some tokenizers and split
    words where the model never sees them split. A token that spans the border counts as target. Where the model has a
    chat template, the prompt is the user's message and the target the beginning of the reply (``LM.plain``: neither).

    Raises:
        SubjectNotFound: the subject is not in the prompt, or no token overlaps it.
        BadInput: the target tokenises to nothing.
    """
    return encode_all(lm, [prompt], [target], [subject])[0]


def encode_all(
    lm: LM,
    prompts: Sequence[str],
    targets: Sequence[str] | None = None,
    subjects: Sequence[str] | None = None,
    after: Sequence[int] | None = None,
) -> list[Row]:
    """``encode`` for many rows in one tokenizer call.

    Args:
        after: for each row, where in the prompt the search for the subject begins (behind a prefix).
    """
    if not prompts:
        return []
    targets = targets or [""] * len(prompts)
    subjects = subjects or [""] * len(prompts)
    after = after or [0] * len(prompts)
    heads = 0
    if lm.chat:
        prompts = [lm.chat.head + prompt + lm.chat.tail for prompt in prompts]
        heads = len(lm.chat.head)
    texts = [
        prompt + target if lm.chat else join(prompt, target) for prompt, target in zip(prompts, targets, strict=True)
    ]
    encoded = lm.tokenizer(texts, return_offsets_mapping=True)
    rows = []
    for i, (prompt, target, subject) in enumerate(zip(prompts, targets, subjects, strict=True)):
        ids, offsets = encoded["input_ids"][i], encoded["offset_mapping"][i]
        border = next((k for k, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
        if target and border == len(ids):
            raise BadInput(f"the target {target!r} of {prompt!r} tokenises to nothing. Give a visible answer.")
        span = _subject(prompt, subject, offsets, heads + after[i]) if subject else range(0)
        rows.append(Row(tuple(ids), border, *((span[-1], span[0]) if span else ())))
    return rows


def _subject(prompt: str, subject: str, offsets: Sequence[tuple[int, int]], after: int) -> Sequence[int]:
    """Indices of the tokens that overlap the subject."""
    start = find(prompt, subject, after)
    over = [k for k, (a, b) in enumerate(offsets) if a < start + len(subject) and b > start and b > a]
    if start < 0 or not over:
        raise SubjectNotFound(
            f"subject {subject!r} does not occur in prompt {prompt!r}. Write the subject exactly as the prompt does."
        )
    return over


def batches_of_rows(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Places of rows, the short ones first, so many to a batch; rows of near length share one, so little is padded."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def batches_of_tokens(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """As ``batches_of_rows``, of so many tokens at most with what is padded; a longer row has a batch to itself."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[i] > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def pad_id(lm: LM) -> int:
    """The id that fills short rows; it is masked, so any id would do."""
    found = lm.tokenizer.pad_token_id
    return int(found) if found is not None else 0


def pad(rows: Sequence[Sequence[int]], fill: int, side: str = "left") -> tuple[Tensor, Tensor]:
    """Rows of ids as one batch.

    Returns:
        ids [n, longest] and mask [n, longest], int64, mask 1 at real tokens.
    """
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill)  # [n, T]
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=ids.dtype)
        mask[i, where] = 1
    return ids, mask
