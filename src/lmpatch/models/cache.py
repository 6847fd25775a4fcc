"""The user cache: ``.gguf`` files converted once into ordinary Hugging Face folders."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInput, MissingExtra
from ..files import cache_dir
from ..progress import Progress

CHUNK = 1 << 20


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def converted(name: str, sha256: str, make: Callable[[Path], Path], progress: Progress | None = None) -> Path:
    """The folder that holds the ``.gguf`` file of this hash as fp32 safetensors; made at the first call.

    The folder appears complete or not at all. A second process waits for the first; what a killed one left behind is
    cleared by the next.

    Args:
        name: start of the folder's name, for people.
        sha256: what the folder is found by.
        make: receives an empty folder and returns the path of the ``.gguf`` file, which it may have put there.
    Raises:
        MissingExtra: the ``gguf`` package is not installed.
        BadInput: transformers cannot read the file.
    """
    from filelock import FileLock

    folder = cache_dir() / f"{name}-{sha256[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        if importlib.util.find_spec("gguf") is None:
            raise MissingExtra('reading a .gguf file needs the gguf package: pip install "lmpatch[gemma]"')
        work = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(work, ignore_errors=True)
        (work / "gguf").mkdir(parents=True)
        try:
            file = make(work / "gguf")
            what = f"converting {name} (once; a minute for 270M weights)"
            if progress:
                progress(0, 1, what)
            _convert(file, work / "model")
            os.replace(work / "model", folder)
            if progress:
                progress(1, 1, what)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers; ``progress`` is ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _convert(file: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise BadInput(f"transformers cannot read {file.name} as GGUF: {error}") from error
    for trace in ("hf_quantizer", "is_quantized", "quantization_method"):  # or save_pretrained refuses
        vars(model).pop(trace, None)
    vars(model.config).pop("quantization_config", None)
    with quiet():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _slim(out)


def _slim(folder: Path) -> None:
    """Halve the time the tokenizer takes to load: transformers then parses the large JSON once, not three times.

    The config names the plain fast class, which takes ``tokenizer.json`` as it is, and lists the added tokens, which
    would be searched for otherwise. The JSON loses its indentation.
    """
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["added_tokens_decoder"] = {str(token["id"]): _without_id(token) for token in tokenizer["added_tokens"]}
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        (folder / name).write_text(text, encoding="utf-8")


def _without_id(token: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in token.items() if key != "id"}
