"""The loop of the facts bench: write a chunk, score it, take it off, keep its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..data.edits import Edit
from ..errors import BadInput, Diverged, SubjectNotFound
from ..models.lm import LM
from ..patches.patch import Mount, Patch
from ..progress import Progress
from . import _ask
from ._ask import Answers, Protocol
from ._cases import Chunk, Question, with_fact
from ._health import latency, perplexity, synchronise
from ._rows import Row
from ._store import Store
from ._writer import Fitted, Make, Writer, fit

if TYPE_CHECKING:
    from .facts import Config

MakeEach = Callable[[LM, list[Edit]], Sequence[Patch]]
POINTS = (1, 10, 100, 1000, 10000)
"""Edits in the model at which the retention curve is taken."""
STOPPED = "stopped: the model had collapsed"


def protocol(cfg: Config) -> Protocol:
    """The part of the settings that decides an answer."""
    return Protocol(cfg.max_new_tokens, cfg.em_rule, cfg.chat, cfg.teacher_forced, cfg.batch_size)


def facts_in_prompt(chunk: Chunk) -> list[Question]:
    """The chunk's questions, each behind its own edit sentence; distractor prompts have it already."""
    return [with_fact(chunk.edits[q.case], q) for q in chunk.questions if q.kind != "loc/distractor"]


def all_questions(chunk: Chunk) -> list[Question]:
    """Everything the unpatched model is asked about a chunk."""
    early = [q for c in range(len(chunk.commits)) for q in chunk.after_commit(c)] if len(chunk.commits) > 1 else []
    return [*chunk.questions, *early, *facts_in_prompt(chunk)]


@dataclass
class Place:
    """When a row was taken."""

    run_id: str
    chunk: Chunk
    written: int = 0
    """Edits in the model."""
    after: dict[int, int] = field(default_factory=dict)
    """Edit → how many edits were in the model right after its commit."""
    notes: dict[int, str] = field(default_factory=dict)
    """Edit → why it is not in the model."""
    probes: frozenset[int] = frozenset()

    def rows(self, made: Sequence[Row], questions: Sequence[Question], when: str) -> list[Row]:
        """The rows with their place filled in."""
        return [
            replace(
                row,
                run_id=self.run_id,
                when=when,
                chunk=self.chunk.index,
                case_id=self.chunk.edits[q.case].id,
                flag=row.flag or self.notes.get(q.case, ""),
                edit_index=q.case,
                age=self.written - self.after.get(q.case, self.written),
                n_edits=self.written,
                probe=q.case in self.probes,
            )
            for row, q in zip(made, questions, strict=True)
        ]


