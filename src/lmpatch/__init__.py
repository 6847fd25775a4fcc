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
    from .data.edit import Ask as Ask
    from .data.edit import Edit as Edit
    from .data.readers import read_asks as read_asks
    from .data.readers import read_edits as read_edits
    from .data.readers import read_text as read_text
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
    from .memory.memory import Memory as Memory
    from .models.layout import Layout as Layout
    from .models.lm import LM as LM
    from .models.load import load as load
    from .models.load import wrap as wrap
    from .models.options import next_logits as next_logits
    from .models.run import Score as Score
    from .models.run import generate as generate
    from .models.run import hidden as hidden
    from .models.run import score as score
    from .models.run import stream as stream
    from .patches.decode import DecodePatch as DecodePatch
    from .patches.delta import Dense as Dense
    from .patches.delta import LowRank as LowRank
    from .patches.delta import Rows as Rows
    from .patches.delta import Scale as Scale
    from .patches.delta import Sparse as Sparse
    from .patches.editor import Editor as Editor
    from .patches.editor import load_editor as load_editor
    from .patches.export import export as export
    from .patches.file import load_patch as load_patch
    from .patches.ledger import Applied as Applied
    from .patches.ledger import applied as applied
    from .patches.ledger import apply as apply
    from .patches.memory import MemoryPatch as MemoryPatch
    from .patches.merge import merge as merge
    from .patches.patch import Patch as Patch
    from .patches.steer import SteerPatch as SteerPatch
    from .patches.weight import WeightPatch as WeightPatch
    from .registry import names as names
    from .units.address import Head as Head
    from .units.address import Layer as Layer
    from .units.address import Neuron as Neuron
    from .units.address import Parameter as Parameter

_HOMES = {
    "Applied": "patches.ledger",
    "Ask": "data.edit",
    "BadInput": "errors",
    "BadPatch": "errors",
    "BadRecord": "errors",
    "CannotMerge": "errors",
    "CannotMount": "errors",
    "ContextRecord": "data.context",
    "Contradiction": "errors",
    "DecodePatch": "patches.decode",
    "Dense": "patches.delta",
    "Diverged": "errors",
    "Edit": "data.edit",
    "Editor": "patches.editor",
    "ForeignWrite": "errors",
    "Head": "units.address",
    "InContext": "data.context",
    "LM": "models.lm",
    "Layer": "units.address",
    "LayerOutOfRange": "errors",
    "Layout": "models.layout",
    "LmpatchError": "errors",
    "LowRank": "patches.delta",
    "Memory": "memory.memory",
    "MemoryPatch": "patches.memory",
    "MissingExtra": "errors",
    "Neuron": "units.address",
    "NotEnoughMemory": "errors",
    "Parameter": "units.address",
    "Patch": "patches.patch",
    "Rows": "patches.delta",
    "Scale": "patches.delta",
    "Score": "models.run",
    "Sparse": "patches.delta",
    "SteerPatch": "patches.steer",
    "SubjectNotFound": "errors",
    "UnknownLayout": "errors",
    "UnknownName": "errors",
    "WeightPatch": "patches.weight",
    "WrongModel": "errors",
    "applied": "patches.ledger",
    "apply": "patches.ledger",
    "bench": "api",
    "examine": "doctor",
    "export": "patches.export",
    "fit": "api",
    "generate": "models.run",
    "hidden": "models.run",
    "load": "models.load",
    "load_editor": "patches.editor",
    "load_patch": "patches.file",
    "merge": "patches.merge",
    "names": "registry",
    "next_logits": "models.options",
    "probe": "api",
    "read_asks": "data.readers",
    "read_context": "data.context",
    "read_edits": "data.readers",
    "read_text": "data.readers",
    "score": "models.run",
    "stream": "models.run",
    "train": "api",
    "wrap": "models.load",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lmpatch' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
