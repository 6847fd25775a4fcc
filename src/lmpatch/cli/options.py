"""Arguments and options that several commands share, and how they become a model and patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import BadInput
from .screen import note, progress

if TYPE_CHECKING:
    from ..models.lm import LM
    from ..patches.patch import Patch

Model = Annotated[str, typer.Argument(metavar="MODEL", help="gemma-3-270m, a folder, a hub id or a .gguf file.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "auto"], typer.Option(help="Number format the model is loaded in.")
]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")]
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
    model: str, dtype: str = "float32", device: str = "cpu", download: bool = False, sharded: bool = False
) -> LM:
    """Load a model with a progress bar, and name the licence of a packaged one.

    One of several processes takes the device it was given at launch.
    """
    from ..distributed import join
    from ..models.load import licence, load
    from ..models.sharding import shard

    if terms := licence(model):
        note(terms)
    device = join() or device
    with progress() as bar:
        first = "cpu" if sharded else _device(device)
        lm = load(model, dtype=dtype, device=first, download=download, progress=bar)
    if sharded:
        shard(lm, device)
    return lm


def _device(name: str) -> str:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"device {name!r} cannot be used here: {error}") from None
    return name


@contextmanager
def patched(lm: LM, patches: Sequence[Path], mount: Literal["bake", "side", "run"] | None) -> Iterator[None]:
    """The patches of these folders on the model, in order; off again at the end."""
    from ..patches.ledger import apply

    loaded = [open_patch(path) for path in patches]
    with ExitStack() as stack:
        for patch in loaded:
            stack.enter_context(apply(lm, patch, mount=mount))
        yield


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
    """The path, once it is certain that nothing stands there: asked before work starts, not after.

    Raises:
        BadInput: something does.
    """
    if path.exists():
        raise BadInput(f"{path} exists already. Give another -o, or remove it first.")
    return path
