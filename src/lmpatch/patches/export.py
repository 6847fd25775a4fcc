"""``export``: a patch in a form that other libraries load without lmpatch."""

from __future__ import annotations

import copy
import logging
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import BadInput
from ..files import new_folder
from ..models.lm import LM
from .ledger import applied, apply, check, rebuild
from .patch import Patch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    ranks: dict[str, int] = field(default_factory=dict)
    """PEFT: weight -> rank of its change, which zeros fill up to the largest. A change that is zero has none."""
    discarded: dict[str, float] = field(default_factory=dict)
    """PEFT: weight -> share of ‖ΔW‖² that ``rank`` cut off; 0 for an exact adapter."""
    left_out: dict[str, Any] = field(default_factory=dict)
    """Checkpoint: settings of generation that transformers does not save because they have no effect, such as a
    temperature without sampling."""


def export(
    lm: LM, patch: Patch, to: Literal["peft", "checkpoint"], out: str | Path, *, rank: int | None = None
) -> Exported:
    """Write a patch as a LoRA adapter (``peft``) or a whole patched model (``checkpoint``).

    The adapter has one rank and one alpha for all weights, which are equal, so that it is the change itself.
    The checkpoint is what ``save_pretrained`` writes with the patch baked in, tokenizer included; ``lm`` is as before
    afterwards.

    Args:
        out: a folder that does not exist yet or is empty.
        rank: PEFT: cut every change to this rank at most, by its singular values. None: exact, or an error
            where an exact adapter would be larger than the weight.
    Raises:
        BadInput: ``out`` holds something, other patches are on the model, an exact adapter would be too large, or the
            patch is of a kind that cannot be written like that.
        CannotMount: the change cannot be an adapter, or cannot be baked.
        WrongModel: the patch was made for another model.
    """
    if to not in ("peft", "checkpoint"):
        raise BadInput(f"cannot export to {to!r}. There are peft and checkpoint.")
    if rank is not None and to == "checkpoint":
        raise BadInput("a rank was given, but a checkpoint has none. Leave rank out, or export to='peft'.")
    if applied(lm):
        raise BadInput(f"{len(applied(lm))} patches are on {lm.name}. Take them off, or merge them with this one.")
    path = Path(out)
    if to == "peft":
        check(lm, patch)
        lora = patch.lora(lm, rank)
        with new_folder(path) as folder:
            lora.write(lm, folder)
        return Exported(path, {f"{module}.weight": r for module, r in lora.ranks.items()}, lora.discarded)
    if patch.mounts and "bake" not in patch.mounts:
        raise BadInput(f"a {patch.kind} patch changes no weight, so a checkpoint cannot hold {patch.method}.")
    with lm.lock:
        whole = lm if patch.mounts else rebuild(lm, patch)
        with new_folder(path) as folder, apply(lm, patch, "bake") if patch.mounts else nullcontext():
            left_out = _save(whole.model, folder)
            whole.tokenizer.save_pretrained(folder)
    return Exported(path, left_out=left_out)


def _save(model: Any, folder: Path) -> dict[str, Any]:
    """Save the model without those settings of generation for which transformers would refuse it; these it returns."""
    kept = model.generation_config
    try:
        model.save_pretrained(folder)
        return {}
    except ValueError as error:
        valid, default = copy.deepcopy(kept), type(kept)()
        named = re.findall(r"`(\w+)`", str(error))
        left_out = {n: getattr(kept, n) for n in named if getattr(kept, n, None) != getattr(default, n, None)}
        if not left_out:
            raise BadInput(f"the model cannot be saved: {error}") from None
        for name in left_out:
            setattr(valid, name, getattr(default, name))
        log.warning("generation settings without effect are left out of the checkpoint: %s", left_out)
        model.generation_config = valid
        return left_out | _save(model, folder)
    finally:
        model.generation_config = kept
