"""``export``: a patch in a form that other libraries load without lmpatch."""

from __future__ import annotations

import copy
import logging
import re
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import BadInput, BadPatch, CannotMount
from ..files import new_folder
from ..inference.forward import logits
from ..inference.plain_text import TEXT
from ..inference.states import hidden
from ..models.gguf import quiet
from ..models.hooks import hooked
from ..models.lm import LM
from ..models.load import licence
from ..resources import require_memory
from .file import as_patch
from .ledger import applied, check, rebuild, trial
from .lora import Lora
from .patch import ONLY, Patch, printable

log = logging.getLogger(__name__)
PROMPTS = 8  # asked of what was written


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
    lm: LM, patch: Patch | str | Path, to: Literal["peft", "checkpoint"], out: str | Path, *, rank: int | None = None
) -> Exported:
    """Write a patch as a LoRA adapter (``peft``) or a whole patched model (``checkpoint``).

    The adapter has one rank and one alpha for all weights, which are equal, so that it is the change itself.
    The checkpoint is what ``save_pretrained`` writes with the patch baked in, tokenizer included; ``lm`` is as before
    afterwards. Either is read again, and its logits are compared with the patch's own.

    Args:
        out: a folder that does not exist yet or is empty.
        rank: PEFT: cut every change to this rank at most, by its singular values. None: exact, or an error
            where an exact adapter would be larger than the weight.
    Raises:
        BadInput: ``out`` holds something, other patches are on the model, an exact adapter would be too large, or the
            patch is of a kind that cannot be written like that.
        CannotMount: the change cannot be an adapter, or cannot be baked.
        WrongModel: the patch was made for another model.
        BadPatch: what was written and read again does something else; it is removed.
        NotEnoughMemory: there is no room for the checkpoint beside the model.
    """
    if to not in ("peft", "checkpoint"):
        raise BadInput(f"cannot export to {to!r}. There are peft and checkpoint.")
    if rank is not None and to == "checkpoint":
        raise BadInput("a rank was given, but a checkpoint has none. Leave rank out, or export to='peft'.")
    patch = as_patch(patch)
    if patch.only_in_context:
        raise CannotMount(f"what is exported acts on every prompt, and this {patch.method} patch {ONLY}")
    if applied(lm):
        raise BadInput(f"{len(applied(lm))} patches are on {lm.name}. Call remove(lm), or merge them with this one.")
    path = Path(out)
    if to == "peft":
        check(lm, patch)
        lora = patch.lora(lm, rank)
        with new_folder(path) as folder:
            lora.write(lm, folder)
            text = f"LoRA adapter for {lm.name} of fingerprint {patch.base.fingerprint} alone.\n{licence(lm.name)}\n"
            (folder / "README.md").write_text(printable(text), encoding="utf-8")
            with hooked(*Lora.read(folder).hooks(lm)):
                found = _logits(lm, patch)
            with hooked(*lora.hooks(lm)) if rank else trial(lm, patch, patch.mounts[0]):
                _prove(found, _logits(lm, patch), "adapter", lm)
        return Exported(path, {f"{module}.weight": r for module, r in lora.ranks.items()}, lora.discarded)
    if patch.mounts and "bake" not in patch.mounts:
        raise BadInput(f"a {patch.kind} patch changes no weight, so a checkpoint cannot hold {patch.method}.")
    with lm.lock:
        whole = lm if patch.mounts else rebuild(lm, patch)
        require_memory(sum(p.nbytes for p in whole.model.parameters()), whole.device, "reading the checkpoint again")
        with new_folder(path) as folder, trial(lm, patch, "bake") if patch.mounts else nullcontext(), quiet():
            left_out = _save(whole.model, folder)
            whole.tokenizer.save_pretrained(folder)
            again = replace(whole, model=type(whole.model).from_pretrained(folder, dtype=whole.dtype).to(whole.device))
            _prove(_logits(again, patch), _logits(whole, patch), "checkpoint", lm)
    return Exported(path, left_out=left_out)


@torch.no_grad()
def _logits(lm: LM, patch: Patch) -> Tensor:
    """Logits [n, V] behind the first prompts of the patch, or behind the beginnings of plain sentences."""
    own = [edit["prompt"] for edit in patch.edits if isinstance(edit.get("prompt"), str)]
    return logits(lm, hidden(lm, (own or [start for start, _ in TEXT])[:PROMPTS]).to(lm.dtype))


def _prove(found: Tensor, want: Tensor, what: str, lm: LM) -> None:
    """Raise ``BadPatch`` unless two models say the same up to rounding."""
    gap = float((found - want).abs().max() / want.std())
    if not gap <= max(1e-3, 32 * torch.finfo(lm.dtype).eps):
        raise BadPatch(f"the {what} was written, but read again its logits differ by {gap:.3g} of their spread.")


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
