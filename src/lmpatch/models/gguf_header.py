"""The head of a ``.gguf`` file: what it says of its tokenizer, and a copy without its lists of tokens.

transformers reads the head once for the config, again for the weights and again for the tokenizer, token by token:
ten seconds each time for the 262,144 tokens of Gemma. Without the lists it takes none.
Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import mmap
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

VERSIONS = (2, 3)
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type -> bytes
UINT32, STRING, ARRAY = 4, 8, 9
TOKENIZER = "tokenizer."


@dataclass(frozen=True)
class Head:
    """What a ``.gguf`` file says of itself that transformers does not pass on."""

    tokens: int = 0
    """How many the tokenizer has; 0: the file does not say."""
    splitter: str = ""
    """How text is cut before tokens are looked up, in llama.cpp's word (``tokenizer.ggml.pre``)."""


def without_tokens(file: Path, out: Path) -> Head | None:
    """Copy a ``.gguf`` without what it lists of its tokens; their number stays, as ``{architecture}.vocab_size``.

    Returns:
        what the head says; None, and nothing copied, where it is of a version or kind not known here.
    """
    with file.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            found = _read(data)
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError):
            return None
        if found is None:
            return None
        head, entries, table, start, alignment = found
        begin = data[:8] + data[8:16] + struct.pack("<Q", len(entries)) + b"".join(entries) + table
        with out.open("wb") as target:
            target.write(begin + bytes(-len(begin) % alignment))
            source.seek(start)
            shutil.copyfileobj(source, target, 1 << 24)
    return head


def _read(data: mmap.mmap) -> tuple[Head, list[bytes], bytes, int, int] | None:
    """Head, entries that stay, the table of tensors, where their data begins and what that is a multiple of."""
    if data[:4] != b"GGUF" or struct.unpack_from("<I", data, 4)[0] not in VERSIONS:
        return None
    tensors, count = struct.unpack_from("<QQ", data, 8)
    at, kept = 24, list[bytes]()
    known: dict[str, int | str] = {"general.alignment": 32}
    for _ in range(count):
        begin = at
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        value, at = _value(data, at + 4, kind)
        known[key] = value
        if kind != ARRAY or not key.startswith(TOKENIZER):
            kept.append(data[begin:at])
    head = Head(int(known.get("tokenizer.ggml.tokens", 0)), str(known.get("tokenizer.ggml.pre", "")))
    size = f"{known['general.architecture']}.vocab_size"
    if head.tokens and size not in known:
        name = size.encode()
        kept.append(struct.pack("<Q", len(name)) + name + struct.pack("<II", UINT32, head.tokens))
    begin = at
    for _ in range(tensors):
        _, at = _string(data, at)
        (dims,) = struct.unpack_from("<I", data, at)
        at += 4 + 8 * dims + 4 + 8  # their number, each, the number format, the place
    alignment = int(known["general.alignment"])
    return head, kept, data[begin:at], at + -at % alignment, alignment


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[int | str, int]:
    """A string or a UINT32, the length of an array, 0 for the rest; and where it ends."""
    if kind == STRING:
        return _string(data, at)
    if kind == ARRAY:
        of, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if of != STRING:
            return count, at + count * SIZES[of]
        for _ in range(count):
            at += 8 + int(struct.unpack_from("<Q", data, at)[0])
        return count, at
    return (int(struct.unpack_from("<I", data, at)[0]) if kind == UINT32 else 0), at + SIZES[kind]


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + length].decode(), at + 8 + length
