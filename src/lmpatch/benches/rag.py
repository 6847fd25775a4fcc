"""``rag``: does a model follow documents that answer, against its memory too, and shrug off those that do not?

Held-out articles are asked under five conditions, of the unpatched model and of patched ones, on the same items. What
is measured, and how each number is defined, stands in docs/benches.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.rag.reader import RagRecord, is_built, read_built, read_rag
from ..errors import BadInput
from ..inference.closed_book import closed_book_answers
from ..inference.generate import generate
from ..models.lm import LM
from ..patches.patch import Mount, Patch, plain
from ..progress import Progress
from ..provenance import hash_json
from ..resources import require_memory
from ._asking import BLOCK, beyond_window, finished, in_parts, split
from ._health import working_memory
from ._rag_report import Report, Run
from ._rag_rows import ALL, CONDITIONS, Metric, Row, Sample, judged, samples
from ._record import shared
from ._runs import BASE
from ._store import Store
from ._writer import mounted, refuse_patched

__all__ = ["Config", "Metric", "Report", "Row", "Run", "Sample", "load", "prepare", "read_report", "run", "score"]


stacks = True
"""``run`` takes several patches and puts them on in order."""


@dataclass(frozen=True)
class Config:
    """The RAG bench. What each number means: docs/benches.md."""

    n: int = 200
    """Items of each condition at most, half as many of ``mixed``, whose prompts are three times as long. They are
    chosen by the hash of their question; among irrelevant ones those the model knows come first."""
    conditions: tuple[str, ...] = tuple(CONDITIONS)
    """Conditions to ask: context, conflict, mixed, irrelevant, empty."""
    max_new_tokens: int = 16
    """Length of an answer at most; a new line ends it earlier."""
    seed: int = 0
    """Which items are chosen."""
    batch_size: int = 32
    """Prompts in one forward."""


def load(path: str | Path, *, limit: int | None = None) -> list[RagRecord]:
    """The held-out records of a file of ``lmpatch data rag``, of a SQuAD-format file, or of logs; ``dev.jsonl`` too.

    Args:
        limit: at most this many records of each variant.
    Raises:
        BadInput, BadRecord: as ``data.rag.read_rag``.
    """
    dev = is_built(path) and {r.part for r in read_built(path)} == {"dev"}
    return read_rag(path, part="dev" if dev else "held_out", limit=limit)


def prepare(
    lm: LM, records: Sequence[RagRecord], cfg: Config | None = None, *, progress: Progress | None = None
) -> list[Sample]:
    """The items of a run. The unpatched model is asked for its own answers first, which decide what conflicts.

    Raises:
        BadInput: the model carries patches, or nothing is left to ask.
    """
    cfg = cfg or Config()
    if odd := [name for name in cfg.conditions if name not in CONDITIONS]:
        raise BadInput(f"rag has no condition {odd[0]!r}. There are: {', '.join(CONDITIONS)}.")
    if cfg.n < 1:
        raise BadInput(f"n is {cfg.n}; give 1 or more.")
    refuse_patched(lm)
    questions = [r.question for r in records]
    said = closed_book_answers(lm, questions, progress=progress)
    own = {question: answer.text for question, answer in zip(questions, said, strict=True)}
    found: list[Sample] = []
    everything = samples(records, own)
    for condition in cfg.conditions:
        group = [s for s in everything if s.condition == condition]
        first = condition in ("irrelevant", "empty")
        group.sort(key=lambda s: (first and not s.known, hash_json([cfg.seed, s.id.partition(":")[0]])))
        found += group[: (cfg.n + 1) // 2 if condition == "mixed" else cfg.n]
    if not found:
        raise BadInput("nothing is left to ask: no record conflicts with the model's memory or has a true answer.")
    return found


def score(lm: LM, items: Sequence[Sample], cfg: Config | None = None, *, progress: Progress | None = None) -> list[Row]:
    """Ask the model as it is now, patches included.

    Returns:
        one row per item, in their order; one that is longer than the model's window is flagged and not asked.
    """
    cfg, made = cfg or Config(), []
    for part in split(items, BLOCK):
        flags = beyond_window(lm, [s.asked.prompt for s in part], new_tokens=cfg.max_new_tokens)
        asked = [s.asked for s, flag in zip(part, flags, strict=True) if not flag]
        said = iter(generate(lm, asked, max_new_tokens=cfg.max_new_tokens, batch_size=cfg.batch_size))
        made += [judged(s, "" if flag else next(said).strip(), flag) for s, flag in zip(part, flags, strict=True)]
        if progress:
            progress(len(made), len(items), "asking")
    return made


def run(
    lm: LM,
    records: Sequence[RagRecord],
    cfg: Config | None = None,
    *,
    patch: Patch | Sequence[Patch] | None = None,
    mount: Mount | None = None,
    run_id: str = "",
    data_name: str = "",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Ask the unpatched model, then the patched one the same, and restore it.

    Args:
        records: held-out ones, as ``load`` gives them.
        patch: one, or several that are put on in this order. None asks the unpatched model alone.
        run_id: the name in tables; empty: the patches' methods.
        out: folder for rows and records. A run that is there already goes on where it stopped, and the unpatched
            model is not asked again for another patch.
    Raises:
        BadInput: the model carries patches, nothing is left to ask, or the folder holds something else.
        NotEnoughMemory: asking would need more than is free.
        ForeignWrite: the model did not come back as it was.
    """
    cfg = cfg or Config()
    items = prepare(lm, records, cfg, progress=progress)
    need = working_memory(lm, [s.asked.prompt for s in items], cfg.max_new_tokens, cfg.batch_size)
    require_memory(need, lm.device, "asking")
    store = Store(Path(out) if out is not None else None, Row.read)
    base = _shared(lm, items, cfg) | {"data_name": data_name}

    def ask(record: dict[str, Any]) -> None:
        in_parts(lm, store, record, split(items, BLOCK), lambda part: score(lm, part, cfg), progress)

    ask(base | {"run_id": BASE, "baseline": True})
    patches = [patch] if isinstance(patch, Patch) else list(patch or ())
    if patches:
        with mounted(lm, patches, mount):
            ask(_of(base, run_id, patches, mount))
    return finished(store, Report, _numbers)


read_report = Report.read


def _shared(lm: LM, items: Sequence[Sample], cfg: Config) -> dict[str, Any]:
    settings = plain({k: v for k, v in asdict(cfg).items() if k != "batch_size"})
    settings |= {"data_hash": hash_json([[s.condition, s.id, s.asked.prompt, s.own] for s in items])}
    counts = {c: sum(s.condition == c for s in items) for c in cfg.conditions}
    return shared(lm, "rag", settings) | {"items": counts}


def _of(base: dict[str, Any], run_id: str, patches: Sequence[Patch], mount: Mount | None) -> dict[str, Any]:
    """The record of a patched model's run before it starts."""
    on = [{"method": p.method, "hash": p.hash(), "mount": mount or p.mounts[0]} for p in patches]
    name = run_id or " + ".join(p.method for p in patches)
    made = {"run_id": name, "baseline": False, "settings": base["settings"] | {"patches": on}, "patches": on}
    return base | made | {"bytes": sum(p.nbytes for p in patches)}


def _numbers(report: Report, run: Run) -> list[dict[str, Any]]:
    found = []
    for metric in filter(None, map(run.metric, ALL)):
        moved = report.difference(run.name, metric.name)
        found.append(asdict(metric) | {"difference": asdict(moved) if moved else None})
    return found
