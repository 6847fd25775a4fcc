"""A memory: facts and their keys in a folder that several processes may use at once.

Nothing in it is ever changed. A fact is added as a row, and so is its end; of all rows with one prompt the last one
holds, each for its time. So the whole past stays readable, a commit is one append, and going back to a version is a
commit as well.

    store = Store.create("memory", width=768, stamp={"editor": sha, "base": fingerprint})
    store.add([Edit("The Eiffel Tower is in", "Rome")], keys)
    scores, hits = store.search(queries)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import wraps
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import numpy as np

from ..data.dates import When, bounds, moment
from ..data.edits import Edit, prompt_key
from ..errors import BadInput, LmpatchError, WrongModel
from . import _search
from ._changes import Changes, difference, ends
from ._live import Live
from ._log import Log, Row
from .entry import Entry, Version, columns, entry_of, record

C = TypeVar("C", bound=Callable[..., Any])
EXACT = 100_000


def _alone(method: C) -> C:
    """One thread at a time: each call brings the log and the block of keys up to date."""

    @wraps(method)
    def run(store: Store, *args: Any, **given: Any) -> Any:
        with store._lock:
            return method(store, *args, **given)

    return run  # type: ignore[return-value]


class Store:
    """An open memory. Every call sees what all processes committed before it. Threads take turns.

    In RAM are the texts and, once something was searched, the keys that are searched exactly: all that hold up to
    ``exact``, above that those the index does not cover yet.
    """

    def __init__(self, log: Log, exact: int = EXACT) -> None:
        self.path, self.width, self.stamp = log.path, log.width, log.stamp
        self._log, self._exact, self._lock = log, exact, RLock()
        self._search = _search.Search(log, exact)

    @classmethod
    def create(
        cls, path: str | Path, *, width: int, stamp: Mapping[str, str], matched: int | None = None, exact: int = EXACT
    ) -> Store:
        """Make an empty memory where nothing is yet.

        Args:
            width: of the keys, a multiple of 8.
            stamp: ``editor`` and ``base``, the hashes of what makes the keys and of the model they are for; with
                ``editor_name`` and ``base_name`` messages say them by name.
            matched: M, how many of a key's first components a query is compared with. None: all.
            exact: up to this many live keys a search looks at each; above, it asks an approximate index.
        """
        if width < 8 or width % 8:
            raise BadInput(f"keys of width {width} cannot be stored. Make the width a multiple of 8.")
        if not stamp.get("editor") or not stamp.get("base"):
            raise BadInput(f"the stamp of a memory needs 'editor' and 'base', found {sorted(stamp)}.")
        matched = width if matched is None else matched
        if not 0 < matched <= width or matched % 8:
            why = f"{matched} of {width} components cannot be compared."
            raise BadInput(f"{why} Give a multiple of 8, the width at most.")
        return cls(Log.create(Path(path), width, matched, dict(stamp)), exact)

    @classmethod
    def open(cls, path: str | Path, *, stamp: Mapping[str, str] | None = None, exact: int = EXACT) -> Store:
        """Open a memory.

        Args:
            stamp: what further keys will be made with; None: no keys will be added or searched.
        Raises:
            BadInput: there is none.
            WrongModel: it was made with another editor or base model.
        """
        log = Log(Path(path))
        if stamp is not None and any(log.stamp.get(name) != stamp.get(name) for name in ("editor", "base")):
            raise WrongModel(
                f"the memory at {path} was made with {_named(log.stamp)}, not {_named(stamp)}. Their keys cannot "
                "be compared. Open it with what made it, or export its facts and add them to a new memory."
            )
        return cls(log, exact)

    @_alone
    def __len__(self) -> int:
        return len(self._log.refresh().live)

    @property
    @_alone
    def version(self) -> int:
        """The number of the last commit; 0 before the first."""
        return self._log.refresh().version

    # Writing

    def add(
        self,
        edits: Sequence[Edit],
        vectors: np.ndarray,
        *,
        source: Mapping[str, Any] | None = None,
        supersedes: Mapping[int, Sequence[Edit]] | None = None,
    ) -> int:
        """Add facts in one commit. A fact whose prompt is there already supersedes the older one, for its time.

        Args:
            vectors: [n, width] the key of each, any floating dtype; stored as float16.
            source: where the facts come from, kept with each.
            supersedes: by place of a new fact, those in other words that it supersedes as well, as far as they still
                hold.
        Returns:
            the version that holds them. They are on the disk by then.
        Raises:
            BadInput: a vector has another width or is not finite in float16.
            LmpatchError: the disk is full or cannot be written. Nothing was stored.
        """
        with np.errstate(over="ignore"):  # what overflows is refused below
            keys = np.asarray(vectors).astype(np.float16)
        if keys.shape != (len(edits), self.width):
            raise BadInput(f"{len(edits)} facts need keys [{len(edits)}, {self.width}], found {list(keys.shape)}.")
        if not np.isfinite(keys).all():
            raise BadInput("a key holds a number that is no finite float16. Look at the encoder that made it.")
        origin = json.dumps(dict(source or {}), ensure_ascii=False, default=str)

        def rows() -> tuple[list[Row], np.ndarray]:
            changes = Changes(self._log)
            for i, (edit, key) in enumerate(zip(edits, keys, strict=True)):
                for old in (supersedes or {}).get(i, ()):
                    changes.retire(old, edit)
                changes.put({"op": "put", "source": origin, **columns(edit)}, key, edit.span)
            return changes.rows, np.array(changes.keys, np.float16).reshape(-1, self.width)

        return self._commit(rows)

    def drop(self, prompts: Sequence[str]) -> int:
        """End the facts with these prompts, in one commit. Their past stays listed.

        Raises:
            BadInput: no live fact has one of the prompts. Nothing was dropped.
        """

        def rows() -> tuple[list[Row], None]:
            for prompt in prompts:
                if prompt_key(prompt) not in self._log.live:
                    why = f"no live fact has the prompt {prompt!r}."
                    raise BadInput(f"{why} `lmpatch memory find` looks for a part of it.")
            return [ends(prompt) for prompt in {prompt_key(prompt): prompt for prompt in prompts}.values()], None

        return self._commit(rows)

    def rollback(self, version: int) -> int:
        """Let hold what held after ``version``, in a new commit. The versions in between stay as they are.

        Returns:
            the new version, or the last one if nothing is different.
        """

        return self._commit(lambda: difference(self._log, version))

    @_alone
    def compact(self) -> None:
        """Join small files, remove what killed writers left, and index the keys anew if there are many.

        No fact and no version is lost.
        """
        with self._log.writing():
            self._log.refresh().tidy()
            if len(self._log.live) > self._exact:
                _search.build(self._log)

    def _commit(self, make: Callable[[], tuple[list[Row], np.ndarray | None]]) -> int:
        """Append what ``make`` says of this moment: rows, and the vectors of the first of them."""
        log = self._log
        with self._lock, log.writing():
            log.refresh()
            changes, vectors = make()
            if not changes:
                return log.version
            version = log.append(changes, vectors)
            with suppress(LmpatchError):  # the facts are stored; another commit will tidy
                log.tidy(always=False)
        if len(log.live) > self._exact and log.count - _search.newest(self.path) > self._exact:
            with suppress(LmpatchError):  # a search does without
                _search.build(Log(self.path))  # its own: other threads go on with this one
        return version

    # Reading

    @_alone
    def facts(self, *, history: bool = False, version: int | None = None, as_of: When | None = None) -> list[Entry]:
        """The facts that were not retired, oldest first, whether it is their time or not.

        Args:
            history: also those that were, with what ended them.
            version: as it was after this version; None: now.
            as_of: only those whose time contains this moment.
        """
        log = self._log.refresh()
        version = log.version if version is None else version
        if history:
            found = self._history(version)
        else:
            found = [entry_of(row) for row in log.rows(log.live_after(version).seqs())]
        return found if as_of is None else [entry for entry in found if _holds(entry, moment(as_of))]

    def _history(self, version: int) -> list[Entry]:
        log, entries = self._log, dict[int, Entry]()
        live = Live(log.spans)
        for row in log.rows(range(log.length(version))):
            dropped = row["op"] == "drop" and '"by"' not in row["more"]
            for old in live.act(row["seq"], row["op"], row["key"]):
                entries[old] = replace(entries[old], ended=row["version"], dropped=dropped)
            if row["op"] == "put":
                entries[row["seq"]] = entry_of(row)
        return list(entries.values())

    def find(self, text: str, *, history: bool = False, as_of: When | None = None) -> list[Entry]:
        """The facts with this text in prompt, subject or target, whatever its case."""
        wanted = text.casefold()
        return [
            entry
            for entry in self.facts(history=history, as_of=as_of)
            if wanted in "\n".join((entry.edit.prompt, entry.edit.subject, entry.edit.target)).casefold()
        ]

    @_alone
    def get(self, prompt: str, as_of: When | None = None) -> Entry | None:
        """The fact with this prompt, whatever its case and white space, at this moment, now by default; None: none."""
        entries = self.beside([prompt])[0]
        return next((entry for entry in entries if _holds(entry, moment(as_of))), None)

    @_alone
    def beside(self, prompts: Sequence[str]) -> list[list[Entry]]:
        """For each prompt the facts with it, each for a time of its own, oldest first."""
        log = self._log.refresh()
        found = [log.live.rows(prompt_key(prompt)) for prompt in prompts]
        entries = {row["seq"]: entry_of(row) for row in log.rows(sorted({seq for seqs in found for seq in seqs}))}
        return [[entries[seq] for seq in seqs] for seqs in found]

    @_alone
    def versions(self) -> list[Version]:
        """All commits, oldest first."""
        log = self._log.refresh()
        commits, live = dict[int, Version](), Live(log.spans)
        for seq, number, added, op, name in zip(
            *(log.texts[c].to_pylist() for c in ("seq", "version", "added", "op", "key")), strict=True
        ):
            put = op == "put"
            live.act(seq, op, name)
            old = commits.get(number, Version(number, added, 0, 0, 0))
            commits[number] = Version(number, added, old.put + put, old.dropped + (not put), len(live))
        return list(commits.values())

    @_alone
    def vectors(self, entries: Sequence[Entry]) -> np.ndarray:
        """The keys [n, width] float16 of these facts."""
        return self._log.vectors([entry.seq for entry in entries])

    @_alone
    def search(
        self, queries: np.ndarray, k: int = 1, *, as_of: When | None = None, ever: bool = False
    ) -> tuple[np.ndarray, list[list[Entry]]]:
        """The facts whose keys have the largest inner product with each query, of those that hold.

        Args:
            queries: [m, M].
            as_of: of those whose time contains this moment; None: now.
            ever: whatever their time is.
        Returns:
            scores [m, k'] float32 and the facts in the same order, best first, the older of equals first;
            k' = min(k, facts that hold), exactly so up to ``exact`` of them.
        Raises:
            BadInput: the width differs, or a number is not finite.
        """
        at = None if ever else moment(as_of)
        scores, seqs = self._search(np.ascontiguousarray(queries, dtype=np.float32), k, at)
        rows = {row["seq"]: entry_of(row) for row in self._log.rows(sorted({*seqs.reshape(-1).tolist()}))}
        return scores.astype(np.float32), [[rows[seq] for seq in line] for line in seqs.tolist()]

    def export(self, path: str | Path, *, as_of: When | None = None) -> int:
        """Write the facts as JSON lines, which ``read_edits`` reads; returns how many. Keys stay behind.

        Args:
            as_of: only those whose time contains this moment.
        """
        facts = self.facts(as_of=as_of)
        try:
            with Path(path).open("x", encoding="utf-8") as file:
                file.writelines(json.dumps(_line(fact), ensure_ascii=False) + "\n" for fact in facts)
        except FileExistsError:
            raise BadInput(f"{path} exists already. Give another path, or remove it first.") from None
        except OSError as error:
            raise BadInput(f"cannot write {path}: {error.strerror}.") from None
        return len(facts)


def _line(fact: Entry) -> dict[str, Any]:
    return record(fact.edit) | ({"source": fact.origin} if fact.origin else {})


def _holds(entry: Entry, at: float) -> bool:
    start, end = bounds(entry.edit.span)
    return start <= at < end


def _named(stamp: Mapping[str, str]) -> str:
    editor, base = (f"{stamp.get(f'{n}_name', '')} ({stamp.get(n, '')[:12]})".strip() for n in ("editor", "base"))
    return f"editor {editor} for base model {base}"