@dataclass
class Engine:
    """One run in the making."""

    lm: LM
    cfg: Config
    mount: Mount | None
    store: Store[Row]
    base: Answers
    total: int
    """Chunks."""
    progress: Progress | None = None
    originals: dict[str, str] = field(default_factory=dict)

    @property
    def how(self) -> Protocol:
        """What decides an answer."""
        return protocol(self.cfg)

    def baselines(self, chunks: Sequence[Chunk]) -> None:
        """Rows of ``none`` and ``fact_in_prompt``, from what the unpatched model said."""
        for name in ("none", "fact_in_prompt"):
            for chunk in chunks:
                if (name, chunk.index) not in self.store.chunks:
                    questions = list(chunk.questions) if name == "none" else facts_in_prompt(chunk)
                    made = _ask.rows(self.lm, questions, self.base, self.base, self.how)
                    rows = Place(name, chunk).rows(made, questions, "final")
                    self.store.add({"run_id": name, "chunk": chunk.index, "counts": chunk.counts}, rows)

    def patch(self, name: str, chunk: Chunk, patch: Patch) -> None:
        """Score one patch that is there already."""
        if (name, chunk.index) not in self.store.chunks:
            one = replace(chunk, commits=(tuple(range(len(chunk.edits))),))
            self._chunk(name, one, [Fitted(patch, patch.made.get("seconds", 0.0))], len(patch.edits) or None)

    def commits(self, name: str, chunks: Sequence[Chunk], make: Make) -> None:
        """Write and score chunks, commit by commit."""
        for chunk in self._pending(name, chunks):
            commits = ([chunk.edits[i] for i in commit] for commit in chunk.commits)
            self._chunk(name, chunk, (fit(self.lm, make, edits) for edits in commits))

    def singles(self, name: str, chunks: Sequence[Chunk], make_each: MakeEach) -> None:
        """Write and score chunks of one edit each, fitted many at a time."""
        pending = self._pending(name, chunks)
        for start in range(0, len(pending), self.cfg.fit_batch):
            group = pending[start : start + self.cfg.fit_batch]
            fits = _fit_each(self.lm, make_each, [chunk.edits[0] for chunk in group])
            for chunk, fitted in zip(group, fits, strict=True):
                self._chunk(name, chunk, [fitted])

    def _pending(self, name: str, chunks: Sequence[Chunk]) -> list[Chunk]:
        return [chunk for chunk in chunks if (name, chunk.index) not in self.store.chunks]

    @cached_property
    def base_perplexity(self) -> float | None:
        """Of the unpatched model; None if health is not watched."""
        return perplexity(self.lm) if self.cfg.health else None

    def _chunk(self, name: str, chunk: Chunk, fits: Iterable[Fitted], edits: int | None = None) -> None:
        speed = self._speed(chunk)
        writer = Writer(self.lm, self.mount, self.originals, self.base_perplexity)
        probes = frozenset(chunk.probes()) if self.cfg.retention and len(chunk.commits) > 1 else frozenset()
        place = Place(name, chunk, probes=probes)
        rows: list[Row] = []
        try:
            for number, fitted in enumerate(fits):
                commit = chunk.commits[number]
                place.notes |= {commit[i]: why for i, why in fitted.refused.items()}
                writer.write(fitted, edits or len(commit) - len(fitted.refused))
                place.written = writer.edits
                place.after |= dict.fromkeys(commit, place.written)
                last = number + 1 == len(chunk.commits)
                if not last:
                    rows += self._early(place, number, writer)
                if writer.collapsed_at is not None:
                    place.notes |= {i: STOPPED for rest in chunk.commits[number + 1 :] for i in rest}
                    break
            rows += self._final(place, writer)
            speed |= {"patched": latency(self.lm)} if speed else {}
        finally:
            writer.close()
        record = {"run_id": name, "chunk": chunk.index, "counts": chunk.counts, "commits": writer.commits}
        record |= {"collapsed_at": writer.collapsed_at, "base_perplexity": writer.base_perplexity}
        record |= {"refused": len(place.notes), "infer_ms": speed or None, "restored": True}
        self.store.add(record, rows)
        if self.progress:
            self.progress(len(self.store.chunks_of(name)), self.total, f"scoring {name}")

    def _speed(self, chunk: Chunk) -> dict[str, Any]:
        return {"base": latency(self.lm)} if self.cfg.latency and chunk.index == 0 else {}

    def _early(self, place: Place, commit: int, writer: Writer) -> list[Row]:
        """Rows taken between commits: the commit's own edits, and older probes where the curve has a point."""
        own = place.chunk.after_commit(commit)
        if not self.cfg.immediate:
            own = [q for q in own if q.case in place.probes]
        before = place.written - (writer.commits[-1]["edits"] if writer.commits else 0)
        crossed = any(before < point <= place.written for point in POINTS)
        old = [
            q
            for q in place.chunk.questions
            if crossed and q.kind == "edit" and q.case in place.probes
            if place.after.get(q.case, place.written) < place.written
        ]
        return self._score(place, own, "immediate") + self._score(place, old, "retention")

    def _final(self, place: Place, writer: Writer) -> list[Row]:
        rows = self._score(place, place.chunk.questions, "final", kl=not writer.tail_touched)
        if not self.cfg.immediate or len(place.chunk.commits) == 1:
            return rows
        fresh = {i for i in place.chunk.commits[-1] if i not in place.notes}
        same = [row for row in rows if row.edit_index in fresh and row.kind in ("edit", "rephrase")]
        return rows + [replace(row, when="immediate", probe=False) for row in same]  # the last commit: both at once

    def _score(self, place: Place, questions: Sequence[Question], when: str, kl: bool = True) -> list[Row]:
        if not questions:
            return []
        said = _ask.ask(self.lm, questions, self.how, self.progress if self.total == 1 else None)
        return place.rows(_ask.rows(self.lm, questions, self.base, said, self.how, kl=kl), questions, when)


def _fit_each(lm: LM, make_each: MakeEach, edits: list[Edit]) -> Iterator[Fitted]:
    """One patch per edit from one call; one call per edit if the method will not write some of them."""

    def one(lm: LM, edits: list[Edit]) -> Patch:
        return make_each(lm, edits)[0]

    start = perf_counter()
    try:
        made = make_each(lm, edits)
    except (SubjectNotFound, Diverged):
        yield from (fit(lm, one, [edit]) for edit in edits)
        return
    if len(made) != len(edits):
        raise BadInput(f"make_each made {len(made)} patches of {len(edits)} edits. It must make one each.")
    synchronise(lm)
    seconds = (perf_counter() - start) / len(edits)
    yield from (Fitted(patch, seconds) for patch in made)
