"""``Operation``: what a hook patch does beyond adding a constant. Found by folder, by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import BadInput, BadPatch
from ...inference.forward import Pass
from ...models.hooks import Hook
from ...models.lm import LM
from ..patch import Law


class Operation(ABC):
    """One thing that hooks do at one place of a model. A value, as a patch is: no model, no device."""

    name: ClassVar[str]
    """As its file in ``operations/``; a file names it."""
    law: ClassVar[Law]
    """What ``joined`` means."""
    module: str
    """The linear layer at whose output it acts."""

    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """What its tensors are, as JSON."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, on the CPU."""

    @classmethod
    @abstractmethod
    def from_parts(cls, parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Operation:
        """The inverse of ``parts`` and ``tensors``. BadPatch: they do not belong together."""

    @abstractmethod
    def describe(self) -> str:
        """One line for ``summary``."""

    @abstractmethod
    def check(self, lm: LM) -> None:
        """Raise ``LookupError`` unless it fits the model."""

    @abstractmethod
    def hooks(self, lm: LM) -> list[Hook]:
        """Its hooks on this model."""

    @abstractmethod
    def joined(self, others: Sequence[Any]) -> Operation:
        """One operation for all, which are of its class at its module. CannotMerge: they have nothing in common."""


def find_operation(name: Any) -> type[Operation]:
    """The operation of that name. BadPatch: there is none."""
    known = [module.name for module in iter_modules(import_module(f"{__package__}.operations").__path__)]
    if name not in known:
        raise BadPatch(f"it does {name!r} by hooks, and this lmpatch knows {', '.join(known)}. Update lmpatch.")
    found: type[Operation] = import_module(f"{__package__}.operations.{name}").OPERATION
    return found


def widths(lm: LM, module: str) -> tuple[int, int]:
    """What a linear layer reads and returns. LookupError: there is no such layer."""
    try:
        found = lm.module(module)
    except AttributeError:
        raise LookupError(f"the model has no module {module}.") from None
    if isinstance(found, Conv1D):
        return int(found.weight.shape[0]), int(found.weight.shape[1])
    if not isinstance(found, nn.Linear):
        raise LookupError(f"{module} is a {type(found).__name__}, not a linear layer.")
    return found.in_features, found.out_features


def check_widths(lm: LM, module: str, read: int, returned: int) -> None:
    """Raise ``LookupError`` unless the layer has these widths."""
    if (found := widths(lm, module)) != (read, returned):
        raise LookupError(f"{module} reads {found[0]} and returns {found[1]}, the patch has {read} and {returned}.")


def need(good: bool, what: str) -> None:
    """Raise ``BadPatch`` that says ``what`` unless ``good``."""
    if not good:
        raise BadPatch(what)


def ready(*tensors: Tensor) -> Callable[[torch.device, torch.dtype], list[Tensor]]:
    """Gives the tensors on a device, those with a fraction in a number format; each copy is made once."""

    @lru_cache(maxsize=2)
    def moved(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        return [t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in tensors]

    return moved


def by_row(x: Tensor, now: Pass | None) -> Tensor:
    """[n, t, width], also where a model flattens the batch. In a call that is not lmpatch's that is one row."""
    if x.ndim == 3:
        return x
    return x.reshape(1 if now is None else len(now.mask), -1, x.shape[-1])


def prompt(x: Tensor, now: Pass | None) -> Tensor:
    """[n, t] True at the tokens of each prompt; in a call that is not lmpatch's all tokens are."""
    if now is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return now.mask[:, now.start :].bool() & (now.columns() <= now.prompt_end[:, None])


def choose(now: Pass | None, key: object, look: Callable[[], Tensor]) -> Tensor | None:
    """[n] which entry each row uses, -1: none; None: no row uses any. Decided once a row, when its prompt is read.

    Args:
        key: of what is known of the rows.
        look: gives [n] from the prompts; called once for a batch.
    Raises:
        BadInput: what runs now is only a part of the prompts.
    """
    if now is not None and key in now.row_state:
        return now.row_state[key]
    if now is not None:
        if not now.mask[:, now.start :].any():
            return None  # a replay's first column is padding
        if now.versions or now.mask[:, : now.start].any() or not now.decided():
            raise BadInput(
                "a patch on the model looks a whole prompt up, and this call runs prompts in parts. Take the patch off "
                "for it, or fit the patch with a setting that acts on the last token alone (grace: replace=last)."
            )
    found = look()
    chosen = found if bool((found >= 0).any()) else None
    if now is not None:
        now.row_state[key] = chosen
    return chosen
