"""Change what a causal language model knows, as patches that come off bit for bit.

The public names, each imported when it is first used, so that ``import lmpatch`` and ``lmpatch --help`` are quick.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
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

_HOMES = dict(
    sorted(
        (alias.name, node.module)
        for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level and node.module
        for alias in node.names
    )
)
"""Public name -> its module, read from the imports above, which only type checkers run."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lmpatch' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
