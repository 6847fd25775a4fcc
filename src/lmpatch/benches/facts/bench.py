"""The facts bench itself: chunks of edits, what is asked of them when, and what a run cost."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...data.edits import ORIGIN, Edit
from ...inference.plain_text import perplexity
from ...models.lm import LM
from ...patches.patch import plain
from ...progress import Progress
from ...provenance import hash_json
from ...resources import format_bytes
from ..core.contract import Json
from ..core.health import latency
from ..core.writer import Fitted, Writer, refuse_patched
from . import asking
from .asking import Answers
from .cases import Chunk, Config, plan_chunks
from .questions import PASSAGE, Question
from .rows import Row, protocol, retention

POINTS = (1, 10, 100, 1000, 10000)
"""Edits in the model at which the retention curve is taken."""
STOPPED = "stopped: the model had collapsed"
WARM_UP = 3  # commits whose time is left out of edit_s, where there are more
COSTS_NOTE = (
    "Per edit: fitting only, evaluation left out. Per token: patched, and unpatched in brackets. Perplexity: the "
    "highest after any commit, as a multiple of the unpatched model's. ‖ΔW‖/‖W‖: the largest of any commit and weight."
)


@dataclass
class Base:
    """The unpatched model; one for all chunks of a call."""

    chat: bool
    """Prompts are asked through its chat template."""
    answers: Answers = field(default_factory=Answers)
    perplexity: float | None = None
    progress: Progress | None = None
    """Hears how far a chunk is."""
    folder: Path | None = None
    """Where answers are kept."""


@dataclass(frozen=True)
class Item:
    """A chunk, and the unpatched model's answers to everything about it."""

    chunk: Chunk
    base: Base


def plan(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, fixed: bool = False, progress: Progress | None = None
) -> list[Item]:
    """The chunks, each with what will be asked of it."""
    chunks, base = plan_chunks(edits, cfg, shuffled=not fixed), Base(lm.chat is not None, progress=progress)
    if fixed:  # it holds whatever it holds
        chunks = [replace(chunk, commits=(tuple(range(len(chunk.edits))),)) for chunk in chunks]
    return [Item(chunk, base) for chunk in chunks]


def warm(lm: LM, items: Sequence[Item], cfg: Config, folder: Path | None, progress: Progress | None) -> None:
    """Ask the unpatched model everything at once; the folder keeps its answers by weights, prompts and protocol.

    Raises:
        BadInput: the model carries patches.
    """
    refuse_patched(lm)
    base = items[0].base
    questions = [q for item in items for q in item.chunk.every()]
    base.folder = folder
    base.answers.update(asking.ask_base(lm, questions, cfg, folder, progress))
    base.perplexity = perplexity(lm) if cfg.health and base.perplexity is None else base.perplexity


def ask(lm: LM, items: Sequence[Item], cfg: Config, base: Sequence[Row] | None = ()) -> list[Row]:
    """Rows of the model as it is now, the edits in it or not. ``warm`` comes first, on the unpatched model.

    Args:
        base: None: it is the unpatched one, whose answers are known.
    """
    rows: list[Row] = []
    for item in items:
        rows += _Pass(lm, item, cfg).score(item.chunk.questions, "final", item.base.answers if base is None else None)
    return rows


def baselines(cfg: Config) -> Mapping[str, Any]:
    """The fact simply written into the prompt."""

    def in_prompt(lm: LM, items: Sequence[Item], base: Any) -> list[Row]:
        parts = [_Pass(lm, item, cfg).score(item.chunk.with_fact(), "final", item.base.answers) for item in items]
        return [row for part in parts for row in part]

    return {"fact_in_prompt": in_prompt}


def group(item: Item) -> int:
    """Every chunk stands alone."""
    return item.chunk.index


def size(item: Item) -> int:
    """Its prompts."""
    return len(item.chunk.questions)


def identity(item: Item) -> Any:
    """Its edits."""
    return [{k: v for k, v in edit.items() if v or k not in ORIGIN} for edit in plain(item.chunk.edits)]


