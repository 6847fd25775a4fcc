"""What the benches share that ask many records: in parts that are kept, none longer than the model's window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeVar

from ..inference.interventions import Prompt, prepare
from ..inference.multiple_choice import next_logits
from ..models.lm import LM
from ..progress import Progress
from ._health import synchronise
from ._runs import Report
from ._store import Json, R, Store

BLOCK = 64  # records that are kept as one, so an interrupted run loses little

S = TypeVar("S")
T = TypeVar("T", bound=Report[Any, Any])


def split(items: Sequence[S], size: int) -> list[Sequence[S]]:
    """The items in parts of so many at most."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def in_parts(
    lm: LM,
    store: Store[R],
    record: Json,
    parts: Sequence[Sequence[S]],
    ask: Callable[[Sequence[S]], Sequence[R]],
    progress: Progress | None,
    what: str = "asking",
    note: Callable[[Sequence[S]], Json] = lambda part: {},
) -> None:
    """Ask what the store does not hold yet of this run, of the model as it is now.

    Args:
        record: of the run, as ``Store.open_run`` takes it.
        ask: the rows of a part, which get their place here.
        what: is done, as progress tells it.
        note: what is kept of a part beside its seconds.
    """
    store.open_run(record)
    name, total, done = record["run_id"], sum(map(len, parts)), 0
    for number, part in enumerate(parts):
        done += len(part)
        if (name, number) in store.chunks:
            continue
        start = perf_counter()
        rows = [replace(row, run_id=name, chunk=number) for row in ask(part)]
        synchronise(lm)
        kept = {"run_id": name, "chunk": number, **note(part), "seconds": perf_counter() - start}
        store.add(kept, rows)
        if progress:
            progress(done, total, f"{what} {name}")


def finished(store: Store[Any], kind: type[T], numbers: Callable[[T, Any], Any]) -> T:
    """The report, its numbers and seconds written into the records too.

    Args:
        numbers: of a report's run, as its record keeps them.
    """
    report = kind.of(store)
    for run in report.runs:
        seconds = sum(part["seconds"] for part in run.parts)
        store.put_run(run.record | {"seconds": seconds, "metrics": numbers(report, run)})
    return kind.of(store)


def beyond_window(
    lm: LM, prompts: Sequence[str], targets: Sequence[str] | None = None, new_tokens: int = 0
) -> list[str]:
    """Why each text does not fit the model's window, with everything the patches put before it; "" where it does.

    Args:
        targets: what is scored behind each prompt.
        new_tokens: how many are generated behind each.
    """
    window = lm.window
    if window is None:
        return [""] * len(prompts)
    rows, _ = prepare(lm, prompts, targets)
    over = f"longer than the model's window of {window} tokens"
    return [over if len(row.ids) + new_tokens > window else "" for row in rows]


def mark_logits(
    lm: LM, prompts: Sequence[Prompt], marks: Sequence[Sequence[int]], batch_size: int
) -> list[tuple[float, ...]]:
    """The logits of each prompt's own tokens behind it."""
    if not prompts:
        return []
    columns = {token: k for k, token in enumerate(sorted({token for ids in marks for token in ids}))}
    table = next_logits(lm, prompts, list(columns), batch_size=batch_size).tolist()  # [n, k]
    return [tuple(row[columns[token]] for token in ids) for row, ids in zip(table, marks, strict=True)]
