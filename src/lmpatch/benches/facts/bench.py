"""The facts bench itself: settings, chunks of edits, and what is asked of them when."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ...data.edits import Ask, Edit, read_asks, read_edits
from ...errors import BadInput
from ...models.lm import LM
from ...patches.patch import plain
from ...progress import Progress
from ...provenance import hash_json
from ...resources import format_bytes
from ..core.contract import Json, Settings
from ..core.health import latency, perplexity
from ..core.writer import Fitted, Writer, refuse_patched
from . import asking
from .asking import Answers, Protocol
from .cases import Chunk, Question, plan_chunks
from .rows import FactRow, protocol, retention

OWN = ("immediate", "retention")
COSTS = ("fit_batch", "latency", "health")
POINTS = (1, 10, 100, 1000, 10000)
"""Edits in the model at which the retention curve is taken."""
STOPPED = "stopped: the model had collapsed"
WARM_UP = 3  # commits whose time is left out of edit_s, where there are more
COSTS_NOTE = (
    "Per edit: fitting only, evaluation left out. Per token: patched, and unpatched in brackets. Perplexity: the "
    "highest after any commit, as a multiple of the unpatched model's. ‖ΔW‖/‖W‖: the largest of any commit and weight."
)


@dataclass(frozen=True)
class Config(Settings):
    """The facts bench. What each number means: docs/benches.md."""

    n: int = 1
    """Edits that are in the model together; after them it is restored."""
    commit_size: int | None = None
    """Edits written by one call of the method. None: all n."""
    chunks: int | None = None
    """Groups of n edits to run at most. None: as many as the data fills."""
    max_new_tokens: int = 32
    """Length of an answer at most; a new line ends it earlier."""
    em_rule: Literal["prefix", "full"] = "prefix"
    """An answer is right if it begins with an accepted spelling, or (full, for chat models) if it is one."""
    immediate: bool = True
    """Also score each edit right after its commit, where a chunk has several."""
    retention: bool = False
    """Follow a tenth of the edits while later ones are written."""
    teacher_forced: bool = True
    """Also the tf_ numbers of older papers. They are easier than the generated ones and stand apart."""
    per_kind: int = 5
    """Prompts of one kind a case may ask."""
    distractor: bool = True
    """Also ask one locality prompt of each case behind the edit sentence."""
    sample: int = 1000
    """Edits of a larger chunk that are scored."""
    raw: bool = False
    """No rules for colliding facts, to reproduce others' numbers."""
    health: bool = True
    """Perplexity of fixed text after each commit; a chunk stops at twice the base's."""
    latency: bool = True
    """Time a prompt and a token with and without the first chunk's patches."""
    fit_batch: int = 32
    """Independent single edits fitted in one call, by methods that can."""


@dataclass
class Base:
    """What the unpatched model answered, and its perplexity; one for all chunks of a call."""

    answers: Answers = field(default_factory=Answers)
    perplexity: float | None = None


@dataclass(frozen=True)
class Item:
    """A chunk, and the unpatched model's answers to everything about it."""

    chunk: Chunk
    base: Base
    left_over: int
    """Edits of the data that filled no chunk."""
    chat: bool
    """Prompts are asked through the model's chat template."""


def load(
    path: str | Path, *, limit: int | None = None, seed: int | None = None, unrelated: str | Path | None = None
) -> list[Edit]:
    """Facts from a file, see ``data.edits``.

    Args:
        unrelated: a file of questions; one of them joins each edit as locality kind ``unrelated``.
    """
    edits = read_edits(path, limit=limit, seed=seed)
    return edits if unrelated is None else with_unrelated(edits, read_asks(unrelated))


def with_unrelated(edits: Sequence[Edit], asks: Sequence[Ask]) -> list[Edit]:
    """The edits, each with one of the questions as locality kind ``unrelated``, in turn."""
    return [
        replace(edit, locality=(*edit.locality, ("unrelated", (asks[i % len(asks)],)))) for i, edit in enumerate(edits)
    ]


