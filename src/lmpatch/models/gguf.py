"""``.gguf`` files, converted once into ordinary Hugging Face folders in the user's cache.

Below ``files.cache_dir()``, ``{name}-{hash}/`` holds the file of that SHA-256: fp32 weights as safetensors (1.1 GB for
``gemma-3-270m``), config and tokenizer; it can be deleted at any time. ``.partial`` is a conversion that runs or was
killed, ``.lock`` is what two processes that want one model take turns by.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInput, MissingExtra
from ..files import cache_dir, outside
from ..progress import Progress
from ..resources import format_bytes
from .folder import gaps

log = logging.getLogger(__name__)

NEEDED = ("gguf", "accelerate")  # transformers asks for both
ADDED = ("single_word", "lstrip", "rstrip", "normalized", "special")
DIGITS = "smollm"
"""``tokenizer.ggml.pre`` of a tokenizer that takes each digit by itself, which transformers does not know."""
LONG = 256
"""Longer lists in the head of a file are of tokens; those by block are shorter."""


def blocks_of(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a megabyte at a time."""
    with path.open("rb") as file:
        yield from iter(lambda: file.read(1 << 20), b"")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    for block in blocks_of(path):
        digest.update(block)
    return digest.hexdigest()


def converted(name: str, sha256: str, make: Callable[[Path], Path], progress: Progress | None = None) -> Path:
    """The folder that holds the ``.gguf`` file of this hash as fp32 safetensors; it appears complete or not at all.

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
    with outside(f"the cache folder {cache_dir()}"):
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

                def report(share: float) -> None:
                    if progress:
                        progress(round(100 * share), 100, f"converting {name} to fp32, once")

                _convert(file, work / "model", report)
                os.replace(work / "model", folder)
                size = format_bytes(sum(each.stat().st_size for each in folder.iterdir()))
                log.warning("%s is kept as %s (%s); lmpatch cache --clear removes it", name, folder, size)
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


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and tables of transformers; ``progress`` and the errors are ours."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _convert(file: Path, out: Path, report: Callable[[float], None]) -> None:
    """Write the model and tokenizer of ``file`` as an ordinary folder."""
    report(0.0)
    with outside(f"{file.name} as GGUF"), quiet():
        with _reading(lambda share: report(0.05 + 0.5 * share)) as reader:
            model, head = _model(file), reader(file)
            splitter = head.fields.get("tokenizer.ggml.pre")
            blocks = {tensor.name.split(".")[1] for tensor in head.tensors if tensor.name.startswith("blk.")}
            if len(blocks) != (depth := model.config.get_text_config().num_hidden_layers):
                raise BadInput(f"{file.name} holds {len(blocks)} blocks, and its head tells of {depth}.")
        report(0.55)
        with ThreadPoolExecutor(1) as pool:  # the tokenizer is made while the weights are written
            written = pool.submit(model.save_pretrained, out)
            tokenizer = _tokenizer(file, model.config.model_type, "" if splitter is None else _word(splitter))
            report(0.75)
            written.result()
    report(0.9)
    _write_tokenizer(tokenizer, out)
    report(1.0)


def _model(file: Path) -> Any:
    """The model with plain fp32 weights: transformers keeps them packed, where it can, unless asked."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    dense = {} if config is None else {"quantization_config": config(dequantize=True)}
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True, **dense
    )
    model, info = loaded
    if found := gaps(info):
        raise BadInput(f"{file.name} has not the weights its head describes ({found}). Take a whole copy.")
    packed = [name for name, p in model.named_parameters() if p.dtype != torch.float32]
    if packed:
        raise BadInput(f"transformers left {len(packed)} weights of {file.name} packed, {packed[0]} first.")
    for trace in ("hf_quantizer", "is_quantized", "quantization_method"):  # or save_pretrained refuses
        vars(model).pop(trace, None)
    vars(model.config).pop("quantization_config", None)
    return model


def _tokenizer(file: Path, model_type: str, splitter: str) -> Any:
    """The file's tokenizer. Its class is looked up here, as ``AutoTokenizer`` reads the whole config anew for that.

    Args:
        splitter: how text is cut before tokens are looked up, in llama.cpp's word.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    if TOKENIZER_MAPPING_NAMES.get(model_type):
        tokenizer = AutoTokenizer.from_pretrained(**where, tokenizer_type=model_type)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(**where)
    if splitter == DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


@contextmanager
def _reading(report: Callable[[float], None]) -> Iterator[Any]:
    """transformers reads weights with ``report`` in the place of its bar; gives the class that reads heads meanwhile.

    The map of tensor names is made once: it is asked for anew for every module, 313 times for Gemma-3-270M.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reader

    def steps(items: Sequence[Any], **_: Any) -> Iterator[Any]:
        for i, item in enumerate(items):
            report(i / len(items))
            yield item

    light = _light_reader()
    with ExitStack() as stack:
        for module, name, ours in (
            (reader, "tqdm", steps),
            (gguf, "GGUFReader", light),
            (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        ):
            stack.callback(vars(module).update, {name: vars(module).get(name)})
            vars(module)[name] = ours
        yield light


def _light_reader() -> Any:
    """gguf's reader without the lists of tokens: 262,144 take it ten seconds. Their number is kept as ``vocab_size``.

    Format: github.com/ggml-org/ggml, docs/gguf.md.
    """
    import gguf

    kinds = gguf.GGUFValueType

    class Reader(gguf.GGUFReader):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            tokens = self.fields.get("tokenizer.ggml.tokens")
            if tokens is not None and not tokens.data:
                name = f"{_word(self.fields['general.architecture'])}.vocab_size"
                count = tokens._replace(name=name, parts=tokens.parts[-1:], data=[0], types=[kinds.UINT64])
                self.fields.setdefault(name, count)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            data: Any = self.data
            is_list = raw_type == kinds.ARRAY and self.byte_order == "I"
            kind, count = struct.unpack_from("<IQ", data, orig_offs) if is_list else (0, 0)
            if count <= LONG:
                return super()._get_field_parts(orig_offs, raw_type)
            end = orig_offs + 12
            if kind == kinds.STRING:
                data = memoryview(data)
                for _ in range(count):
                    end += 8 + int(struct.unpack_from("<Q", data, end)[0])
            else:
                end += count * self.gguf_scalar_to_np[kinds(kind)]().nbytes
            return end - orig_offs, [self._get(orig_offs + 4, "<u8")], [], [kinds.ARRAY, kinds(kind)]

    return Reader


def _word(field: Any) -> str:
    return bytes(field.parts[-1]).decode()


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
