"""``.gguf`` files, converted once into ordinary Hugging Face folders in the user's cache.

What is on the disk, below ``files.cache_dir()`` (``$LMPATCH_CACHE``, else ``$XDG_CACHE_HOME/lmpatch``, else
``~/.cache/lmpatch``):

- ``{name}-{hash}/``: one folder a file, found by the SHA-256 of its bytes: the weights in fp32 as safetensors (four
  bytes a parameter: 1.1 GB for ``gemma-3-270m``, 0.5 GB for ``smollm2-135m-instruct``), config and tokenizer. It can
  be deleted at any time; the next ``load`` makes it anew.
- ``{name}-{hash}.partial/``: a conversion that runs. What a killed one left is removed by the next conversion.
- ``{name}-{hash}.lock``: empty; two processes that want one model take turns by it.

The moments of a model and its sample texts lie beside them (``locate.covariance``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInput, MissingExtra
from ..files import cache_dir
from ..progress import Progress
from .gguf_header import Head, without_tokens

CHUNK = 1 << 20
NEEDED = ("gguf", "accelerate")  # transformers asks for both
ADDED = ("single_word", "lstrip", "rstrip", "normalized", "special")
DIGITS = "smollm"
"""``tokenizer.ggml.pre`` of a tokenizer that takes each digit by itself, which transformers does not know."""


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
        MissingExtra: a package that reads ``.gguf`` files is not installed.
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
        missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
        if missing:
            raise MissingExtra(f'reading a .gguf file needs {" and ".join(missing)}: pip install "lmpatch[gguf]"')
        work = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(work, ignore_errors=True)
        _clear(folder.parent)
        (work / "gguf").mkdir(parents=True)
        try:
            file = make(work / "gguf")
            _convert(file, work / "model", _steps(progress, f"converting {name} to fp32, once"))
            os.replace(work / "model", folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _clear(folder: Path) -> None:
    """Remove what killed conversions left, those apart that still run."""
    from filelock import FileLock, Timeout

    for work in folder.glob("*.partial"):
        try:
            with FileLock(str(work.with_suffix(".lock")), timeout=0):
                shutil.rmtree(work, ignore_errors=True)
        except Timeout:
            continue


def _steps(progress: Progress | None, what: str) -> Callable[[float], None]:
    """``progress`` as a function of the share that is done, in per cent."""

    def report(share: float) -> None:
        if progress:
            progress(round(100 * share), 100, what)

    return report


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


def _convert(file: Path, out: Path, report: Callable[[float], None] = lambda share: None) -> None:
    """Write the model and tokenizer of ``file`` as an ordinary folder. Temporary files go beside ``out``."""
    report(0.0)
    light = out.with_name("weights.gguf")
    head = without_tokens(file, light)
    try:
        with quiet(), _reading(lambda share: report(0.05 + 0.5 * share)):
            model = _model([light, file] if head else [file])
            report(0.55)
            tokenizer = _tokenizer(file, model.config.model_type, head)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise BadInput(f"transformers cannot read {file.name} as GGUF: {error}") from error
    report(0.75)
    with quiet():
        model.save_pretrained(out)
    report(0.9)
    _write_tokenizer(tokenizer, out)
    report(1.0)


def _model(files: Sequence[Path]) -> Any:
    """The model of the first of these files whose config transformers can read, with plain fp32 weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for file in files:
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        try:
            config = AutoConfig.from_pretrained(**where)
        except KeyError:  # its reader counts the tokens in the list that the copy lacks
            if file is files[-1]:
                raise
            continue
        break
    model = AutoModelForCausalLM.from_pretrained(**where, config=config, dtype=torch.float32, **_dense())
    packed = [name for name, p in model.named_parameters() if p.dtype != torch.float32]
    if packed:
        raise BadInput(f"transformers left {len(packed)} weights of {file.name} packed, {packed[0]} first.")
    for trace in ("hf_quantizer", "is_quantized", "quantization_method"):  # or save_pretrained refuses
        vars(model).pop(trace, None)
    vars(model.config).pop("quantization_config", None)
    return model


def _dense() -> dict[str, Any]:
    """What asks transformers for plain weights. Since 5.17 it keeps them packed where ``kernels`` is installed."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _tokenizer(file: Path, model_type: str, head: Head | None) -> Any:
    """The file's tokenizer. Its class is looked up here, as ``AutoTokenizer`` reads the whole config anew for that."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    if TOKENIZER_MAPPING_NAMES.get(model_type):
        tokenizer = AutoTokenizer.from_pretrained(**where, tokenizer_type=model_type)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(**where)
    if head and head.splitter == DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


@contextmanager
def _reading(report: Callable[[float], None]) -> Iterator[None]:
    """transformers' reader with ``report`` in the place of its bar, which it draws whether asked or not.

    The map of tensor names is made once: the reader asks for it anew for every module, 313 times for Gemma-3-270M.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reader

    def steps(items: Sequence[Any], **_: Any) -> Iterator[Any]:
        for i, item in enumerate(items):
            report(i / len(items))
            yield item

    with ExitStack() as stack:
        for module, name, ours in (
            (reader, "tqdm", steps),
            (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        ):
            stack.callback(vars(module).update, {name: vars(module).get(name)})
            vars(module)[name] = ours
        yield


def _write_tokenizer(tokenizer: Any, out: Path) -> None:
    """Save a tokenizer so that it loads in half the time: transformers then parses the large JSON once, not thrice.

    The config names the plain fast class, which takes ``tokenizer.json`` as it is, and lists the added tokens, which
    would be searched for otherwise. The JSON is not indented.
    """
    tokenizer.save_pretrained(out)
    (out / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["added_tokens_decoder"] = {
        str(i): {"content": token.content} | {name: getattr(token, name) for name in ADDED}
        for i, token in tokenizer.added_tokens_decoder.items()
    }
    text = json.dumps(config, ensure_ascii=False, separators=(",", ":"))
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")