def settle(cfg: Config, edits: Sequence[Edit], fixed: bool) -> Config:
    """The settings; a patch that is there already is scored on all edits as one chunk."""
    if fixed:
        return replace(cfg, n=len(edits), commit_size=None, chunks=None)
    if cfg.n < 1 or _commit_size(cfg) < 1:
        raise BadInput(f"n is {cfg.n} and commit_size {cfg.commit_size}; both must be 1 or more.")
    return cfg


def plan(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, fixed: bool = False, progress: Progress | None = None
) -> list[Item]:
    """The chunks, each with what will be asked of it."""
    chunks, left = plan_chunks(
        edits,
        n=cfg.n,
        commit_size=_commit_size(cfg),
        seed=None if fixed else cfg.seed,
        chunks=cfg.chunks,
        per_kind=cfg.per_kind,
        distractor=cfg.distractor,
        sample=cfg.sample,
        raw=cfg.raw,
    )
    if fixed:  # it holds whatever it holds
        chunks = [replace(chunk, commits=(tuple(range(len(chunk.edits))),)) for chunk in chunks]
    base = Base()
    return [Item(chunk, base, left, lm.chat is not None) for chunk in chunks]


def warm(lm: LM, items: Sequence[Item], cfg: Config, folder: Path | None, progress: Progress | None) -> None:
    """Ask the unpatched model everything at once; the folder keeps its answers by weights, prompts and protocol."""
    refuse_patched(lm)
    base = items[0].base
    questions = [q for item in items for q in item.chunk.every()]
    base.answers.update(asking.ask_base(lm, questions, _how(cfg), folder, progress))
    base.perplexity = perplexity(lm) if cfg.health and base.perplexity is None else base.perplexity


def ask(lm: LM, items: Sequence[Item], cfg: Config, base: Sequence[FactRow] | None = ()) -> list[FactRow]:
    """Rows of the model as it is now, the edits in it or not. ``warm`` comes first, on the unpatched model.

    Args:
        base: None: it is the unpatched one, whose answers are known.
    """
    rows: list[FactRow] = []
    for item in items:
        pass_, questions = _Pass(lm, item, cfg), item.chunk.questions
        rows += pass_.known(questions) if base is None else pass_.score(questions, "final")
    return rows


def baselines(cfg: Config) -> Mapping[str, Any]:
    """The fact simply written into the prompt."""

    def in_prompt(lm: LM, items: Sequence[Item], base: Any) -> list[FactRow]:
        return [row for item in items for row in _Pass(lm, item, cfg).known(item.chunk.with_fact())]

    return {"fact_in_prompt": in_prompt}


def group(item: Item) -> int:
    """Every chunk stands alone."""
    return item.chunk.index


def identity(item: Item) -> Any:
    """Its edits."""
    return plain(item.chunk.edits)


def texts(items: Sequence[Item], cfg: Config) -> tuple[list[str], int]:
    """Every prompt, and the new tokens behind each."""
    return [q.text for item in items for q in item.chunk.every() if not q.flag], cfg.max_new_tokens


def fit_batch(cfg: Config) -> int:
    """Single edits that are fitted in one call."""
    return cfg.fit_batch


def commits(item: Item) -> list[list[Edit]]:
    """The chunk's edits, commit by commit."""
    return [[item.chunk.edits[i] for i in commit] for commit in item.chunk.commits]