def texts(items: Sequence[Item], cfg: Config) -> tuple[list[str], int]:
    """Every prompt, and the new tokens behind each."""
    length = max(cfg.max_new_tokens, PASSAGE) if cfg.pack else cfg.max_new_tokens
    return [q.text for item in items for q in item.chunk.every() if not q.flag], length


def fit_batch(cfg: Config) -> int:
    """Single edits that are fitted in one call."""
    return cfg.fit_batch


def commits(item: Item) -> list[list[Edit]]:
    """The chunk's edits, commit by commit."""
    return [[item.chunk.edits[i] for i in commit] for commit in item.chunk.commits]


def write(lm: LM, item: Item, cfg: Config, fits: Iterable[Fitted], writer: Writer) -> tuple[list[Row], Json]:
    """Write the chunk commit by commit and ask: after each commit its own edits, at the end everything."""
    chunk, pass_ = item.chunk, _Pass(lm, item, cfg, writer)
    writer.base_perplexity = item.base.perplexity
    if cfg.retention and len(chunk.commits) > 1:
        pass_.probes = frozenset(chunk.probes())
    speed = {"base": latency(lm)} if cfg.latency and chunk.index == 0 else {}
    rows: list[Row] = []
    for number, fitted in enumerate(fits):
        commit, before = chunk.commits[number], writer.edits
        pass_.notes |= {commit[i]: why for i, why in fitted.refused.items()}
        writer.write(fitted)
        pass_.after |= dict.fromkeys(commit, writer.edits)
        if number + 1 < len(chunk.commits):
            rows += pass_.early(number, before)
        pass_.tell(number + 1 - len(chunk.commits), 1)
        if writer.collapsed_at is not None:
            pass_.notes |= {i: STOPPED for rest in chunk.commits[number + 1 :] for i in rest}
            break
    final = pass_.score(chunk.questions, "final")
    rows += final
    if cfg.immediate and len(chunk.commits) > 1:  # those of the last commit are its immediate ones, too
        fresh = {i for i in chunk.commits[-1] if i not in pass_.notes}
        same = [row for row in final if row.edit_index in fresh and row.kind in ("edit", "rephrase")]
        rows += [replace(row, when="immediate", probe=False) for row in same]
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

    def tell(self, done: int, total: int, what: str = "") -> None:
        """How far the last questions are; the commits before them, each, count as much as they do."""
        if self.item.base.progress:
            n = len(self.item.chunk.commits)
            self.item.base.progress(n * total + done, (n + 1) * total, what)

    def early(self, commit: int, before: int) -> list[Row]:
        """Rows taken between commits: the commit's own edits, and older probes where the curve has a point.

        Args:
            before: edits in the model before the commit.
        """
        own, now = self.item.chunk.after_commit(commit), self.writer.edits if self.writer else 0
        if not self.cfg.immediate:
            own = [q for q in own if q.case in self.probes]
        crossed = any(before < point <= now for point in POINTS)
        old = [
            q
            for q in self.item.chunk.questions
            if crossed and q.kind == "edit" and q.case in self.probes and self.after.get(q.case, now) < now
        ]
        return self.score(own, "immediate") + self.score(old, "retention")

    def _ask(self, questions: Sequence[Question], when: str) -> Answers:
        """What the model says now. Many answers are kept block by block, so that Ctrl-C loses few of them."""
        tell, stack = self.tell if when == "final" else None, self.writer.stack if self.writer else []
        live = any(hasattr(one.patch, "memory") for one in stack)  # it may change meanwhile
        if when != "final" or not stack or live or len(questions) <= asking.BLOCK:
            return asking.ask(self.lm, questions, self.cfg, tell)
        on = [(one.patch.hash(), one.mount) for one in stack]
        return asking.ask_base(self.lm, questions, self.cfg, self.item.base.folder, tell, on)

    def score(self, questions: Sequence[Question], when: str, now: Answers | None = None) -> list[Row]:
        """Rows of what the model says now, or of answers that are there already, with their place in the run."""
        if now is None:
            now = self._ask(questions, when)
        kl = self.writer is None or not self.writer.tail_touched
        rows = asking.rows(self.lm, questions, self.item.base.answers, now, self.cfg, kl=kl)
        edits = self.writer.edits if self.writer else 0
        return [
            replace(
                row,
                when=when,
                case_id=self.item.chunk.edits[q.case].id,
                flag=row.flag or self.notes.get(q.case, ""),
                edit_index=q.case,
                age=edits - self.after.get(q.case, edits),
                n_edits=edits,
                probe=q.case in self.probes,
            )
            for row, q in zip(rows, questions, strict=True)
        ]


