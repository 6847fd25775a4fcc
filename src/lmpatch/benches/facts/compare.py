"""Several editors on the same facts, asked the same questions: which one should I take?

Who makes the patches is a value here, an ``Entrant``: a bench knows no method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from ...data.edits import Edit
from ...errors import BadInput, ForeignWrite, LmpatchError
from ...models.lm import LM
from ...patches.file import load_patch
from ...patches.patch import Mount, Patch, plain
from ...progress import Progress
from ...provenance import hash_json
from ..core.report import Report
from ..core.runner import estimate, run
from ..core.writer import Make, MakeEach
from .cases import Config as Asked

BENCH = "lmpatch.benches.facts"
PROBES = 2
"""Facts that are written and asked for an estimate."""
PASSES = 3
"""Models that an estimate of the bench counts: unpatched, with the fact in the prompt, patched."""


@dataclass(frozen=True)
class Config:
    """What is asked of every editor."""

    cases: int = 100
    """Facts that are asked, chosen by the seed where there are more. All of them are written."""
    seed: int = 0
    """Which facts those are, and the resamples."""
    max_new_tokens: int = 32
    """Length of an answer at most; the model, or a new line, ends it earlier."""
    per_kind: int = 1
    """Prompts of one kind a fact may ask."""
    pack: int = 10
    """Facts that are asked the probe pack, which finds facts that are only recited. 0: none."""
    batch_size: int = 64
    """Texts in one forward."""
    bootstrap: int = 1000
    """Resamples behind each interval; 0: none."""

    def bench(self, **more: Any) -> Asked:
        """The same as settings of the facts bench."""
        own = {name: value for name, value in vars(self).items() if name != "cases"}
        return Asked(**{**own, "sample": self.cases, "distractor": False, **more})


@dataclass(frozen=True)
class Entrant:
    """One editor with its settings."""

    name: str
    make: Make
    """Writes facts in one commit."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """For the record; what was made under other ones is made again."""
    make_each: MakeEach | None = None
    """Writes single facts, many in one call; None: it cannot."""
    memory: Callable[[LM, int], int] | None = None
    """Bytes that writing so many facts takes on top of the model; None: unknown."""
    training: float | None = None
    """Seconds its editor was trained for; None: it has none, or nobody wrote them down."""
    statistics: float | None = None
    """Seconds of statistics that an earlier call took, and that are in the cache now."""


class Expected(NamedTuple):
    """What one entrant will take, about."""

    name: str
    seconds: float
    """Writing and asking; 0 where it cannot run."""
    bytes: int
    why: str = ""
    """Why it cannot run."""
    each: float = 0.0
    """Seconds of writing one fact, of few at a time."""
    statistics: float | None = None
    """Seconds its statistics took, which are in the cache now and serve every later edit; None: it takes none."""


def expected(lm: LM, edits: Sequence[Edit], entrants: Sequence[Entrant], cfg: Config) -> list[Expected]:
    """Write and ask a few facts with each entrant, and tell what all of them will take. A method that writes many
    facts at once takes less.

    Raises:
        NotEnoughMemory: asking would need more than is free.
    """
    some = list(edits[:PROBES])
    asked = estimate(BENCH, lm, some, cfg.bench(latency=False, pack=min(cfg.pack, len(some))))
    one_pass = asked.seconds / asked.items / PASSES * min(len(edits), cfg.cases)
    found = []
    for who in entrants:
        start = perf_counter()
        try:
            patch = who.make(lm, some)
            each = patch.made.get("seconds", perf_counter() - start) / len(some)
            need = max(asked.bytes, who.memory(lm, len(edits)) if who.memory else 0)
            prep = patch.notes.get("prep_seconds")
            found.append(Expected(who.name, each * len(edits) + one_pass, need, each=each, statistics=prep))
        except ForeignWrite:
            raise
        except LmpatchError as error:
            found.append(Expected(who.name, 0.0, 0, str(error)))
    return [Expected("unpatched, fact in the prompt", 2 * one_pass, asked.bytes), *found]


def written(lm: LM, edits: Sequence[Edit], who: Entrant, folder: Path) -> Patch:
    """The entrant's patch of these facts; one that the folder holds, of the same facts and settings, is read."""
    place = folder / "patches" / slug(who.name)
    same = hash_json([lm.fingerprint(), plain(dict(who.settings)), plain(list(edits))])[:16]
    if place.exists():
        patch = load_patch(place)
        if patch.made.get("compared") == same:
            return patch
        raise BadInput(f"{place} is a patch of other facts or settings. Move it away, or choose another folder.")
    patch = who.make(lm, list(edits))
    patch.made["compared"] = same
    patch.save(place)
    return patch


def slug(name: str) -> str:
    """A name as one of a file."""
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-.")


def entered(
    lm: LM, edits: Sequence[Edit], who: Entrant, cfg: Config, folder: Path, *,
    mount: Mount | None = None, data_name: str = "", progress: Progress | None = None, **more: Any,
) -> Report:  # fmt: skip
    """Write all facts with one entrant and ask. What the folder holds already is neither written nor asked again.

    Args:
        more: further settings of the facts bench.
    """
    patch = written(lm, edits, who, folder)
    statistics = max((x for x in (who.statistics, patch.notes.get("prep_seconds")) if x is not None), default=None)
    spent = {"training_s": who.training, "statistics_s": statistics}
    prep = {name: value for name, value in spent.items() if value is not None}
    told = progress and (lambda done, total, what: progress(done, total, f"{who.name}: {what}"))
    return run(
        BENCH, lm, list(edits), cfg.bench(**more), patch=patch, mount=mount, settings=who.settings, prep=prep,
        run_id=who.name, data_name=data_name, out=folder, progress=told,
    )  # fmt: skip


def contest(
    lm: LM, edits: Sequence[Edit], entrants: Sequence[Entrant], cfg: Config, folder: Path, *,
    mount: Mount | None = None, data_name: str = "", progress: Progress | None = None,
) -> tuple[Report, dict[str, str]]:  # fmt: skip
    """Every entrant in turn: the report of those that ran, and why the others did not.

    Raises:
        BadInput: none of them could write the facts.
        ForeignWrite: the model did not come back as it was.
    """
    reports, left_out = [], dict[str, str]()
    enter = partial(entered, lm, edits, mount=mount, data_name=data_name, progress=progress)
    for who in entrants:
        try:
            reports.append(enter(who=who, cfg=cfg, folder=folder))
        except ForeignWrite:
            raise
        except LmpatchError as error:
            left_out[who.name] = str(error)
    if not reports:
        why = " ".join(f"{name}: {said}" for name, said in left_out.items())
        raise BadInput(f"no method could write these facts. {why or 'None was named.'}")
    last, own = reports[-1], {who.name for who in entrants} - left_out.keys()  # it reads the whole folder
    return replace(last, runs=tuple(one for one in last.runs if one.record["baseline"] or one.name in own)), left_out
