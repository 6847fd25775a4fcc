"""``fit`` of IRCAN."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...data.context import ContextRecord, brief
from ...errors import BadInput
from ...locate import neurons as _neurons
from ...models.lm import LM
from ...models.units import Neuron
from ...patches.ledger import trial
from ...patches.weight.patch import WeightPatch
from ...probes.integrated_gradients import probe as integrated_gradients
from ...probes.integrated_gradients.scores import Scores, differing
from ...progress import Progress
from .grid import accuracies
from .grid import memory as grid_memory

Record = ContextRecord


@dataclass(frozen=True)
class Config(integrated_gradients.Config):
    """IRCAN. Neurons are found with the paper's settings; ``neurons`` and ``factor`` are near the best for Gemma-3-270M
    on MemoTrap's dev half. The paper chooses both per model and task out of 1-16 and 2-20 (Llama-2-7B: 14 and 7)."""

    neurons: int = 32
    """h, neurons whose columns are scaled: those that most records name."""
    factor: float = 2.0
    """β, what the columns are multiplied by. 0 erases the neurons (the paper's ErCAN)."""
    search_neurons: tuple[int, ...] = ()
    """Counts to choose from, each with every one of ``search_factors``, by accuracy on the records, under the decode
    patches that are on the model. Empty: none."""
    search_factors: tuple[float, ...] = ()
    """Factors to choose from."""
    examples: int = 100
    """Neurons are found on at most this many records, the first ones."""
    ties: Literal["score", "first_seen"] = "score"
    """Order of neurons that equally many records name: by their summed scores or, as released, by first appearance."""
    control_seed: int | None = None
    """Scale as many neurons drawn at random with this seed instead (the paper's ERN). None: off."""


def fit(
    lm: LM, records: Sequence[ContextRecord], cfg: Config, *, scores: Scores | None = None,
    progress: Progress | None = None,
) -> WeightPatch:  # fmt: skip
    """Scale the down-projection columns of the neurons that most records name.

    Args:
        records: the half on which everything is chosen. Keep the other half for the bench (``data.context.halves``).
        scores: what ``integrated_gradients`` found on the first ``examples`` of these records with these settings, if
            it is there already.
    Returns:
        one Scale per layer that holds such a neuron. Notes: the neurons and how many records name each, and how many
        records name none; with a search, the accuracy before, of every setting, and of the finished patch on the model.
    Raises:
        BadInput: the records name fewer neurons than are to be scaled, other scores, or one of the two lists of a
            search without the other.
    Source: Shi et al. 2024 (arXiv:2406.18406), sec. 3.
    Differs: neurons are found on the records given, where released code also uses the half it reports on; the random
    control draws each neuron once.
    """
    if bool(cfg.search_neurons) != bool(cfg.search_factors):
        raise BadInput("a search needs both search_neurons and search_factors. Give both lists, or neither.")
    settings = grid(cfg.search_neurons, cfg.search_factors)[1:]
    for count, factor in [(cfg.neurons, cfg.factor), *settings]:
        _neurons.check(count, factor)
    start = time.perf_counter()
    counted, notes = _found(lm, records, cfg, scores, progress)
    count, factor = cfg.neurons, cfg.factor
    if settings:
        count, factor, tried = _searched(lm, records, [neuron for neuron, _ in counted], settings, progress)
        notes |= tried
    chosen = counted[:count]
    notes["neurons"] = [[neuron.layer, neuron.index, named] for neuron, named in chosen]
    neurons = [neuron for neuron, _ in chosen]
    patch = _neurons.scaling(lm, neurons, factor, method="ircan", config=cfg, edits=brief(records), notes=notes)
    if settings:
        with trial(lm, patch, "bake", "side"):
            patch.notes["accuracy"] = float(accuracies(lm, records, [], [(0, 1.0)])[0])
    patch.made["seconds"] = round(time.perf_counter() - start, 3)
    return patch


def _found(
    lm: LM, records: Sequence[ContextRecord], cfg: Config, scores: Scores | None, progress: Progress | None
) -> tuple[list[tuple[Neuron, int]], dict[str, Any]]:
    """Neurons, the most named first, and how many records name each; and notes."""
    count = max(cfg.search_neurons, default=cfg.neurons)
    if cfg.control_seed is not None:
        return [(neuron, 0) for neuron in _neurons.drawn(lm, count, cfg.control_seed)], {}
    used = records[: cfg.examples]
    found = scores or integrated_gradients.run(lm, used, cfg, progress=progress)
    if differ := differing(found.header, integrated_gradients.asked(lm, used, cfg)):
        raise BadInput(
            f"these scores are of another run: {', '.join(differ)} differ. Score the first {len(used)} of these "
            "records with these settings."
        )
    counted = _neurons.ranked((credit.neurons for credit in found.records), cfg.ties)
    _neurons.need(count, counted, len(used))
    return counted, {"records_without_neurons": sum(not credit.neurons for credit in found.records)}


def _searched(
    lm: LM, records: Sequence[ContextRecord], neurons: Sequence[Neuron], settings: Sequence[tuple[int, float]],
    progress: Progress | None,
) -> tuple[int, float, dict[str, Any]]:  # fmt: skip
    """The setting with the highest accuracy; of equal ones the first."""
    before, *found = accuracies(lm, records, neurons, [(0, 1.0), *settings], progress=progress).tolist()
    if not any(found):
        warnings.warn(
            f"no setting answers any of the {len(records)} records as its context says, so the search chose nothing: "
            "the gentlest setting was taken.",
            stacklevel=3,
        )
    table = [[h, b, round(a, 5)] for (h, b), a in zip(settings, found, strict=True)]
    return *best_of(settings, found), {"accuracy_before": before, "search": table}


def grid(counts: Sequence[int], factors: Sequence[float]) -> list[tuple[int, float]]:
    """The model as it is, then every pair, the gentlest first."""
    return [(0, 1.0), *((h, b) for h in sorted(counts) for b in sorted(factors))]


def best_of(settings: Sequence[tuple[int, float]], found: Sequence[float]) -> tuple[int, float]:
    """The setting with the highest number; of equal ones the first."""
    return settings[max(range(len(settings)), key=lambda i: (found[i], -i))]


def estimate(lm: LM, count: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model, rounded up."""
    return max(integrated_gradients.memory(lm, cfg), grid_memory(lm) if cfg.search_neurons else 0)


def example(lm: LM) -> tuple[list[ContextRecord], Config]:
    """Records and settings that run in milliseconds on a tiny model."""
    return integrated_gradients.examples(), Config(steps=3, neurons=4, factor=2.0)