def record(items: Sequence[Item], edits: Sequence[Edit], cfg: Config) -> Json:
    """The protocol, and how many edits stand together."""
    chat = items[0].base.chat
    length = "" if cfg.max_new_tokens == 32 else f"-{cfg.max_new_tokens}tokens"
    suffix = f"-{cfg.em_rule}{length}" + ("-chat" if chat else "") + ("-raw" if cfg.raw else "")
    return {
        "protocol_id": protocol("gen", "final", suffix),
        "suffix": suffix,
        "n_edits": cfg.n,
        "commit_size": cfg.commit_size or cfg.n,
        "order_seed": cfg.seed,
        "left_over": len(edits) % cfg.n,
        "chat_template": chat,
        "pack": cfg.pack,
        "collision_counts": dict(sum((Counter(item.chunk.counts) for item in items), Counter())),
    }


def summary(lm: LM, rows: Sequence[Row], chunks: Sequence[Json]) -> Json:
    """Costs and health of a finished run, from its rows and chunks."""
    written = [commit for chunk in chunks for commit in chunk.get("commits", [])]
    if not written:
        return {}
    each = [commit["seconds"] / commit["edits"] for commit in written if commit["edits"]]
    each = each[WARM_UP:] if len(each) > WARM_UP else each
    p95 = statistics.quantiles(each, n=20, method="inclusive")[-1] if len(each) > 1 else each[0]
    health = {  # the worst that was seen after any commit
        "base_perplexity": chunks[0]["base_perplexity"],
        "perplexity_max": max((c["perplexity"] for c in written if "perplexity" in c), default=None),
        "change_max": max((value for c in written for value in c["change"].values()), default=None),
        "rounding_error_max": max(c["rounding_error"] for c in written),
    }
    speed = next((chunk["infer_ms"] for chunk in chunks if chunk.get("infer_ms")), None)
    size = sum(commit["bytes"] for commit in written) / sum(commit["edits"] for commit in written)
    collapsed = [chunk["collapsed_at"] for chunk in chunks if chunk["collapsed_at"] is not None]
    refused = sum(chunk["refused"] for chunk in chunks)
    costs = {"s per edit": f"{statistics.median(each):.3g}", "p95": f"{p95:.3g}"}
    costs["bytes per edit"] = format_bytes(round(size))
    if speed:
        costs["ms per token"] = f"{speed['patched']['token_b1']:.1f} ({speed['base']['token_b1']:.1f})"
    if health["perplexity_max"] is not None:
        costs["perplexity"] = f"{health['perplexity_max'] / health['base_perplexity']:.2f} ×"
    if health["change_max"] is not None:
        costs["‖ΔW‖/‖W‖"] = f"{health['change_max']:.2g}"
    costs |= {"refused": str(refused), "collapsed": f"{len(collapsed)} of {len(chunks)}"}
    return {
        "method": written[0]["method"],
        "mount": written[0]["mount"],
        "patch_hash": written[0]["patch"] if len(written) == 1 else hash_json([c["patch"] for c in written]),
        "edit_s": {"median": statistics.median(each), "p95": p95, "commits": len(each)},
        "bytes_per_edit": size,
        "infer_ms": speed,
        "refused": refused,
        "retention": retention(rows),
        "health": health,
        "collapsed_at": collapsed,
        "costs": costs,
        "costs_note": COSTS_NOTE,
    }
