"""``load_patch``: any patch from its folder. Its kind is found by name, in ``patches/`` or in another package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import iter_modules

from ..errors import BadInput, BadPatch
from . import format
from .base import Base
from .patch import Patch

GROUP = "lmpatch.kinds"
"""The entry points of other packages: a name, and the module or package whose ``KIND`` it is."""


def load_patch(path: str | Path) -> Patch:
    """Read a patch folder.

    Raises:
        BadPatch: there is none, or it is truncated, altered, of an unknown kind or schema, or holds numbers that are
            not finite.
    """
    path = Path(path)
    header, tensors = format.read(path)
    kind = find_kind(header["kind"])
    if kind is None:
        known = sorted(cls.kind for cls in kinds())
        raise BadPatch(
            f"{path / format.HEADER} is of kind {header['kind']!r}, this lmpatch knows {known}. Update lmpatch, or "
            "install the package that brings that kind."
        )
    extras = {name: tensors.pop(name) for name in [*tensors] if name.startswith("extra/")}
    try:
        return kind.from_parts(
            header["parts"],
            tensors,
            **{name: header[name] for name in ("method", "config", "made", "notes")},
            base=Base.read(header["base"]),
            edits=tuple(dict(edit) for edit in header["edits"]),
            extras={name.removeprefix("extra/"): t for name, t in extras.items()},
        )
    except BadPatch as error:
        raise BadPatch(f"{path} is no usable patch: {error}") from None
    except (TypeError, ValueError) as error:  # an edit that is no dict
        raise BadPatch(f"{path / format.HEADER} is not as lmpatch writes it ({error}).") from None


def as_patch(patch: Patch | str | Path) -> Patch:
    """The patch, or the one in the folder of that path; ``BadInput`` for anything else."""
    if not isinstance(patch, (str, Path, Patch)):
        raise BadInput(f"a patch or its path is needed, found {type(patch).__name__}. Give one of load_patch or fit.")
    return patch if isinstance(patch, Patch) else load_patch(patch)


def kinds(first: str = "") -> Iterator[type[Patch]]:
    """Every kind there is; a folder or entry point called ``first`` comes first."""
    folders = [module.name for module in iter_modules(import_module(__package__).__path__) if module.ispkg]
    for name in sorted(folders, key=lambda name: name != first):
        yield import_module(f"{__package__}.{name}").KIND
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name != first):
        yield point.load().KIND


def find_kind(name: str) -> type[Patch] | None:
    """The kind of that name in files; None if there is none."""
    return next((cls for cls in kinds(first=name) if cls.kind == name), None)
