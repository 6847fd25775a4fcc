"""The loss of every token of a text: one pass of the model, the head in chunks, 19 bytes kept for each token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor

from ..data.context import InContext
from ..errors import BadInput
from ..inference.forward import HEAD_CHUNK, blocks, logits, positions
from ..inference.interventions import stored_changes, streams
from ..inference.tokens import batches_of_tokens, join, padded, tokenizer_hash
from ..models.lm import LM
from ..patches.ledger import applied
from ..progress import Progress
from ..provenance import hash_json
from ..tensor_file import read, write

EVERY = 20.0  # seconds between two writes of what is done
LEAST = 4  # tokens of a document: its first quarter is read and not scored
FIELDS = ("document", "target", "nll", "hit", "confidence", "rank", "seen", "piece")


@dataclass(frozen=True)
class Config:
    """How a text is read."""

    window: int = 256
    """Tokens that are read in one piece. A longer document is cut."""
    lead: int = 16
    """First tokens of a piece that are read and not scored: its prompt, which a memory looks up. Of a short piece the
    first quarter."""
    tokens: int = 4096
    """Tokens of a batch, with what is padded."""


@dataclass(frozen=True)
class Piece:
    """A part of a document that the model reads at once."""

    document: int
    prompt: str
    target: str
    tokens: int


@dataclass(frozen=True)
class Losses:
    """One row for each scored token, in the order of the text."""

    document: Tensor
    """[M] int32, the document it stands in."""
    target: Tensor
    """[M] int32, its id."""
    nll: Tensor
    """[M] fp32, its negative log probability in nats."""
    hit: Tensor
    """[M] bool, it is the model's first choice."""
    confidence: Tensor
    """[M] fp16, the probability of the first choice."""
    rank: Tensor
    """[M] int32, how many tokens the model holds likelier."""
    seen: Tensor
    """[M] bool, it stands earlier in the piece: who copies would know it."""
    piece: Tensor
    """[M] int32, the piece it stands in."""
    model: str
    fingerprint: str
    """Of the model without patches."""
    patches: tuple[str, ...]
    """Methods of the patches that were on."""
    tokenizer: str
    """Hash of the tokenizer."""
    vocab: int
    """V, logits of the head."""
    text: str
    """Hash of the text and of how it was cut: equal ones can be compared token by token."""

    def __len__(self) -> int:
        return len(self.nll)

    @property
    def documents(self) -> int:
        """Documents with at least one scored token."""
        return len(self.document.unique())

    @property
    def mean(self) -> float:
        """L_avg, nats per token."""
        return float(self.nll.double().mean())

    @cached_property
    def types(self) -> tuple[Tensor, Tensor]:
        """Tokens that occur, sorted [K], and for each position which of them it is [M]."""
        values, places = torch.unique(self.target, return_inverse=True)
        return values.long(), places

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file."""
        write(Path(path), self._head(), {name: getattr(self, name) for name in FIELDS})

    def _head(self) -> dict[str, str]:
        head = {"model": self.model, "fingerprint": self.fingerprint, "patches": json.dumps(self.patches)}
        return head | {"tokenizer": self.tokenizer, "vocab": str(self.vocab), "text": self.text}


def load_losses(path: str | Path) -> Losses:
    """What ``Losses.save`` or a stopped ``measure`` wrote.

    Raises:
        BadInput: no such file, or something else.
    """
    head, tensors = read(Path(path), BadInput)
    if set(head) != {"model", "fingerprint", "patches", "tokenizer", "vocab", "text"} or set(tensors) != set(FIELDS):
        raise BadInput(f"{path} holds no losses of tokens. Write one with `lmpatch audit -o`.")
    return _made([tensors[name] for name in FIELDS], head)


def _made(columns: Sequence[Tensor], head: Mapping[str, str]) -> Losses:
    """Losses of the columns of ``FIELDS``, and of what ``_head`` gives."""
    document, target, nll, hit, confidence, rank, seen, piece = columns
    return Losses(
        document, target, nll, hit, confidence, rank, seen, piece, head["model"], head["fingerprint"],
        tuple(json.loads(head["patches"])), head["tokenizer"], int(head["vocab"]), head["text"],
    )  # fmt: skip


def pieces(lm: LM, documents: Sequence[str], cfg: Config) -> list[Piece]:
    """The documents in pieces of ``window`` tokens, each a prompt and what is scored. A prompt ends where a word does,
    near ``lead`` tokens; without such a place there is none. What is shorter than ``LEAST`` tokens is left out.

    Raises:
        BadInput: a setting out of range, or nothing is left.
    """
    if not 1 <= cfg.lead < cfg.window or cfg.tokens < 1:
        raise BadInput(
            f"window is {cfg.window}, lead {cfg.lead}, tokens {cfg.tokens}. Wanted: 1 <= lead < window, tokens >= 1."
        )
    if lm.window is not None and cfg.window >= lm.window:
        raise BadInput(f"window is {cfg.window}, and {lm.name} reads {lm.window} tokens. Give less, one is its start.")
    found: list[Piece] = []
    encoded = lm.tokenizer(list(documents), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for i, (text, offsets) in enumerate(zip(documents, encoded["offset_mapping"], strict=True)):
        start = 0
        while len(offsets) - start >= LEAST:
            end = min(start + cfg.window, len(offsets))
            if end < len(offsets):
                end = next((k for k in range(end, start + cfg.window // 2, -1) if _apart(text, offsets[k][0])), end)
            lead = start + min(cfg.lead, (end - start) // 4)
            near = sorted(range(start + 1, end), key=lambda k: abs(k - lead))
            border = next((offsets[k][0] for k in near if _apart(text, offsets[k][0])), offsets[start][0])
            a, b = offsets[start][0], offsets[end][0] if end < len(offsets) else len(text)
            if text[border:b].strip():
                found.append(Piece(i, text[a:border], text[border:b], end - start))
            start = end
    if not found:
        raise BadInput(f"none of {len(documents)} documents has {LEAST} tokens. Give longer ones.")
    return found


def _apart(text: str, at: int) -> bool:
    """A prompt may end before this character: nothing goes between the two sides, and no word is cut."""
    return join(text[at - 1 : at], text[at : at + 1]) == text[at - 1 : at + 1]


@torch.no_grad()
def measure(
    lm: LM,
    documents: Sequence[str],
    cfg: Config = Config(),
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Losses:
    """Read the documents once and keep the loss of each token. Patches on the model act as they do in an answer: a
    memory looks up how a piece begins, and rules that compare two contexts leave text without one as it is.

    Args:
        out: a file that is written as the work goes on, and gone on from.
    Raises:
        BadInput: see ``pieces``; or the file is of another model or text.
    """
    whole = pieces(lm, documents, cfg)
    on = applied(lm)
    key = hash_json([[asdict(piece) for piece in whole], [cfg.window, cfg.lead]])[:24]
    patches = tuple(f"{one.patch.method} {one.patch.hash()[:12]}" for one in on)
    head = {"model": lm.name, "fingerprint": lm.fingerprint(), "patches": json.dumps(patches), "text": key}
    head |= {"tokenizer": tokenizer_hash(lm), "vocab": str(lm.layout.vocab)}
    parts: list[tuple[Tensor, ...]] = []
    if out is not None and Path(out).exists():
        kept = load_losses(out)
        if (kept.fingerprint, kept.text, kept.patches) != (head["fingerprint"], key, patches):
            raise BadInput(f"{out} is of another model, patch or text. Move it away, or give another --out.")
        parts.append(tuple(getattr(kept, field) for field in FIELDS))

    def joined() -> Losses:
        values = [torch.cat(column) for column in zip(*parts, strict=True)]
        order = values[-1].argsort(stable=True)
        return _made([value[order] for value in values], head)

    known = set(parts[0][-1].unique().tolist()) if parts else set()
    todo = [i for i in range(len(whole)) if i not in known]
    done, total, wrote = sum(whole[i].tokens for i in known), sum(piece.tokens for piece in whole), monotonic()
    batches = batches_of_tokens([whole[i].tokens for i in todo], cfg.tokens)
    try:
        for batch in batches:
            numbers = [todo[k] for k in batch]
            parts.append(_scored(lm, [whole[i] for i in numbers], numbers))
            done += sum(whole[i].tokens for i in numbers)
            if out is not None and monotonic() - wrote > EVERY:
                joined().save(out)
                wrote = monotonic()
            if progress:
                progress(done, total, "reading tokens")
    finally:
        if out is not None and parts:
            joined().save(out)
    return joined()


def _scored(lm: LM, batch: Sequence[Piece], numbers: Sequence[int]) -> tuple[Tensor, ...]:
    """The columns of ``Losses`` for some pieces, on the CPU."""
    with lm.lock:
        inputs = streams(
            lm.plain, [InContext(piece.prompt, piece.prompt) for piece in batch], [piece.target for piece in batch]
        )
        rows = [pair[0] for pair in inputs.rows]
        ids, mask = padded(lm, [row.ids for row in rows], "right")
        starts = torch.tensor([max(1, row.target) for row in rows], device=lm.device)
        states = blocks(
            lm, ids, mask, position_ids=positions(mask), vectors=inputs.vectors, prompt_end=starts - 1,
            changes=stored_changes(lm, rows),
        )  # [n, T, d]  # fmt: skip
        columns = torch.arange(ids.shape[1], device=lm.device)
        scored = mask.bool() & (columns >= starts[:, None])
        row, column = scored.nonzero(as_tuple=True)  # row after row
        labels, before = ids[row, column], states[row, column - 1]
        parts = []
        for label, hidden in zip(labels.split(HEAD_CHUNK), before.split(HEAD_CHUNK), strict=True):
            z = logits(lm, hidden)  # [c, V]
            whole, own = z.logsumexp(-1), z.gather(1, label[:, None])[:, 0]
            best = z.max(-1)
            parts.append((whole - own, best.indices == label, (best.values - whole).exp(), (z > own[:, None]).sum(-1)))
    nll, hit, confidence, rank = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    earlier = [_seen(row.ids, max(1, row.target)) for row in rows]
    lengths = torch.tensor([len(flags) for flags in earlier])
    document = torch.tensor([piece.document for piece in batch], dtype=torch.int32).repeat_interleave(lengths)
    piece = torch.tensor(numbers, dtype=torch.int32).repeat_interleave(lengths)
    seen = torch.tensor([flag for flags in earlier for flag in flags])
    target, rank = labels.cpu().int(), rank.int()
    return document, target, nll.float(), hit, confidence.half(), rank, seen, piece


def _seen(ids: Sequence[int], start: int) -> list[bool]:
    """Of the tokens from ``start`` on, which stand earlier in the row."""
    known, flags = set(ids[:start]), []
    for token in ids[start:]:
        flags.append(token in known)
        known.add(token)
    return flags
