"""Arguments and options that several commands share, and how they become a model and patches."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import uuid4

import typer

from ..errors import BadInput
from .screen import leads, note, progress

if TYPE_CHECKING:
    from ..models.lm import LM
    from ..patches.patch import Patch

MODELS = ("gemma-3-270m", "smollm2-135m-instruct")
DTYPES = {"auto": None, "stored": "auto"}
"""Words of ``--dtype`` that ``load`` has others for."""


def named(*kinds: str) -> Callable[[str], list[str]]:
    """Completes a name of these kinds in a shell."""

    def complete(incomplete: str) -> list[str]:
        from .. import registry

        return [name for kind in kinds for name in registry.names(kind) if name.startswith(incomplete)]

    return complete


def usable(value: Any) -> Any:
    """What was written on the command line, ``~`` resolved, if it is text, or a path that can be; else ``BadInput``."""
    if isinstance(value, (list, tuple)):
        return [usable(each) for each in value]
    with naming(value, "used"):
        if isinstance(value, Path):
            value = value.expanduser()
            value.exists()
        elif isinstance(value, str) and not value.isascii():
            value = os.fsencode(value).decode()  # an ASCII locale hands UTF-8 over as bytes in disguise
    return value


def writable(path: Path | None) -> Path | None:
    """The path, once a file beside it, or in it where it is a folder, was made and removed again; else ``BadInput``."""
    path, made = usable(path), []
    if path is None or not leads():
        return path
    try:
        with naming(path, "written"):
            made = [folder for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            trial = path / uuid4().hex if path.exists() else path.with_name(f".{path.name}.{uuid4().hex}.new")
            trial.touch()
            trial.unlink()
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
    return path


def new_path(path: Path | None) -> Path | None:
    """As ``writable``, once it is certain that nothing stands there: before work starts, not after."""
    path = usable(path)
    if path is not None and os.path.lexists(path):
        raise BadInput(f"{path} exists already. Give another path, or remove it first.")
    return writable(path)


@contextmanager
def naming(value: object, what: str) -> Iterator[None]:
    """What a bad name or a full disk raises in the block becomes one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        text = str(value) if len(str(value)) <= 80 else f"{str(value)[:30]}...{str(value)[-30:]}"
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"{text} cannot be {what} ({why}). Give another path.") from None


def arg(metavar: str, text: str, **more: Any) -> Any:
    """An argument of a command."""
    return typer.Argument(metavar=metavar, help=text, **more)


def opt(text: str, metavar: str | None = None, *names: str, **more: Any) -> Any:
    """An option of a command; without names it is called as its parameter."""
    return typer.Option(*names, metavar=metavar, help=text, **more)


def out_option(metavar: str, text: str, check: Callable[..., Any] = new_path) -> Any:
    """``-o``: where a command writes; checked before anything else is done."""
    return opt(text, metavar, "-o", "--out", callback=check)


def work_option(text: str) -> Any:
    """``--work``: a folder of checkpoints, which may be there."""
    return opt(text, "FOLDER", callback=writable)


