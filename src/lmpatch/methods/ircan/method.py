"""``fit`` of IRCAN."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...data.context import ContextRecord, brief
from ...errors import BadInput
from ...inference.plain_text import perplexity
from ...locate import neurons as _neurons
from ...models.lm import LM
from ...models.units import Neuron
from ...patches.ledger import suspended, trial
from ...patches.weight.delta import When
from ...patches.weight.patch import WeightPatch
from ...probes.integrated_gradients import probe as integrated_gradients
from ...probes.integrated_gradients.scores import Scores, differing
from ...progress import Progress
from .grid import accuracies, foreign, own_answers
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
    when: When = "context"
    """Act only in prompts that carry a context (``InContext``; ``--context``) and leave every other to the bit as it
    is, or ``always``, as published. Only the latter can be baked or exported."""
    search_neurons: tuple[int, ...] = ()
    """Counts to choose from, each with every one of ``search_factors``, on the records, under the decode patches that
    are on the model. Empty: none."""
    search_factors: tuple[float, ...] = ()
    """Factors to choose from."""
    objective: Literal["bcu", "accuracy"] = "bcu"
    """What a search maximises. ``bcu`` (balance of context use): the mean of accuracy and robustness, which is to
    answer under another record's context what the unpatched model does without any. ``accuracy``: as published."""
    max_perplexity: float = 1.05
    """A search takes no setting that multiplies the perplexity of plain text by more."""
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
        records name none; with a search, the accuracy before, of every setting (what it was chosen by first), and of
        the finished patch on the model.
    Raises:
        BadInput: the records name fewer neurons than are to be scaled, other scores, one of the two lists of a search
            without the other, or no unrelated contexts to choose by bcu.
    Source: Shi et al. 2024 (arXiv:2406.18406), sec. 3.
    Differs: neurons are found on the records given, where released code also uses the half it reports on; the random
    control draws each neuron once; columns are scaled only where a prompt carries a context, unless ``when="always"``;
    a search is by bcu, unless ``objective="accuracy"``.
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
        count, factor, tried = _searched(lm, records, [neuron for neuron, _ in counted], settings, cfg, progress)
        notes |= tried
    chosen = counted[:count]
    notes["neurons"] = [[neuron.layer, neuron.index, named] for neuron, named in chosen]
    neurons = [neuron for neuron, _ in chosen]
    made: dict[str, Any] = {"method": "ircan", "config": cfg, "edits": brief(records), "notes": notes}
    patch = _neurons.scaling(lm, neurons, factor, when=cfg.when, **made)
    if settings:
        with trial(lm, patch, *patch.mounts):
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
    cfg: Config, progress: Progress | None,
) -> tuple[int, float, dict[str, Any]]:  # fmt: skip
    """The setting that is best by ``objective`` and keeps the perplexity; of equal ones the first."""
    every = [(0, 1.0), *settings]
    shares = [accuracies(lm, records, neurons, every, when=cfg.when, progress=progress)]
    if cfg.objective == "bcu":
        asked = foreign(records)
        words = own_answers(lm, asked)
        shares += [accuracies(lm, asked, neurons, every, words=words, when=cfg.when, progress=progress)]
    columns = shares if len(shares) == 1 else [torch.stack(shares).mean(0), *shares]  # what is chosen by comes first
    table = torch.stack(columns, 1)
    before, *found = shares[0].tolist()
    if not any(found):
        warnings.warn(
            f"no setting answers any of the {len(records)} records as its context says, so the search chose nothing: "
            "the gentlest setting was taken.",
            stacklevel=3,
        )
    rows = [[h, b, *(round(x, 5) for x in row)] for (h, b), row in zip(settings, table[1:].tolist(), strict=True)]
    best = _kept(lm, neurons, settings, table[1:, 0].tolist(), cfg)
    return *best, {"accuracy_before": before, "search": rows}


def _kept(
    lm: LM, neurons: Sequence[Neuron], settings: Sequence[tuple[int, float]], found: Sequence[float], cfg: Config
) -> tuple[int, float]:
    """The best setting under which plain text keeps its perplexity. In a context only, all do: no text is touched."""
    if cfg.when == "context":
        return best_of(settings, found)
    with suspended(lm):  # a decode patch reads no plain text
        before = perplexity(lm)
        for place in sorted(range(len(settings)), key=lambda i: (-found[i], i)):
            count, factor = settings[place]
            patch = _neurons.scaling(lm, neurons[:count], factor, method="ircan")
            with trial(lm, patch, *patch.mounts):
                if perplexity(lm) <= cfg.max_perplexity * before:
                    return settings[place]
    warnings.warn(
        f"every setting multiplies the perplexity of plain text by more than {cfg.max_perplexity}: the gentlest was "
        "taken. Let the patch act only in a context: when='context'.",
        stacklevel=4,
    )
    return settings[0]


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
    return integrated_gradients.examples(), Config(steps=3, neurons=4, factor=2.0, when="always")
