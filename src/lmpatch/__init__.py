"""Change what a causal language model knows, as patches that come off bit for bit.

The public names, each imported when it is first used, so that ``import lmpatch`` and ``lmpatch --help`` are quick.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # fmt: off
    # isort: off
    from .api import bench as bench, check as check, compare as compare, fit as fit, probe as probe, train as train
    from .data.context import ContextRecord as ContextRecord, InContext as InContext, read_context as read_context
    from .data.edits import Ask as Ask, Edit as Edit, read_asks as read_asks, read_edits as read_edits
    from .data.lines import read_text as read_text
    from .doctor import examine as examine
    from .dynamics.observe import audit as audit, diff as diff
    from .errors import (
        BadInput as BadInput, BadPatch as BadPatch, BadRecord as BadRecord, CannotMerge as CannotMerge,
        CannotMount as CannotMount, CannotWrite as CannotWrite, Contradiction as Contradiction, Diverged as Diverged,
        ForeignWrite as ForeignWrite, Harmful as Harmful, LayerOutOfRange as LayerOutOfRange,
        LmpatchError as LmpatchError,
        MissingExtra as MissingExtra, NotEnoughMemory as NotEnoughMemory, SubjectNotFound as SubjectNotFound,
        UnknownLayout as UnknownLayout, UnknownName as UnknownName, WrongModel as WrongModel,
    )
    from .inference.generate import generate as generate, stream as stream
    from .inference.multiple_choice import next_logits as next_logits
    from .inference.score import Score as Score, score as score
    from .inference.states import hidden as hidden
    from .memory.memory import Memory as Memory
    from .models.layout import Layout as Layout
    from .models.lm import LM as LM
    from .models.load import load as load, wrap as wrap
    from .models.units import Head as Head, Layer as Layer, Neuron as Neuron, Parameter as Parameter
    from .patches.decode.patch import DecodePatch as DecodePatch
    from .patches.editor import Editor as Editor, find_editor as find_editor, load_editor as load_editor
    from .patches.export import export as export
    from .patches.file import load_patch as load_patch
    from .patches.hook.patch import SteerPatch as SteerPatch
    from .patches.ledger import Applied as Applied, applied as applied, apply as apply
    from .patches.ledger import rebuild as rebuild, remove as remove
    from .patches.memory.patch import MemoryPatch as MemoryPatch
    from .patches.merge import merge as merge
    from .patches.patch import Patch as Patch
    from .patches.weight.delta import Dense as Dense, LowRank as LowRank, Rows as Rows, Scale as Scale, Sparse as Sparse
    from .patches.weight.patch import WeightPatch as WeightPatch
    from .progress import progress_bar as progress_bar
    from .registry import names as names
    # fmt: on
    # isort: on

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
