"""A bench module as ``core`` sees it. What a module may leave out is looked up here and nowhere else."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import BadInput
from ...models.lm import LM
from ...patches.patch import plain
from ...progress import Progress
from .contract import Answer, Json, Measure, Plot, Settings
from .stats import REPETITION

Ask = Callable[[LM, Sequence[Any], Any], Sequence[Any]]
"""(model, items, the unpatched model's rows of them) → rows."""


def _nothing(*given: Any) -> Any:
    return {}


@dataclass(frozen=True)
class Adapter:
    """``benches.Bench``, and below it what a module may have besides."""

    name: str
    question: str
    """First line of the module's text, without its name."""
    Config: type[Settings]
    METRICS: Mapping[str, Measure]
    ask: Callable[..., Sequence[Any]]
    """A third parameter ``base`` takes the unpatched model's rows of the same items; None while it is asked itself."""

    # What a module may leave out

    Row: Any = Answer
    """Class of its rows."""
    PLOTS: Sequence[Plot] = ()
    OWN: Sequence[str] = ()
    """Settings of a patched run that leave the baselines as they are."""
    COSTS: Sequence[str] = ()
    """Settings that decide no answer: a run may go on under others."""
    JUDGED_BY: str = ""
    """The number by which a patched run is compared with the baselines that are prompts; the verdict says who loses."""
    CONTEXTS: bool = False
    """Its prompts have a form without context, so decode patches can be measured."""
    settle: Callable[[Any, Any, bool], Any] = lambda cfg, data, fixed: cfg
    """(settings, data, one patch for all of it) → the settings with what they leave open; raises for bad ones."""
    plan: Callable[..., Sequence[Any]] = lambda lm, data, cfg, **how: list(data)
    """``plan(lm, data, cfg, fixed=, progress=)`` → the items to ask."""
    group: Callable[[Any], Hashable] = lambda item: ""
    """Items of different groups are never kept as one chunk."""
    size: Callable[[Any], int] = lambda item: 1
    """Prompts of an item, as progress counts them."""
    identity: Callable[[Any], Any] = plain
    """What makes an item this one, as JSON."""
    texts: Callable[[Sequence[Any], Any], tuple[list[str], int]] = lambda items, cfg: ([], 0)
    """(items, settings) → the longest texts that are read, and new tokens behind each: for the memory needed."""
    warm: Callable[[LM, Sequence[Any], Any, Path | None, Progress | None], object] = _nothing
    """What the unpatched model is asked ahead of its run; the folder may keep it."""
    baselines: Callable[[Any], Mapping[str, Ask]] = _nothing
    """Settings → further runs of the unpatched model."""
    record: Callable[[Sequence[Any], Any, Any], Json] = _nothing
    """(items, data, settings) → what else a run's record says."""
    summary: Callable[[LM, Sequence[Any], Sequence[Json]], Json] = _nothing
    """(model, rows, chunks) → what a finished run's record says besides its numbers; ``costs`` becomes a table."""
    commits: Callable[[Any], Sequence[Sequence[Any]]] | None = None
    """An item's edits, commit by commit, where a method makes the patches of each item."""
    fit_batch: Callable[[Any], int] = lambda cfg: 1
    """Settings → single edits that are fitted in one call."""
    write: Callable[..., tuple[Sequence[Any], Json]] | None = None
    """``write(lm, item, cfg, fits, writer)``: put its commits on and ask; rows, and what is kept of the chunk."""

    @property
    def metrics(self) -> Mapping[str, Measure]:
        """Its numbers, and how often its answers repeat themselves."""
        return {**self.METRICS, **REPETITION}

    def asks(self, cfg: Any) -> Ask:
        """How it is asked, the unpatched model's rows where it wants them."""
        if "base" in inspect.signature(self.ask).parameters:
            return lambda lm, items, base: self.ask(lm, items, cfg, base=base)
        return lambda lm, items, base: self.ask(lm, items, cfg)


def adapt(bench: ModuleType | Adapter | str) -> Adapter:
    """The bench of a module, or of that with this full name; ``BadInput`` where it lacks what every bench has."""
    if isinstance(bench, Adapter):
        return bench
    module = importlib.import_module(bench) if isinstance(bench, str) else bench
    name = module.__name__.rpartition(".")[2]
    if missing := [each for each in ("Config", "METRICS", "load", "ask") if not hasattr(module, each)]:
        raise BadInput(f"the bench {name} has no {', '.join(missing)}. benches.Bench says what one must have.")
    question = (module.__doc__ or name).strip().partition("\n")[0].removeprefix(f"``{name}``:").strip()
    given = {each.name: getattr(module, each.name) for each in fields(Adapter) if hasattr(module, each.name)}
    return Adapter(**given | {"name": name, "question": question[:1].upper() + question[1:]})