def write(lm: LM, item: Item, cfg: Config, fits: Iterable[Fitted], writer: Writer) -> tuple[list[FactRow], Json]:
    """Write the chunk commit by commit and ask: after each commit its own edits, at the end everything."""
    chunk, pass_ = item.chunk, _Pass(lm, item, cfg, writer)
    writer.base_perplexity = item.base.perplexity
    if cfg.retention and len(chunk.commits) > 1:
        pass_.probes = frozenset(chunk.probes())
    speed = {"base": latency(lm)} if cfg.latency and chunk.index == 0 else {}
    rows: list[FactRow] = []
    for number, fitted in enumerate(fits):
        commit = chunk.commits[number]
        pass_.notes |= {commit[i]: why for i, why in fitted.refused.items()}
        writer.write(fitted)
        pass_.after |= dict.fromkeys(commit, writer.edits)
        if number + 1 < len(chunk.commits):
            rows += pass_.early(number)
        if writer.collapsed_at is not None:
            pass_.notes |= {i: STOPPED for rest in chunk.commits[number + 1 :] for i in rest}
            break
    rows += pass_.final()
    speed |= {"patched": latency(lm)} if speed else {}
    return rows, {"counts": chunk.counts, "refused": len(pass_.notes), "infer_ms": speed or None}


@dataclass
class _Pass:
    """One chunk on its way through the commits."""

    lm: LM
    item: Item
    cfg: Config
    writer: Writer | None = None
    after: dict[int, int] = field(default_factory=dict)
    """Edit → how many edits were in the model right after its commit."""
    notes: dict[int, str] = field(default_factory=dict)
    """Edit → why it is not in the model."""
    probes: frozenset[int] = frozenset()

    @property
    def edits(self) -> int:
        """How many are in the model."""
        return self.writer.edits if self.writer else 0

    def early(self, commit: int) -> list[FactRow]:
        """Rows taken between commits: the commit's own edits, and older probes where the curve has a point."""
        own = self.item.chunk.after_commit(commit)
        if not self.cfg.immediate:
            own = [q for q in own if q.case in self.probes]
        before = self.edits - (self.writer.commits[-1]["edits"] if self.writer and self.writer.commits else 0)
        crossed = any(before < point <= self.edits for point in POINTS)
        old = [
            q
            for q in self.item.chunk.questions
            if crossed and q.kind == "edit" and q.case in self.probes
            if self.after.get(q.case, self.edits) < self.edits
        ]
        return self.score(own, "immediate") + self.score(old, "retention")

    def final(self) -> list[FactRow]:
        """Rows with all edits in place; those of the last commit are its immediate ones, too."""
        chunk = self.item.chunk
        rows = self.score(chunk.questions, "final")
        if not self.cfg.immediate or len(chunk.commits) == 1:
            return rows
        fresh = {i for i in chunk.commits[-1] if i not in self.notes}
        same = [row for row in rows if row.edit_index in fresh and row.kind in ("edit", "rephrase")]
        return rows + [replace(row, when="immediate", probe=False) for row in same]

    def score(self, questions: Sequence[Question], when: str) -> list[FactRow]:
        """Ask the model as it is now."""
        if not questions:
            return []
        now = asking.ask(self.lm, questions, _how(self.cfg))
        kl = self.writer is None or not self.writer.tail_touched
        return self._placed(
            asking.rows(self.lm, questions, self.item.base.answers, now, _how(self.cfg), kl=kl), questions, when
        )

    def known(self, questions: Sequence[Question]) -> list[FactRow]:
        """What the unpatched model answered already."""
        base = self.item.base.answers
        return self._placed(asking.rows(self.lm, questions, base, base, _how(self.cfg)), questions, "final")

    def _placed(self, rows: Sequence[FactRow], questions: Sequence[Question], when: str) -> list[FactRow]:
        """The rows with their place in the run."""
        return [
            replace(
                row,
                when=when,
                case_id=self.item.chunk.edits[q.case].id,
                flag=row.flag or self.notes.get(q.case, ""),
                edit_index=q.case,
                age=self.edits - self.after.get(q.case, self.edits),
                n_edits=self.edits,
                probe=q.case in self.probes,
            )
            for row, q in zip(rows, questions, strict=True)
        ]


