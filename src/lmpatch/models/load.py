"""``load`` and ``wrap``: the two ways to get an ``LM``."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInput, MissingExtra, UnknownName
from ..files import outside
from ..progress import Progress
from . import hub, number_format, packaged
from .calls import probe_ids
from .discover import discover, verify
from .folder import check_folder, gaps, some
from .gguf import converted, quiet, sha256_file
from .layout import Layout
from .lm import LM

SMALLEST = 16  # weights that are stored in one number, at most: packed ones are eight


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    download: bool = False,
    raw: bool = False,
    partial: bool = False,
    progress: Progress | None = None,
) -> LM:
    """Load a causal language model and its tokenizer.

    Args:
        source: a packaged model (``packaged.models()``: ``"gemma-3-270m"``, ``"smollm2-135m-instruct"``), a Hugging
            Face folder, a ``.gguf`` file (converted to fp32 once and kept in the user's cache), or a hub id.
        dtype: ``"float32"``, ``"bfloat16"``, ..., a ``torch.dtype``, or ``"auto"`` for what the weights are stored in.
            None: bf16 on a GPU that computes in it, else fp32, so that a result depends on no processor.
        device: where the model goes; None: ``cuda`` or ``mps`` where there is one, else ``cpu``.
        device_map: passed to transformers, e.g. ``"auto"`` (needs accelerate); it and a quantization place the model.
        quantization_config: passed to transformers.
        trust_remote_code: allow code that comes with the model to run.
        download: fetch a hub id that is not in the local cache; else the error says its size and licence.
        raw: read prompts as they stand, also where the model has a chat template.
        partial: take weights that are not those the config describes: random numbers stand for what is missing.
        progress: called as ``progress(done, total, what)``.
    Raises:
        BadInput: nothing of that name, an unusable file, weights that are not those the config describes, an unknown
            dtype or device, or a download that was not allowed.
        MissingExtra: an optional package is needed.
        UnknownLayout: the model's parts could not be found, see ``discover``.
    """
    from transformers import AutoTokenizer

    if not isinstance(source, (str, Path)):
        raise BadInput(f"{type(source).__name__} is no name and no path. Call wrap(model, tokenizer) for a model.")
    where = _device(device)
    dtype = number_format.default_dtype(where) if dtype is None else dtype
    number = dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if number != "auto" and not isinstance(number, torch.dtype):
        raise BadInput(f"dtype {dtype!r} is not a number format of torch. Use 'float32', 'bfloat16' or 'auto'.")
    if isinstance(number, torch.dtype):
        number_format.warn_if_slow(number, where)
    folder, name = _find(str(source), download, trust_remote_code, progress)
    held = check_folder(folder)
    choices = {"device_map": device_map, "quantization_config": quantization_config}
    placed = {key: value for key, value in choices.items() if value is not None}
    with outside(f"the model in {folder}"), quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
            model = _weights(folder, held, partial, trust_remote_code=trust_remote_code, dtype=number, **placed)
            return wrap(model if placed else model.to(where), tokenizer, name=name, raw=raw)
        except ImportError as error:
            raise MissingExtra(f"loading {source} needs another package: {error}") from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of a library in Rust, and no Exception
                raise
            raise BadInput(f"{folder} cannot be read: {str(error).splitlines()[0]}.") from error


def _device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for; a tensor is put there, as a name alone says nothing."""
    if device is None:
        return number_format.best_device()
    try:
        return torch.empty(0, device=device).device if str(device) != "meta" else torch.device("none")
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise BadInput(f"device {device!r} cannot be used here ({str(error).splitlines()[0]}). Use 'cpu'.") from error


def _weights(folder: Path, held: dict[str, list[int]], partial: bool, **settings: Any) -> Any:
    """The model with the weights in its folder, all of them and no others unless ``partial``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    code = {"trust_remote_code": settings["trust_remote_code"]}
    with torch.device("meta"):  # takes no memory
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **code), **code)
    size, stored = sum(p.numel() for p in empty.parameters()), sum(map(math.prod, held.values()))
    if size > SMALLEST * stored + 1_000_000:
        raise BadInput(f"{folder / 'config.json'} tells of {size:,} weights, and the files hold {stored:,}.")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=partial, **settings
        )
        model, info = loaded
        found = gaps(info)
    except RuntimeError as error:  # of other shapes, which it writes to a log
        if "ignore_mismatched_sizes" not in str(error):
            raise
        want = {name: list(tensor.shape) for name, tensor in empty.state_dict().items()}
        wrong = [name for name, shape in held.items() if want.get(name, shape) != shape]
        found = f"{len(wrong)} of another shape: {some(sorted(wrong))}"
    said = f"{folder} has not the weights its config.json describes ({found})."
    if found and not partial:
        raise BadInput(f"{said} Take a whole copy. With partial=True random numbers stand for what is missing.")
    if found:
        warnings.warn(said, stacklevel=3)
    return model


def wrap(model: Any, tokenizer: Any, name: str = "model", *, layout: Layout | None = None, raw: bool = False) -> LM:
    """Make an ``LM`` of a transformers model and its tokenizer.

    The model goes to evaluation mode and its parameters stop asking for gradients; it is not copied. A missing pad
    token becomes the end-of-sequence token.

    Args:
        model: a causal LM.
        tokenizer: its fast tokenizer (offsets are needed to find subjects in prompts).
        name: how reports call the model.
        raw: as for ``load``.
        layout: where the parts are, for a model whose structure ``discover`` cannot read. It is verified too.
    Raises:
        BadInput: a slow tokenizer, no token to pad with, or adapters still on the model.
        UnknownLayout: the parts could not be found, or the given layout does not hold.
    """
    if hasattr(model, "peft_config"):
        raise BadInput("the model carries PEFT adapters. Merge them first: model = model.merge_and_unload().")
    if not getattr(tokenizer, "is_fast", False):
        raise BadInput(f"{type(tokenizer).__name__} is a slow tokenizer, without character offsets. Pass a fast one.")
    rows = model.get_input_embeddings().weight.shape[0]
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or pad >= rows:
        if end is None or end >= rows:
            said = "no pad and no eos token" if pad is end is None else f"no pad or eos token among the model's {rows}"
            raise BadInput(f"the tokenizer has {said}. Set tokenizer.pad_token.")
        if pad is not None:
            warnings.warn(f"the pad token has id {pad}, the model {rows} tokens: its end token pads.", stacklevel=2)
        tokenizer.pad_token = tokenizer.eos_token
    model.eval().requires_grad_(False)
    if layout is None:
        layout = discover(model, tokenizer)
    else:
        verify(model, layout, probe_ids(model, tokenizer))
    return LM(model, tokenizer, layout, name, raw)


def require_lm(lm: object) -> None:
    """Raise ``BadInput`` where something else stands for an ``LM``, and say how to make one."""
    if not isinstance(lm, LM):
        raise BadInput(f"{type(lm).__name__} is no LM. Make one: load(name or path), or wrap(model, tokenizer).")


def licence(source: str | Path) -> str:
    """The terms a packaged model comes under, to be shown to its user; empty for every other source."""
    known = packaged.MODELS.get(str(source))
    return known.licence if known else ""


def _find(source: str, download: bool, code: bool, progress: Progress | None) -> tuple[Path, str]:
    """The folder of a model, and what reports call it; a slip in a packaged model's name is put right first."""
    if source in packaged.MODELS:
        return packaged.folder(source, progress), source
    with outside(f"{source[:80]!r}"):
        path = Path(source).expanduser()
        is_dir, is_file = path.is_dir(), path.is_file()
    if is_dir:
        return path, path.resolve().name
    if is_file:
        if path.suffix.lower() != ".gguf":
            raise BadInput(f"{path} is a file but no .gguf. Pass the folder that holds config.json and the weights.")
        return converted(path.stem, sha256_file(path), lambda _: path.absolute(), progress), path.stem
    if not hub.is_id(source) or path.suffix.lower() == ".gguf":
        raise BadInput(f"there is no file or folder {path}.")
    if local := hub.local_folder(source):
        return local, source
    meant = packaged.near(source)
    if meant and "/" not in source and not download:
        raise UnknownName(f"there is no model {source!r} here. Did you mean {meant}, which comes as a package?")
    try:
        return hub.fetch(source, download=download, code=code, progress=progress), source
    except BadInput as error:
        hint = f" Or did you mean {meant}, which comes as a package?" if meant else ""
        raise BadInput(f"{error}{hint}") from error
