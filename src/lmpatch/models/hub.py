"""Hub ids: what is in the local Hugging Face cache, and what would have to be fetched."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

from ..errors import BadInput
from ..progress import Progress

WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
SIDE_FILES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


def is_id(name: str) -> bool:
    """Could this be a repository's name, ``model`` or ``owner/model``?"""
    from huggingface_hub.utils._validators import validate_repo_id

    with suppress(ValueError):
        validate_repo_id(name)
        return True
    return False


def local_folder(repo: str) -> Path | None:
    """The snapshot of a repository in the local cache, if it has a config and every weight file."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"].values() if index.exists() else ["model.safetensors"]
    return folder if all((folder / name).exists() for name in names) else None


def fetch(repo: str, *, download: bool, code: bool = False, progress: Progress | None = None) -> Path:
    """Download a repository's safetensors, config and tokenizer; its size and licence are said first.

    Args:
        code: fetch ``.py`` files too, for models that bring their own code.
    Raises:
        BadInput: ``download`` is False, the hub cannot be reached or refuses, or there are no safetensors.
    """
    import huggingface_hub as hub

    try:
        info = hub.model_info(repo, files_metadata=True)
    except Exception as error:  # the client's HTTP library and its errors differ between versions
        raise BadInput(
            f"{repo!r} is no packaged model, no folder or .gguf file here, and not complete in the local Hugging Face "
            f"cache; asking the hub for it failed: {type(error).__name__}: {_first_line(error)}"
        ) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if _wanted(file.rfilename, code)}
    if not any(WEIGHTS.fullmatch(name) for name in sizes):
        raise BadInput(f"{repo} holds no model.safetensors. Pickled weights are not read, as they can run code.")
    total = sum(sizes.values())
    licences = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    offer = f"{repo}: {total / 1e9:.2f} GB, licence {licences[0] if licences else 'not stated'}"
    if not download:
        raise BadInput(f"not in the local Hugging Face cache: {offer}. To fetch it, pass download=True.")
    if progress:
        progress(0, total, f"downloading {offer}")
    try:
        folder = Path(hub.snapshot_download(repo, revision=info.sha, allow_patterns=sorted(sizes)))
    except Exception as error:
        raise BadInput(f"downloading {repo} failed: {type(error).__name__}: {_first_line(error)}") from error
    if progress:
        progress(total, total, f"downloaded {repo}")
    return folder


def _wanted(name: str, code: bool) -> bool:
    if "/" in name:
        return False
    return bool(WEIGHTS.fullmatch(name)) or Path(name).suffix in SIDE_FILES or (code and name.endswith(".py"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
