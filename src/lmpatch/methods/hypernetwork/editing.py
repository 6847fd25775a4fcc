"""What a fit of both methods does: open the editor, read the facts' gradients, make the patches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...data.edits import Edit
from ...errors import BadInput
from ...inference.forward import HEAD_CHUNK, blocks, frozen, positions
from ...inference.tokens import Row, batches_of_rows, encode_all, ended, padded
from ...locate.gradients import Gradients, joined, read_gradients
from ...models.lm import LM
from ...patches.editor import Editor, find_editor
from ...patches.ledger import applied, suspended
from ...patches.weight.delta import Delta, Dense, LowRank
from ...patches.weight.patch import WeightPatch
from ...progress import Progress
from ...training import adapter
from .config import Training
from .network import Hypernetwork
from .trainer import how_to

BATCH = 32  # rows of one forward
TOKENS = 32  # of a long fact, for the estimate of memory
log = logging.getLogger(__name__)
H = TypeVar("H", bound=Hypernetwork)


def opened(form: type[H], lm: LM, editor: Editor | str | Path | None, default: Training) -> tuple[Editor, H]:
    """The editor of a method for this model, and its network.

    Raises:
        BadInput: there is none; says how one is trained and how long that takes.
        BadPatch, WrongModel: see ``find_editor``.
    """
    try:
        found = find_editor(form.method, lm, editor)
    except BadInput as error:
        raise how_to(form, lm, default, error) from None
    net = form.of(found, lm)
    assert isinstance(net, form)
    return found, net.requires_grad_(False)


@contextmanager
def as_trained(lm: LM, method: str, reset_each: bool, in_turn: int = 1) -> Iterator[None]:
    """Facts are read inside: with ``reset_each`` from the model without its patches, frozen in any case. Says so where
    weights are changed already, which no editor has learned to stand.

    Args:
        in_turn: so many facts are written one after the other.
    """
    on = sum(isinstance(one.patch, WeightPatch) for one in applied(lm))
    if on or in_turn > 1:
        why = f"{on} patches change its weights" if on else f"{in_turn} facts change it in turn"
        log.warning(
            "%s learned to edit %s as it was, and here %s. Such changes add up: after tens of them the model answers "
            "neither these facts nor others. Write all facts in one commit, or take patches off.", method, lm.name, why
        )  # fmt: skip
    if reset_each and applied(lm):
        with suspended(lm), frozen(lm):
            yield
    else:
        with frozen(lm):
            yield


def rows_of(lm: LM, editor: Editor, edits: Sequence[Edit]) -> list[Row]:
    """Facts as rows, with the end of the answer where the editor was trained with one."""
    rows = encode_all(lm, [e.prompt for e in edits], [e.target for e in edits])
    return ended(lm, rows, editor.config.get("end"))


def read(lm: LM, net: Hypernetwork, rows: Sequence[Row], progress: Progress | None = None) -> dict[str, Gradients]:
    """Inputs and gradients of the modules that are written, fact after fact: one forward, and one backward from the
    head down to the lowest of them."""
    parts: list[dict[str, Gradients]] = []
    done = 0
    for pick in batches_of_rows([len(row.ids) for row in rows], BATCH):
        own = [rows[i] for i in pick]
        ids, mask = padded(lm, [row.ids[:-1] for row in own], side="right")
        ends = torch.tensor([row.target - 1 for row in own], device=lm.device)
        run = partial(blocks, lm, ids, mask, position_ids=positions(mask), prompt_end=ends)
        found = read_gradients(lm, own, net.order, run, answers_only=net.answers_only)
        places = torch.tensor(pick, device=lm.device)
        parts.append({n: Gradients(places[g.row], g.inputs, g.gradients) for n, g in found.items()})
        done += len(pick)
        if progress:
            progress(done, len(rows), "reading gradients")
    return {name: joined([part[name] for part in parts]) for name in net.order}


def delta(a: Tensor, b: Tensor, strength: float) -> Delta:
    """ΔW = Σ b aᵀ of tokens [N, in] and [N, out], as factors or, where these would be larger, written out."""
    a, b = a.float(), strength * b.float()
    if len(a) * (a.shape[1] + b.shape[1]) > a.shape[1] * b.shape[1]:
        return Dense(b.T @ a)
    return LowRank(b.T.contiguous(), a.contiguous())


def patch(
    lm: LM, net: Hypernetwork, editor: Editor, deltas: Mapping[str, Delta], edits: Sequence[Edit], cfg: Any,
    seconds: float, **notes: Any,
) -> WeightPatch:  # fmt: skip
    """The patch of these changes by module name."""
    named = {lm.layout.weight(name): delta for name, delta in deltas.items()}
    layers = [i for i, down in enumerate(lm.layout.downs) if down in net.order]
    notes = {"editor": editor.hash(), "layers": layers, **notes}
    return WeightPatch.make(lm, named, method=net.method, config=cfg, edits=edits, seconds=seconds, notes=notes)


def memory(form: type[Hypernetwork], lm: LM, facts: int, default: Training) -> int:
    """Bytes a fit takes on top of the model, rounded up: gradients and factors of all facts, a network of the usual
    size, what autograd keeps of a batch, and logits of head chunks."""
    layout = lm.layout
    sizes = [adapter.shape(lm, name) for name in form.modules_of(lm, default.layers)]
    network = 2 * 2 * default.rank * sum({size: sum(size) for size in sizes}.values())
    tokens = facts * TOKENS * sum(map(sum, sizes))
    batch = min(BATCH, facts) * TOKENS * (6 * layout.n_layers * layout.d_model + 4 * max(layout.widths))
    return 4 * (4 * tokens + network + batch + 3 * HEAD_CHUNK * layout.vocab)
