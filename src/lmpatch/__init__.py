"""Change what a causal language model knows, as patches that come off bit for bit.

The public names, each imported when it is first used, so that ``import lmpatch`` and ``lmpatch --help`` are quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import bench as bench
    from .api import fit as fit
    from .api import probe as probe
    from .api import train as train
    from .data.context import ContextRecord as ContextRecord
    from .data.context import InContext as InContext
    from .data.context import read_context as read_context
    from .data.edits import Ask as Ask
    from .data.edits import Edit as Edit
    from .data.edits import read_asks as read_asks
    from .data.edits import read_edits as read_edits
    from .data.lines import read_text as read_text
    from .doctor import examine as examine
    from .errors import BadInput as BadInput
    from .errors import BadPatch as BadPatch
    from .errors import BadRecord as BadRecord
    from .errors import CannotMerge as CannotMerge
    from .errors import CannotMount as CannotMount
    from .errors import Contradiction as Contradiction
    from .errors import Diverged as Diverged
    from .errors import ForeignWrite as ForeignWrite
    from .errors import LayerOutOfRange as LayerOutOfRange
    from .errors import LmpatchError as LmpatchError
    from .errors import MissingExtra as MissingExtra
    from .errors import NotEnoughMemory as NotEnoughMemory
    from .errors import SubjectNotFound as SubjectNotFound
    from .errors import UnknownLayout as UnknownLayout
    from .errors import UnknownName as UnknownName
    from .errors import WrongModel as WrongModel
    from .inference.generate import generate as generate
    from .inference.generate import stream as stream
    from .inference.multiple_choice import next_logits as next_logits
    from .inference.score import Score as Score
    from .inference.score import score as score
    from .inference.states import hidden as hidden
    from .memory.memory import Memory as Memory
    from .models.layout import Layout as Layout
    from .models.lm import LM as LM
    from .models.load import load as load
    from .models.load import wrap as wrap
    from .models.units import Head as Head
    from .models.units import Layer as Layer
    from .models.units import Neuron as Neuron
    from .models.units import Parameter as Parameter
    from .patches.decode.patch import DecodePatch as DecodePatch
    from .patches.editor import Editor as Editor
    from .patches.editor import load_editor as load_editor
    from .patches.export import export as export
    from .patches.file import load_patch as load_patch
    from .patches.hook.patch import SteerPatch as SteerPatch
    from .patches.ledger import Applied as Applied
    from .patches.ledger import applied as applied
    from .patches.ledger import apply as apply
    from .patches.ledger import rebuild as rebuild
    from .patches.memory.patch import MemoryPatch as MemoryPatch
    from .patches.merge import merge as merge
    from .patches.patch import Patch as Patch
    from .patches.weight.delta import Dense as Dense
    from .patches.weight.delta import LowRank as LowRank
    from .patches.weight.delta import Rows as Rows
    from .patches.weight.delta import Scale as Scale
    from .patches.weight.delta import Sparse as Sparse
    from .patches.weight.patch import WeightPatch as WeightPatch
    from .progress import progress_bar as progress_bar
    from .registry import names as names

_HOMES = {
    "Applied": "patches.ledger",
    "Ask": "data.edits",
    "BadInput": "errors",
    "BadPatch": "errors",
    "BadRecord": "errors",
    "CannotMerge": "errors",
    "CannotMount": "errors",
    "ContextRecord": "data.context",
    "Contradiction": "errors",
    "DecodePatch": "patches.decode.patch",
    "Dense": "patches.weight.delta",
    "Diverged": "errors",
    "Edit": "data.edits",
    "Editor": "patches.editor",
    "ForeignWrite": "errors",
    "Head": "models.units",
    "InContext": "data.context",
    "LM": "models.lm",
    "Layer": "models.units",
    "LayerOutOfRange": "errors",
    "Layout": "models.layout",
    "LmpatchError": "errors",
    "LowRank": "patches.weight.delta",
    "Memory": "memory.memory",
    "MemoryPatch": "patches.memory.patch",
    "MissingExtra": "errors",
    "Neuron": "models.units",
    "NotEnoughMemory": "errors",
    "Parameter": "models.units",
    "Patch": "patches.patch",
    "Rows": "patches.weight.delta",
    "Scale": "patches.weight.delta",
    "Score": "inference.score",
    "Sparse": "patches.weight.delta",
    "SteerPatch": "patches.hook.patch",
    "SubjectNotFound": "errors",
    "UnknownLayout": "errors",
    "UnknownName": "errors",
    "WeightPatch": "patches.weight.patch",
    "WrongModel": "errors",
    "applied": "patches.ledger",
    "apply": "patches.ledger",
    "bench": "api",
    "examine": "doctor",
    "export": "patches.export",
    "fit": "api",
    "generate": "inference.generate",
    "hidden": "inference.states",
    "load": "models.load",
    "load_editor": "patches.editor",
    "load_patch": "patches.file",
    "merge": "patches.merge",
    "names": "registry",
    "next_logits": "inference.multiple_choice",
    "probe": "api",
    "progress_bar": "progress",
    "read_asks": "data.edits",
    "read_context": "data.context",
    "read_edits": "data.edits",
    "read_text": "data.lines",
    "rebuild": "patches.ledger",
    "score": "inference.score",
    "stream": "inference.generate",
    "train": "api",
    "wrap": "models.load",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lmpatch' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
