"""From text to token rows: where the target begins, where the subject ends, padding."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..data.lines import check_text
from ..data.matching import find
from ..errors import BadInput, SubjectNotFound
from ..models.lm import LM
from ..progress import Progress
from ..provenance import hash_json

Key = TypeVar("Key", bound=Hashable)
End = Literal["answer", "eos"]
"""What may stand behind a target, so that an answer ends with it: see ``end_token``."""


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
    in_context: bool = False
    """The prompt carries a context."""
    changes: tuple[tuple[int, int], ...] = ()
    """Stored changes of weights that act on this row alone: which memory's, and its place there. See
    ``interventions.Insert``."""


def join(prompt: str, target: str) -> str:
    """Prompt and target as one text.

    A blank goes between them only if neither side has white space there and neither is written in a script
    without blanks (CJK).
    """
    border = (prompt[-1:], target[:1])
    apart = all(border) and not any(c.isspace() or unicodedata.east_asian_width(c) in "WF" for c in border)
    return f"{prompt} {target}" if apart else prompt + target


def statement(prompt: str, target: str) -> str:
    """The fact as a sentence: ``The Eiffel Tower is in Rome.``"""
    text = join(prompt, target)
    return text if text[-1] in ".!?" else text + "."


def premise(prompt: str, target: str) -> str:
    """The fact as it goes before a question: a sentence and a blank."""
    return f"{statement(prompt, target)} "


def encode(lm: LM, prompt: str, target: str = "", subject: str = "") -> Row:
    """Tokenise prompt and target once, as one text, and find their border by character offsets.

    Tokenising the target alone would add a second beginning-of-sequence token on some tokenizers and split
    words where the model never sees them split. A token that spans the border counts as target. Special tokens that
    the tokenizer adds behind a text are left out, and of two that begin it one is. Where the model has a
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
    """``encode`` for many rows at once; the search for a subject begins at ``after`` (behind a prefix)."""
    if not prompts:
        return []
    targets = targets or [""] * len(prompts)
    subjects = subjects or [""] * len(prompts)
    after = after or [0] * len(prompts)
    head, tail = (lm.chat.head, lm.chat.tail) if lm.chat else ("", "")
    prompts = [head + prompt + tail for prompt in prompts]
    texts = [prompt + t if lm.chat else join(prompt, t) for prompt, t in zip(prompts, targets, strict=True)]
    check_text(texts)
    encoded = lm.tokenizer(texts, return_offsets_mapping=True, return_special_tokens_mask=True)
    known, bos = len(lm.parameter(lm.layout.weight(lm.layout.embed))), lm.tokenizer.bos_token_id
    rows = []
    for i, (prompt, target, subject) in enumerate(zip(prompts, targets, subjects, strict=True)):
        ids, offsets, added = (encoded[key][i] for key in ("input_ids", "offset_mapping", "special_tokens_mask"))
        count = len(ids)
        while count and added[count - 1] and offsets[count - 1][0] == offsets[count - 1][1]:  # behind the text
            count -= 1
        ids, offsets = ids[:count], offsets[:count]
        while bos is not None and ids[:2] == [bos, bos]:  # one was typed
            ids, offsets = ids[1:], offsets[1:]
        if odd := [token for token in ids if token >= known]:
            name = lm.tokenizer.convert_ids_to_tokens(odd[0])
            raise BadInput(f"the token {name!r} has id {odd[0]}, and {lm.name} {known} embedding rows. Leave it out.")
        border = next((k for k, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
        if target and border == len(ids):
            raise BadInput(f"the target {target!r} of {prompt!r} tokenises to nothing. Give a visible answer.")
        if not subject:
            rows.append(Row(tuple(ids), border))
            continue
        start = find(prompt, subject, len(head) + after[i])
        span = [k for k, (a, b) in enumerate(offsets) if a < start + len(subject) and b > start and b > a]
        if start < 0 or not span:
            said = f"subject {subject!r} does not occur in prompt {prompt!r}."
            raise SubjectNotFound(f"{said} Write the subject exactly as the prompt does.")
        rows.append(Row(tuple(ids), border, span[-1], span[0]))
    return rows


def end_token(lm: LM, kind: End = "answer") -> int:
    """The token that ends an answer. ``answer``: a new line, or of a chat model the end of its turn. ``eos``: the
    end-of-sequence token.

    Raises:
        BadInput: the tokenizer has none.
    """
    newline = [] if kind == "eos" or lm.chat else lm.tokenizer("\n", add_special_tokens=False)["input_ids"]
    found = newline[-1] if newline else lm.tokenizer.eos_token_id
    if found is None:
        raise BadInput(f"the tokenizer of {lm.name} has no token that ends an answer. Leave end out.")
    return int(found)


def ended(lm: LM, rows: Sequence[Row], end: End | None) -> list[Row]:
    """The rows with the end of the answer behind their targets; as they are where ``end`` is None."""
    return [replace(row, ids=(*row.ids, end_token(lm, end))) for row in rows] if end else list(rows)


def batches_of_rows(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Places of rows, the short ones first, so many to a batch; rows of near length share one, so little is padded."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def batches_of_tokens(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """As ``batches_of_rows``, of so many tokens at most with what is padded; a longer row has a batch to itself."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or (len(batches[-1]) + 1) * lengths[i] > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def each_once(
    keys: Iterable[Key], length: Callable[[Key], Any], size: int, progress: Progress | None, what: str
) -> Iterator[list[Key]]:
    """Batches of the different keys, the short ones first; ``progress`` hears of a batch when the next is asked for."""
    queue, size = sorted(dict.fromkeys(keys), key=length), max(1, size)
    for start in range(0, len(queue), size):
        batch = queue[start : start + size]
        yield batch
        if progress:
            progress(start + len(batch), len(queue), what)


def tokenizer_hash(lm: LM) -> str:
    """What tells two tokenizers apart."""
    return hash_json(lm.tokenizer.backend_tokenizer.to_str())[:16]


def pad_id(lm: LM) -> int:
    """The id that fills short rows; it is masked, so any id would do."""
    found = lm.tokenizer.pad_token_id
    return int(found) if found is not None else 0


def pad(rows: Sequence[Sequence[int]], fill: int, side: str = "left") -> tuple[Tensor, Tensor]:
    """Rows of ids as one batch: ids and mask [n, longest], int64, mask 1 at real tokens."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill)  # [n, T]
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=ids.dtype)
        mask[i, where] = 1
    return ids, mask


def padded(lm: LM, rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    """``pad`` for this model, on its device."""
    ids, mask = pad(rows, pad_id(lm), side)
    return ids.to(lm.device), mask.to(lm.device)
