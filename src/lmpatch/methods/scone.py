"""SCoNE: scale the neurons whose attribution to the context is high and differs between contexts.

IRCAN also picks neurons that are always on. Here a neuron counts for a record only if its credit is high and differs
from that of the records before.

Source: "SCoNE: Selective Context-aware Neuron Editing for Robust RAG", Hanyang University 2026 (HYU-ARK-Lab/SCoNE).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..data.context import ContextRecord, brief
from ..errors import BadInput
from ..locate import neurons as _neurons
from ..models.lm import LM
from ..patches.weight.delta import When
from ..patches.weight.patch import WeightPatch
from ..probes.integrated_gradients import probe as integrated_gradients
from ..progress import Progress

AIM = "context"
Record = ContextRecord


@dataclass(frozen=True)
class Config(integrated_gradients.Steps):
    """SCoNE. Defaults: the paper's."""

    weighting: Literal["endpoint", "path"] = "path"
    """As in ``integrated_gradients``; the paper takes the textbook's."""
    neurons: int = 5
    """k, neurons whose columns are scaled: those that are candidates of most records."""
    factor: float = 7.0
    """What the columns are multiplied by."""
    when: When = "context"
    """Act only in prompts that carry a context (``InContext``; ``--context``) and leave every other to the bit as it
    is, or ``always``, as published. Only the latter can be baked or exported."""
    window: int = 3
    """W, records before with whose mean credit a record's is compared. Their order matters."""
    pool: int = 50
    """Neurons with the highest credit, and with the most varying one, that may be candidates of a record."""
    candidates: Literal["both", "credit", "variation"] = "both"
    """In both pools, or in one only (the paper's ablations)."""
    examples: int = 100
    """Records used at most, the first ones."""


def fit(lm: LM, records: Sequence[ContextRecord], cfg: Config, *, progress: Progress | None = None) -> WeightPatch:
    """Scale the down-projection columns of the neurons that are candidates of most records.

    Args:
        records: in a fixed order, which the result depends on; each should change the subject.
    Returns:
        one Scale per layer that holds such a neuron. Notes: the neurons and how many records name each.
    Raises:
        BadInput: fewer neurons are candidates than are to be scaled.
    Source: HYU-ARK-Lab/SCoNE.
    Differs: the first record has nothing to be compared with and is skipped; neurons that equally many records name
    are ordered by their summed credit; columns are scaled only where a prompt carries a context, unless
    ``when="always"``.
    """
    _neurons.check(cfg.neurons, cfg.factor)
    if cfg.window < 1 or cfg.pool < 1:
        raise BadInput(f"window is {cfg.window} and pool {cfg.pool}. Both must be at least 1.")
    start = time.perf_counter()
    used = records[: cfg.examples]
    cases = integrated_gradients.cases(lm, used)
    credits = (credit for part in integrated_gradients.attributions(lm, cases, cfg) for credit in part.scores)
    found = []
    for one in named(credits, cfg):
        found.append(one)
        if progress:
            progress(len(found), len(used), "crediting neurons")
    counted = _neurons.ranked(found)
    _neurons.need(cfg.neurons, counted, len(used))
    chosen = counted[: cfg.neurons]
    notes = {"neurons": [[neuron.layer, neuron.index, count] for neuron, count in chosen]}
    neurons, seconds = [neuron for neuron, _ in chosen], time.perf_counter() - start
    made: dict[str, Any] = {"config": cfg, "edits": brief(records), "seconds": seconds, "notes": notes}
    return _neurons.scaling(lm, neurons, cfg.factor, when=cfg.when, method="scone", **made)


def named(credits: Iterable[Tensor], cfg: Config) -> Iterator[list[tuple[int, int, float]]]:
    """The candidates of each record. Credits of the last ``window`` records are all that is kept.

    Args:
        credits: [layers, f] of each record in turn, with ``path`` weighting.
    """
    before: deque[Tensor] = deque(maxlen=cfg.window)
    for credit in credits:
        varied = (credit - torch.stack(list(before)).mean(0)).abs() if before else None
        yield candidates(credit, varied, cfg)
        before.append(credit)


def candidates(credit: Tensor, varied: Tensor | None, cfg: Config) -> list[tuple[int, int, float]]:
    """(layer, index, credit) of one record's candidates, the highest credit first.

    Args:
        credit: [layers, f].
        varied: [layers, f] distance from the mean of the records before; None for the first record.
    """
    flat = credit.flatten()
    pools = [] if cfg.candidates == "variation" else [_pool(flat, flat, cfg.pool)]
    if cfg.candidates != "credit":
        if varied is None:
            return []
        pools.append(_pool(varied.flatten(), flat, cfg.pool))
    both = pools[0] & pools[-1]  # [layers * f]
    places = both.nonzero()[:, 0]
    places = places[flat[places].argsort(descending=True, stable=True)]
    width = credit.shape[1]
    pairs = zip(places.tolist(), flat[places].tolist(), strict=True)
    return [(place // width, place % width, score) for place, score in pairs]


def _pool(by: Tensor, credit: Tensor, size: int) -> Tensor:
    """[n] bool: the ``size`` highest in ``by`` among those with positive credit."""
    ordered = by.masked_fill(credit <= 0, -torch.inf).topk(min(size, len(by))).indices
    inside = torch.zeros_like(credit, dtype=torch.bool)
    inside[ordered] = True
    return inside & (credit > 0)


def estimate(lm: LM, count: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model, rounded up."""
    window = 4 * (cfg.window + 2) * lm.layout.n_layers * max(lm.layout.widths)
    return integrated_gradients.memory(lm, cfg) + window


def example(lm: LM) -> tuple[list[ContextRecord], Config]:
    """Records and settings that run in milliseconds on a tiny model."""
    return integrated_gradients.examples(), Config(steps=3, neurons=3, factor=2.0, when="always")
