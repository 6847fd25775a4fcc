"""A model's folder as it lies on the disk, looked at before any library reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..errors import BadInput
from ..files import outside, read_bytes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
JSON_BYTES = 1 << 30
POINTER = b"version https://git-lfs"
CONSTANT = re.compile(r"(masked_bias|(attn|attention)\.bias|causal_mask|inv_freq|position_ids)$")
"""Buffers that old checkpoints hold, and that models compute today."""


def check_folder(folder: Path) -> None:
    """Refuse a folder that no library should read.

    Raises:
        BadInput: a file in it is a pipe or device; there is no config, or one that is no JSON object or has more layers
            than the files have tensors; the weights are an adapter, a pickle, a git-lfs pointer, or cut short.
    """
    with outside(f"the folder {folder}"):
        for path in folder.iterdir():
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise BadInput(f"{path} is no ordinary file. Remove it.")
    if not (folder / "config.json").exists():
        raise BadInput(f"cannot load {folder}: it holds no config.json, so it is no model.")
    config = _json(folder / "config.json")
    if (folder / "adapter_config.json").exists():
        raise BadInput(f"{folder} holds an adapter (adapter_config.json), not a model. Merge it into its model first.")
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        raise BadInput(f"cannot load {folder}: no {WEIGHTS}. Pickled weights are not read, as they can run code.")
    tensors = sum(len(shapes(folder / name)) for name in weight_files(folder))
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    depths = [part.get(key) for part in parts for key in DEPTHS]
    if deep := [n for n in depths if isinstance(n, int) and n > tensors]:
        raise BadInput(f"{folder / 'config.json'} tells of {deep[0]} layers, and the weights are {tensors} tensors.")


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the weights; they need not be there.

    Raises:
        BadInput: the index is damaged, or names anything but a .safetensors file beside it.
    """
    if not (folder / INDEX).exists():
        return [WEIGHTS]
    listed = _json(folder / INDEX).get("weight_map")
    names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
    if odd := [name for name in names or ["nothing"] if not name.endswith(".safetensors") or Path(name).name != name]:
        raise BadInput(f"{folder / INDEX} names {odd[0][:80]!r}: only .safetensors files beside it are read.")
    return [WEIGHTS] if (folder / WEIGHTS).exists() else names


def shapes(path: Path) -> dict[str, list[int]]:
    """Name → shape of the tensors in a .safetensors file, of which only the head is read.

    Raises:
        BadInput: it is cut short, a git-lfs pointer, or something else.
    """
    with outside(str(path)):
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise BadInput(f"{path} is a git-lfs pointer, not the weights. Fetch them: git lfs pull.")
        with safe_open(path, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118


def gaps(info: dict[str, Iterable[Any]]) -> str:
    """What transformers' loading information says is not as the config describes it; empty where all is."""
    names = {
        "missing": info["missing_keys"],
        "that the model does not have": [name for name in info["unexpected_keys"] if not CONSTANT.search(name)],
        "of another shape": [name for name, *_ in info["mismatched_keys"]],
    }
    return "; ".join(
        f"{len(listed)} {what}: {some(listed)}" for what, keys in names.items() if (listed := sorted(keys))
    )


def some(names: list[str]) -> str:
    """The first of them."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _json(path: Path) -> dict[str, Any]:
    data = read_bytes(path, limit=JSON_BYTES)
    with outside(str(path)):
        found = json.loads(data)
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds {type(found).__name__}, not an object.")
    return found
