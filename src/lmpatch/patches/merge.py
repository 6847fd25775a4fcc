"""``merge``: several patches as one. What that means is the kind's own algebra, see ``Patch.merged``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CannotMerge, WrongModel
from ..provenance import now, versions
from .file import as_patch
from .patch import Law, Patch

log = logging.getLogger(__name__)


def merge(first: Patch | str | Path, *others: Patch | str | Path) -> Patch:
    """One patch that does what all of them do together: changes of weights add up, memories hold the facts of all,
    decode rules act one after the other.

    Args:
        first, others: patches, or their paths, of one kind for one model. Edits are kept in this order; extras of one
            name are joined along their first axis.
    Returns:
        a new patch whose method names theirs, ``rome+memit``. Low-rank changes stay low-rank while that is smaller.
    Raises:
        WrongModel: they were made for different models.
        CannotMerge: different kinds, a scale meets an addition on one weight, or extras do not fit together.
    """
    patches = [as_patch(patch) for patch in (first, *others)]
    kinds = sorted({p.kind for p in patches})
    if len(kinds) > 1:
        raise CannotMerge(f"cannot merge patches of kind {' and '.join(kinds)}. Apply both instead.")
    prints = {p.base.fingerprint: p.base.name for p in patches}
    if len(prints) > 1:
        models = " and ".join(f"{name} ({print[:12]})" for print, name in prints.items())
        raise WrongModel(f"cannot merge patches for different models: {models}. Fit them on one model.")
    return patches[0].merged(patches[1:])


def merged_fields(patches: Sequence[Patch]) -> dict[str, Any]:
    """The fields of ``Patch`` for a merge of these patches.

    Raises:
        CannotMerge: extras of one name do not fit together.
    """
    merged = [{"method": p.method, "config": p.config, "hash": p.hash()} for p in patches]
    hashes = [one["hash"] for one in merged]
    for i, p in enumerate(patches):
        if hashes[i] in hashes[:i] and p.law() is Law.STACK:
            log.warning("%r is in this merge already: its change counts twice.", p)
    on = {key: method for p in patches for key, method in p.made.get("on", {}).items() if key not in hashes}
    norms = {name: norm for p in patches for name, norm in p.made.get("weight_norms", {}).items()}
    seconds = sum(p.made.get("seconds", 0.0) for p in patches)
    groups: dict[str, list[Tensor]] = {}
    for p in patches:
        for name, t in p.extras.items():
            groups.setdefault(name, []).append(t)
    try:
        extras = {name: torch.cat(ts) if len(ts) > 1 else ts[0] for name, ts in groups.items()}
    except RuntimeError as error:
        raise CannotMerge(f"extras of one name do not fit together ({error}). Merge without them.") from None
    return {
        "method": "+".join(dict.fromkeys(m for p in patches for m in p.method.split("+"))),
        "config": {"merged": merged},
        "base": replace(patches[0].base, touched={k: v for p in patches for k, v in p.base.touched.items()}),
        "edits": tuple(edit for p in patches for edit in p.edits),
        "made": {"finished": now(), "versions": versions(), "seconds": seconds, "weight_norms": norms, "on": on},
        "extras": extras,
    }
