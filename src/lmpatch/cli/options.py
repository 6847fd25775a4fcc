"""Arguments and options that several commands share, and how they become a model and patches."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import BadInput
from .screen import note, progress

if TYPE_CHECKING:
    from ..models.lm import LM
    from ..patches.patch import Patch


def _models(incomplete: str) -> list[str]:
    return [name for name in ("gemma-3-270m", "smollm2-135m-instruct") if name.startswith(incomplete)]


def named(kind: str) -> Callable[[str], list[str]]:
    """Completes a name of one kind in a shell."""

    def complete(incomplete: str) -> list[str]:
        from .. import registry

        return [name for name in registry.names(kind) if name.startswith(incomplete)]

    return complete


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="gemma-3-270m, smollm2-135m-instruct, a folder, a hub id or a .gguf file.",
        autocompletion=_models,
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "stored"],
    typer.Option(
        help="Number format of the model. auto: bfloat16 on a GPU that computes in it, else float32; "
        "stored: what the weights are stored in."
    ),
]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps. auto: a GPU if there is one.")]
Raw = Annotated[bool, typer.Option("--raw", help="Read prompts as they stand, without the model's chat template.")]
Download = Annotated[bool, typer.Option("--download", help="Allow a hub model that is not here yet to be fetched.")]
Shard = Annotated[
    bool,
    typer.Option(
        "--shard", help="With several processes (accelerate launch): each holds its part of the model's blocks (FSDP)."
    ),
]
Patches = Annotated[
    list[Path] | None,
    typer.Option("-p", "--patch", metavar="PATCH", help="A patch or memory folder; may repeat, put on in this order."),
]
Mount = Annotated[
    Literal["bake", "side", "run"] | None,
    typer.Option(
        help="bake writes the weights (undone from kept originals), side adds a hook. Default: the first that fits."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, probe or bench; may repeat."),
]
Text = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="Plain text for second moments; without it, the model's own samples."),
]
Anchors = Annotated[
    Path | None,
    typer.Option("--anchors", metavar="FILE", help="Facts outside the test set, for methods that measure on them."),
]
EditorFile = Annotated[
    Path | None,
    typer.Option("--editor", metavar="FILE", help="From lmpatch train. Default: the one that comes for this model."),
]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="Folder to write. It must not exist yet.")]


def open_model(
    model: str,
    dtype: str = "auto",
    device: str = "auto",
    download: bool = False,
    sharded: bool = False,
    raw: bool = False,
) -> LM:
    """Load a model with a progress bar, say so, and name the licence of a packaged one.

    One of several processes takes the device it was given at launch.
    """
    note(f"loading {model}")
    from ..distributed import join
    from ..models.load import licence, load
    from ..models.sharding import shard

    if terms := licence(model):
        note(terms)
    device = join() or device
    with progress(f"loading {model}") as bar, warnings.catch_warnings(record=True) as spoken:
        warnings.simplefilter("always", UserWarning)
        lm = load(
            model,
            dtype=_DTYPES.get(dtype, dtype),
            device="cpu" if sharded else _device(device),
            download=download,
            raw=raw,
            progress=bar,
        )
    for warning in spoken:
        if str(warning.message).startswith("bf16"):
            note(str(warning.message))
    if sharded:
        shard(lm, device)
    return lm


_DTYPES = {"auto": None, "stored": "auto"}
"""Words of ``--dtype`` that ``load`` has others for."""


def _device(name: str) -> str | None:
    import torch

    if name == "auto":
        return None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"device {name!r} cannot be used here: {error}") from None
    return name


@contextmanager
def patched(lm: LM, patches: Sequence[Patch], mount: Literal["bake", "side", "run"] | None) -> Iterator[None]:
    """The patches on the model, in order; off again at the end."""
    from ..patches.ledger import apply

    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(apply(lm, patch, mount=mount))
        yield


def open_patches(paths: Sequence[Path] | None) -> list[Patch]:
    """The patches of these folders. Opened before the model is loaded: a wrong path is found in a second."""
    return [open_patch(path) for path in paths or []]


def open_patch(path: Path) -> Patch:
    """The patch of a folder; of a memory, the patch that looks its facts up."""
    from ..memory.memory import Memory, is_memory
    from ..patches.file import load_patch

    return Memory.open(path).patch() if is_memory(path) else load_patch(path)


def material(text: Path | None, anchors: Path | None, editor: Path | None) -> dict[str, Any]:
    """What the files hold, as ``fit`` and ``bench`` take it."""
    from ..data.edits import read_edits
    from ..data.lines import read_text
    from ..patches.editor import load_editor

    return {
        "text": read_text(text) if text else None,
        "anchors": read_edits(anchors) if anchors else None,
        "editor": load_editor(editor) if editor else None,
    }


def new_path(path: Path) -> Path:
    """The path, once it is certain that nothing stands there and that it can be written: before work starts, not after.

    Raises:
        BadInput: something stands there, or it cannot be written.
    """
    if path.exists():
        raise BadInput(f"{path} exists already. Give another -o, or remove it first.")
    return writable(path)


def writable(path: Path) -> Path:
    """The path, once it is certain that it, or the first folder above it that exists, can be written.

    Raises:
        BadInput: it cannot.
    """
    where = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not where.is_dir() or not os.access(where, os.W_OK | os.X_OK):
        raise BadInput(f"{path} cannot be written: {where} is no folder that you may write to. Give another -o.")
    return path