Model = Annotated[
    str,
    arg(
        "MODEL",
        "gemma-3-270m, smollm2-135m-instruct, a folder, a hub id or a .gguf file.",
        autocompletion=lambda incomplete: [name for name in MODELS if name.startswith(incomplete)],
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "stored"],
    opt(
        "Number format of the model. auto: bfloat16 on a GPU that computes in it, else float32; "
        "stored: what the weights are stored in."
    ),
]
Device = Annotated[str, opt("Where the model runs: cpu, cuda, cuda:1, mps. auto: a GPU if there is one.")]
Raw = Annotated[bool, opt("Read prompts as they stand, without the model's chat template.", None, "--raw")]
Download = Annotated[bool, opt("Allow a hub model that is not here yet to be fetched.", None, "--download")]
Partial = Annotated[bool, opt("Accept a model whose file lacks weights; those are then random.", None, "--partial")]
Shard = Annotated[
    bool,
    opt("With several processes (accelerate launch): each holds its part of the model (FSDP).", None, "--shard"),
]
Patches = Annotated[
    list[Path] | None, opt("A patch or memory folder; may repeat, put on in this order.", "PATCH", "-p", "--patch")
]
Mount = Annotated[
    Literal["bake", "side", "run"] | None,
    opt(
        "How patches act. bake: the weights are changed, their originals kept; side: a hook adds the change; "
        "run: while answers are made (memories, decode rules). Default: the first that fits."
    ),
]
Settings = Annotated[list[str] | None, opt("A setting; may repeat. Lists are written 4,5,6.", "KEY=VALUE", "--set")]
Limit = Annotated[int | None, opt("Read at most this many records of the file.", min=1)]
Unrelated = Annotated[Path | None, opt("Questions with answers that no fact touches and edits leave alone.", "FILE")]
Text = Annotated[
    Path | None,
    opt(
        "Plain text whose covariance of activations rome and memit need. Default: texts that the model writes itself.",
        "FILE",
    ),
]
Anchors = Annotated[
    Path | None, opt("Further facts, none of those to be written, that memit with nas=true measures on.", "FILE")
]
EditorFile = Annotated[
    Path | None, opt("What lmpatch train wrote. Default: the editor that comes with lmpatch for this model.", "FILE")
]
Out = Annotated[Path, out_option("OUT", "Folder to write. It must not exist yet.")]


@dataclass(frozen=True)
class Source:
    """The model of a command, not loaded yet. As a parameter of a command it stands for these arguments and options."""

    model: Model
    dtype: Dtype = "auto"
    device: Device = "auto"
    download: Download = False
    partial: Partial = False

    def open(self, *, raw: bool = False, shard: bool = False) -> LM:
        """Load it, say so, and name the licence of a packaged one; one of several processes has its own device."""
        if self.model in MODELS or usable(Path(self.model)).exists():  # else the name may be a slip
            note(f"loading {self.model}")
        from ..distributed import join
        from ..models import sharding
        from ..models.load import licence, load

        if terms := licence(self.model):
            note(terms)
        device = join() or self.device
        with progress(f"loading {self.model}") as bar, warnings.catch_warnings(record=True) as spoken:
            warnings.simplefilter("always", UserWarning)
            lm = load(
                self.model,
                dtype=DTYPES.get(self.dtype, self.dtype),
                device="cpu" if shard else _device(device),
                download=self.download,
                raw=raw,
                progress=bar,
                **({"partial": True} if self.partial else {}),
            )
        for warning in spoken:  # those of lmpatch itself
            if warning.filename.startswith(str(Path(__file__).parents[1])):
                note(str(warning.message))
        if shard:
            sharding.shard(lm, device)
        return lm


def _device(name: str) -> str | None:
    import torch

    if name == "auto":
        return None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"device {name!r} cannot be used here: {error}") from None
    return name


@dataclass(frozen=True)
class Material:
    """Files that methods read beside their records."""

    text: Text = None
    anchors: Anchors = None
    editor: EditorFile = None

    def read(self) -> dict[str, Any]:
        """What they hold, as ``fit`` and ``bench`` take it."""
        from ..data.edits import read_edits
        from ..data.lines import read_text
        from ..patches.editor import load_editor

        return {
            "text": read_text(self.text) if self.text else None,
            "anchors": read_edits(self.anchors) if self.anchors else None,
            "editor": load_editor(self.editor) if self.editor else None,
        }


def open_patches(paths: Sequence[Path] | None) -> list[Patch]:
    """The patches of these folders; of a memory, the patch that looks its facts up."""
    from ..memory.memory import Memory, is_memory
    from ..patches.file import load_patch

    return [Memory.open(path).patch() if is_memory(path) else load_patch(path) for path in paths or []]


@contextmanager
def patched(lm: LM, patches: Sequence[Patch], mount: Literal["bake", "side", "run"] | None) -> Iterator[None]:
    """The patches on the model, in order; off again at the end."""
    from ..patches.ledger import apply

    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(apply(lm, patch, mount=mount))
        yield
