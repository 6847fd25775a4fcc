"""What a memory costs: search, adding, bytes, freshness.

    python benchmarks/memory.py
    python benchmarks/memory.py --sizes 1000 10000 --bulk 5000 --single 200

writes results/memory.json. Keys are random normal vectors of which queries see the first 512 components, and
a query is a key plus as much noise as it is long (cosine about 0.7), so the fact it should find is known. That is hard
for an index: random keys have no clusters to go by.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import mean, median, quantiles
from time import perf_counter

import numpy as np

import lmpatch as lp
from lmpatch.memory.store import EXACT, Store
from lmpatch.provenance import hardware, now, versions

RESULTS = Path(__file__).parent / "results"
STAMP = {"editor": "benchmark", "base": "none"}
CHUNK = 50_000  # facts of one commit when a store is filled
MATCHED = 512  # components that queries are compared with, as in the packaged editor
NEVER = 10**9  # no index is built while a store is filled; compact() builds it, and is timed


def keys(n: int, width: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((n, width), dtype=np.float32)
    found[:, MATCHED:] *= 2  # a trained editor's content is about that much louder
    return found.astype(np.float16)


def facts(n: int, start: int = 0) -> list[lp.Edit]:
    return [lp.Edit(f"The place of thing number {i} is", f"Town {i % 977}") for i in range(start, start + n)]


def chunks(n: int, width: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first number, keys) of a store's content, made again whenever it is needed."""
    for start in range(0, n, CHUNK):
        yield start, keys(min(CHUNK, n - start), width, seed=start)


def planted(n: int, width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries [count, MATCHED], and the number of the fact that an exact search finds for each."""
    draw = np.random.default_rng(1)
    wanted = np.sort(draw.choice(n, count, replace=False))
    parts = [
        block[wanted[(wanted >= start) & (wanted < start + len(block))] - start, :MATCHED]
        for start, block in chunks(n, width)
    ]
    queries = np.concatenate(parts).astype(np.float32) + draw.standard_normal((count, MATCHED), dtype=np.float32)
    best, found = np.full(count, -np.inf), np.zeros(count, np.int64)
    for start, block in chunks(n, width):
        scores = queries @ block[:, :MATCHED].astype(np.float32).T  # [count, chunk]
        top = scores.argmax(1)
        better = scores[np.arange(count), top] > best
        best = np.maximum(best, scores[np.arange(count), top])
        found[better] = start + top[better]
    return queries, found


def timed(act: Callable[[], object]) -> float:
    start = perf_counter()
    act()
    return perf_counter() - start


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and 90th percentile in ms."""
    return {"median_ms": 1e3 * median(seconds), "p90_ms": 1e3 * quantiles(seconds, n=10)[-1]}


def on_disk(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def resident() -> int:
    """Bytes of RAM this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def timed_search(path: Path, n: int, width: int, count: int) -> dict[str, object]:
    """Fill a store, then search it as a process that opens it would."""
    store = Store.create(path, width=width, matched=MATCHED, stamp=STAMP, exact=NEVER)
    fill = 0.0
    for first, block in chunks(n, width):
        fill += timed(partial(store.add, facts(len(block), first), block))
    data = on_disk(path)
    compaction = timed(Store.open(path).compact)
    queries, wanted = planted(n, width, count)
    before = resident()
    opened: list[Store] = []
    start = perf_counter()
    opened.append(Store.open(path))
    opened[0].search(queries[:1])
    opening = perf_counter() - start
    seconds, right = [], 0
    for query, number in zip(queries, wanted, strict=True):
        start = perf_counter()
        _, hits = opened[0].search(query[None])
        seconds.append(perf_counter() - start)
        right += hits[0][0].seq == number
    return {
        "facts": n, "width": width, "by": "index" if n > EXACT else "exact", **spread(seconds),
        "recall_at_1": right / count, "queries": count, "fill_s": fill, "compact_s": compaction,
        "open_and_first_search_s": opening,
        "ram_bytes_per_fact": (resident() - before) / n, "disk_bytes_per_fact": data / n,
        "disk_bytes_per_fact_compacted": on_disk(path) / n,
    }  # fmt: skip


def timed_adds(path: Path, bulk: int, single: int, width: int) -> dict[str, object]:
    """Facts in one commit, and facts one at a time."""
    store = Store.create(path / "bulk", width=width, matched=MATCHED, stamp=STAMP)
    edits, vectors = facts(bulk), keys(bulk, width, 0)
    seconds = timed(lambda: store.add(edits, vectors))
    store = Store.create(path / "single", width=width, matched=MATCHED, stamp=STAMP)
    each = [timed(partial(store.add, facts(1, i), vectors[i : i + 1])) for i in range(min(single, bulk))]
    tenth = len(each) // 10
    before = on_disk(path / "single")
    store.compact()
    return {
        "bulk_facts": bulk, "bulk_s": seconds, "bulk_facts_per_s": bulk / seconds, "single_facts": len(each),
        "single_facts_per_s": len(each) / sum(each), "single": spread(each),
        "first_tenth_mean_ms": 1e3 * mean(each[:tenth]), "last_tenth_mean_ms": 1e3 * mean(each[-tenth:]),
        "first_tenth_median_ms": 1e3 * median(each[:tenth]), "last_tenth_median_ms": 1e3 * median(each[-tenth:]),
        "disk_bytes_per_fact": before / len(each),
        "disk_bytes_per_fact_compacted": on_disk(path / "single") / len(each),
    }  # fmt: skip


def timed_refresh(path: Path, n: int, width: int, rounds: int) -> dict[str, object]:
    """What it costs a reader to notice that nothing, or one fact, was committed by another handle."""
    writer = Store.create(path, width=width, matched=MATCHED, stamp=STAMP)
    writer.add(facts(n), keys(n, width, 0))
    reader = Store.open(path)
    reader.search(keys(1, MATCHED, 1))
    idle = [timed(lambda: len(reader)) for _ in range(rounds)]
    new = []
    for i in range(rounds):
        writer.add(facts(1, n + i), keys(1, width, n + i))
        new.append(timed(lambda: len(reader)))
    return {"facts": n, "nothing_new": spread(idle), "one_new_fact": spread(new)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--bulk", type=int, default=100_000)
    parser.add_argument("--single", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="where the stores are made; a temporary folder otherwise")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    args = parser.parse_args()
    machine = {**hardware(), "cores": os.cpu_count()}
    found: dict[str, object] = {
        "versions": {**versions(), **{name: metadata.version(name) for name in ("lancedb", "pyarrow")}},
        "hardware": machine,
        "search": [],
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        runs: dict[str, Callable[[], dict[str, object]]] = {
            "add": lambda: timed_adds(Path(place), args.bulk, args.single, args.width),
            "refresh": lambda: timed_refresh(Path(place) / "refresh", min(args.sizes[-1], 10_000), args.width, 50),
        }
        for name, run in runs.items():
            found[name] = {"made": now(), **run()}
            print(json.dumps({name: found[name]}, indent=1), flush=True)
        for n in args.sizes:
            row = {"made": now(), **timed_search(Path(place) / str(n), n, args.width, min(args.queries, n))}
            found["search"] = [*found["search"], row]  # type: ignore[misc]
            print(json.dumps(row, indent=1), flush=True)
            args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
