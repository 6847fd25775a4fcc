"""A model whose blocks are shared among the processes of a run (FSDP)."""

from __future__ import annotations

import torch

from ..distributed import world
from ..errors import BadInput
from .lm import LM


def sharded(lm: LM) -> bool:
    """Whether this process holds only its part of some weights, by ``shard`` or by the caller's own FSDP."""
    return any(hasattr(p, "to_local") for p in lm.model.parameters())  # DTensor, whose module is slow to import


def shard(lm: LM, device: str = "cpu") -> None:
    """Share the blocks of the model among the processes (FSDP): each holds its part, and a whole block while it runs.

    The model can then be run but not patched. Every process must run the same number of passes.

    Args:
        lm: on the CPU, so that no device ever holds all of it.
        device: this process's own. Embedding and head are whole on each.
    Raises:
        BadInput: there is one process only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if world().size == 1:
        raise BadInput(
            "one process has nobody to share the model with. Start several: "
            "accelerate launch --num_processes 2 -m lmpatch …"
        )
    lm.fingerprint()  # while every weight is here
    mesh = init_device_mesh(torch.device(device).type, (world().size,))
    for name in lm.layout.blocks:
        fully_shard(lm.module(name), mesh=mesh)
    lm.model.to(device)