def record(items: Sequence[Item], edits: Sequence[Edit], cfg: Config) -> Json:
    """The protocol, and how many edits stand together."""
    suffix = _suffix(cfg, items[0].chat)
    counts: Counter[str] = Counter()
    for item in items:
        counts.update(item.chunk.counts)
    return {
        "protocol_id": protocol("gen", "final", suffix),
        "suffix": suffix,
        "n_edits": cfg.n,
        "commit_size": _commit_size(cfg),
        "order_seed": cfg.seed,
        "left_over": items[0].left_over,
        "chat_template": items[0].chat,
        "collision_counts": dict(counts),
    }


def summary(lm: LM, rows: Sequence[FactRow], chunks: Sequence[Json]) -> Json:
    """Costs and health of a finished run, from its rows and chunks."""
    written = [commit for chunk in chunks for commit in chunk.get("commits", [])]
    if not written:
        return {}
    each = [commit["seconds"] / commit["edits"] for commit in written if commit["edits"]]
    times = _times(each[WARM_UP:] if len(each) > WARM_UP else each)
    health = _health(chunks, written)
    speed = next((chunk["infer_ms"] for chunk in chunks if chunk.get("infer_ms")), None)
    size = sum(commit["bytes"] for commit in written) / sum(commit["edits"] for commit in written)
    collapsed = [chunk["collapsed_at"] for chunk in chunks if chunk["collapsed_at"] is not None]
    refused = sum(chunk["refused"] for chunk in chunks)
    costs = {
        "s per edit": f"{times['median']:.3g}",
        "p95": f"{times['p95']:.3g}",
        "bytes per edit": format_bytes(round(size)),
    }
    costs |= {"ms per token": f"{speed['patched']['token_b1']:.1f} ({speed['base']['token_b1']:.1f})"} if speed else {}
    if health["perplexity_max"] is not None:
        costs["perplexity"] = f"{health['perplexity_max'] / health['base_perplexity']:.2f} ×"
    costs |= {"‖ΔW‖/‖W‖": f"{health['change_max']:.2g}"} if health["change_max"] is not None else {}
    costs |= {"refused": str(refused), "collapsed": f"{len(collapsed)} of {len(chunks)}"}
    return {
        "method": written[0]["method"],
        "mount": written[0]["mount"],
        "patch_hash": written[0]["patch"] if len(written) == 1 else hash_json([c["patch"] for c in written]),
        "edit_s": times,
        "bytes_per_edit": size,
        "infer_ms": speed,
        "refused": refused,
        "retention": retention(rows),
        "health": health,
        "collapsed_at": collapsed,
        "costs": costs,
        "costs_note": COSTS_NOTE,
    }


def _times(each: list[float]) -> dict[str, float]:
    p95 = statistics.quantiles(each, n=20, method="inclusive")[-1] if len(each) > 1 else each[0]
    return {"median": statistics.median(each), "p95": p95, "commits": len(each)}


def _health(chunks: Sequence[Json], written: Sequence[Json]) -> dict[str, Any]:
    """The worst that was seen after any commit."""
    return {
        "base_perplexity": chunks[0]["base_perplexity"],
        "perplexity_max": max((c["perplexity"] for c in written if "perplexity" in c), default=None),
        "change_max": max((value for c in written for value in c["change"].values()), default=None),
        "rounding_error_max": max(c["rounding_error"] for c in written),
    }


def _how(cfg: Config) -> Protocol:
    """The part of the settings that decides an answer."""
    return Protocol(cfg.max_new_tokens, cfg.em_rule, cfg.teacher_forced, cfg.batch_size)


def _suffix(cfg: Config, chat: bool) -> str:
    """What in the settings makes another protocol, as the end of its id."""
    length = "" if cfg.max_new_tokens == 32 else f"-{cfg.max_new_tokens}tokens"
    return f"-{cfg.em_rule}{length}" + ("-chat" if chat else "") + ("-raw" if cfg.raw else "")


def _commit_size(cfg: Config) -> int:
    return cfg.n if cfg.commit_size is None else cfg.commit_size
