"""``run``: ask the unpatched model, its baselines and the patched one, keep every row, and put the model back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any, NamedTuple

from ...errors import BadInput, ForeignWrite
from ...inference.tokens import tokenizer_hash
from ...models.lm import LM
from ...patches.patch import Mount, Patch, plain
from ...progress import Progress
from ...provenance import hardware, hash_json, hash_tensors, now, versions
from ...resources import require_memory
from .adapter import Adapter, Ask, adapt
from .contract import BASE, Json
from .health import peak_memory, synchronise, working_memory
from .report import Report
from .store import Store, alone
from .writer import Fitted, Make, MakeEach, Maker, refuse_patched, writing

BLOCK = 64  # items that are kept as one, so an interrupted run loses little
COSTS = ("batch_size", "bootstrap")
PROBES = 16  # items that an estimate times


def run(
    bench: ModuleType | Adapter | str,
    lm: LM,
    data: Any,
    cfg: Any = None,
    *,
    patch: Patch | Sequence[Patch] | None = None,
    make: Make | None = None,
    make_each: MakeEach | None = None,
    mount: Mount | None = None,
    settings: Mapping[str, Any] | None = None,
    prep: Mapping[str, Any] | None = None,
    run_id: str = "",
    data_name: str = "",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Ask the unpatched model, then the patched one the same, and restore it.

    Args:
        bench: its module, or the module's full name.
        data: what the bench's ``load`` gives.
        patch: one, or several that are put on in this order. Without one, and without a function that makes some, only
            the baselines are asked.
        make: makes the patch of one commit, on the model with the earlier ones; for benches that write edits.
        make_each: makes one patch per edit, as if each were fitted alone; used in place of ``make`` for single edits.
        settings: of the method, for the record; a run is resumed only under equal ones.
        prep: what was spent before the first edit, for the record: seconds, data.
        run_id: the name in tables; empty: the patches' methods.
        out: folder for rows and records. A run that is there already goes on where it stopped, and the unpatched model
            is not asked again for another patch.
    Raises:
        BadInput: the model carries patches, a patch the bench cannot measure, nothing to ask, or the folder holds
            something else, or another run is at work there. Threads with one model wait for each other.
        NotEnoughMemory: asking would need more than is free.
        ForeignWrite: the model did not come back as it was.
    """
    adapter = adapt(bench)
    patches = () if patch is None else (patch,) if isinstance(patch, Patch) else tuple(patch)
    folder = Path(out) if out is not None else None
    with lm.lock, alone(folder):
        _refuse(adapter, lm, patches, bool(make or make_each), run_id)
        store = Store(folder, adapter.Row.read)
        cfg = adapter.settle(cfg or adapter.Config(), data, bool(patches))
        stage = Stage(progress)
        items, _ = _items(adapter, lm, data, cfg, bool(patches), stage)
        maker = Maker(patches, make, make_each, adapter.fit_batch(cfg))
        maker.settle([adapter.commits(item) for item in items] if adapter.commits else [])
        session = Session(adapter, lm, cfg, items, store, mount, stage)
        base = _record(adapter, lm, data, items, cfg) | {"planned": len(session.parts), "data_name": data_name}
        baselines = {BASE: adapter.asks(cfg), **adapter.baselines(cfg)}
        name = run_id or " + ".join(each.method for each in patches) or "patched"
        for each in baselines:
            store.open_run(base | {"run_id": each, "baseline": True})
        if maker.any:
            own = {key: plain(getattr(cfg, key)) for key in adapter.OWN} | {"method": plain(dict(settings or {}))}
            record = _patched(base, own, patches, mount)
            store.open_run(record | {"run_id": name, "baseline": False, "prep": dict(prep) if prep else None})
        adapter.warm(lm, items, cfg, store.folder, stage)
        for each, ask in baselines.items():
            session.asked(each, ask)
        if maker.any and session.left(name):
            before = hash_tensors(sorted(lm.model.named_parameters()), exact=True)
            session.patched(name, maker, baselines[BASE])
            if hash_tensors(sorted(lm.model.named_parameters()), exact=True) != before:
                raise ForeignWrite("a weight that no patch holds was changed during the run. Load the model again.")
        return _finish(adapter, lm, store)


@dataclass
class Stage:
    """One counter over a run's prompts: what a bench tells of a part, through the one ``plan`` had, is its share."""

    progress: Progress | None
    name: str = ""
    done: int = 0
    part: int = 0
    total: int = 0

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.name:
            done, total, what = self.done + self.part * done // total, self.total, f"scoring {self.name}"
        if self.progress:
            self.progress(done, total, what)


@dataclass
class Session:
    """Everything one call asks."""

    adapter: Adapter
    lm: LM
    cfg: Any
    items: Sequence[Any]
    store: Store[Any]
    mount: Mount | None
    stage: Stage

    @cached_property
    def parts(self) -> list[list[Any]]:
        """Items that are kept as one: consecutive ones of one group, at most ``BLOCK``."""
        groups: dict[Any, list[Any]] = {}
        for item in self.items:
            groups.setdefault(self.adapter.group(item), []).append(item)
        return [group[at : at + BLOCK] for group in groups.values() for at in range(0, len(group), BLOCK)]

    def left(self, name: str) -> list[tuple[int, list[Any]]]:
        """(number, items) of the parts that the store does not hold yet."""
        return [(i, part) for i, part in enumerate(self.parts) if (name, i) not in self.store.chunks]

    def asked(self, name: str, ask: Ask) -> None:
        """Ask what is left of this run, of the model as it is now."""
        for number, part in self.left(name):
            start = self.begin(name, number)
            base = None if name == BASE else self.store.rows.get((BASE, number), [])
            self.keep(name, number, ask(self.lm, part, base), start, {})

    def patched(self, name: str, maker: Maker, ask: Ask) -> None:
        """The same with patches on, and everything taken off again, proved."""
        if self.adapter.write is None or self.adapter.commits is None:
            with writing(self.lm, self.mount, {}) as writer:
                writer.write(Fitted(maker.patches, 0.0, sum(len(patch.edits) for patch in maker.patches)))
                self.asked(name, ask)
            return
        left = [(number, part[0]) for number, part in self.left(name)]
        if left:
            self.begin(name, left[0][0])
            self.stage(0, 1, "")
        fits = maker.fits(self.lm, [self.adapter.commits(item) for _, item in left])
        originals: dict[str, str] = {}
        for (number, item), fitted in zip(left, fits, strict=True):
            start = self.begin(name, number)
            with writing(self.lm, self.mount, originals) as writer:
                rows, note = self.adapter.write(self.lm, item, self.cfg, fitted, writer)
            self.keep(name, number, rows, start, {**note, **writer.record()})

    @cached_property
    def sizes(self) -> list[int]:
        """Prompts of each part."""
        return [sum(map(self.adapter.size, part)) for part in self.parts]

    def begin(self, name: str, number: int) -> float:
        """Count on from the parts of this run that are done; the time."""
        sizes = self.sizes
        done = sum(sizes[i] for run, i in self.store.chunks if run == name and i < len(sizes))
        self.stage.name, self.stage.done, self.stage.part, self.stage.total = name, done, sizes[number], sum(sizes)
        return perf_counter()

    def keep(self, name: str, number: int, rows: Sequence[Any], start: float, note: Json) -> None:
        """Store a part's rows, in their place."""
        synchronise(self.lm)
        record = {"run_id": name, "chunk": number, **note, "seconds": perf_counter() - start}
        self.store.add(record, [replace(row, run_id=name, chunk=number) for row in rows])
        self.stage(1, 1, "")


class Estimate(NamedTuple):
    """What a run will take, fitting left out."""

    seconds: float
    bytes: int
    """Memory on top of the model."""
    items: int


def estimate(bench: ModuleType | Adapter | str, lm: LM, data: Any, cfg: Any = None) -> Estimate:
    """Time a few items and tell what ``run`` with one patch will take; ``NotEnoughMemory`` where that is not free."""
    adapter = adapt(bench)
    cfg = adapter.settle(cfg or adapter.Config(), data, False)
    items, need = _items(adapter, lm, data, cfg, False, None)
    probes = items[:: max(1, len(items) // PROBES)][:PROBES]
    start = perf_counter()
    adapter.warm(lm, probes, cfg, None, None)
    adapter.asks(cfg)(lm, probes, None)
    each = (perf_counter() - start) / len(probes)
    return Estimate(each * len(items) * (2 + len(adapter.baselines(cfg))), need, len(items))


def bound(name: str) -> tuple[Callable[..., Report], Callable[[str | Path], Report]]:
    """``run`` and ``read_report`` of the bench whose module has this full name."""
    return partial(run, name), partial(Report.read, name)


def _refuse(adapter: Adapter, lm: LM, patches: Sequence[Patch], makes: bool, run_id: str) -> None:
    """Raise ``BadInput`` for what this bench cannot measure, before anything is asked."""
    if patches and makes:
        raise BadInput("give either a patch or a function that makes patches, not both.")
    if makes and adapter.write is None:
        raise BadInput(
            f"{adapter.name} makes no patches. Fit one with {run_id or 'a method'} first, and give it as patch."
        )
    refuse_patched(lm)
    if (decode := [patch for patch in patches if patch.needs_context]) and not adapter.CONTEXTS:
        raise BadInput(
            f"{decode[0].method} is a decode patch: it compares a prompt with its form without context, and this bench "
            "has no contexts. Measure it with memotrap, kre or rag."
        )


def _items(
    adapter: Adapter, lm: LM, data: Any, cfg: Any, fixed: bool, progress: Progress | None
) -> tuple[Sequence[Any], int]:
    """What is asked, and the bytes that takes on top of the model; raises ``NotEnoughMemory``."""
    if not (items := adapter.plan(lm, data, cfg, fixed=fixed, progress=progress)):
        raise BadInput("nothing is left to ask. Give at least one record.")
    texts, new_tokens = adapter.texts(items, cfg)
    need = working_memory(lm, texts, new_tokens, cfg.batch_size)
    require_memory(need, lm.device, "scoring")
    return items, need


def _record(adapter: Adapter, lm: LM, data: Any, items: Sequence[Any], cfg: Any) -> Json:
    """What all runs of one call record; only runs of equal settings, on one model, stand in one table."""
    extra = adapter.record(items, data, cfg)
    free = {*COSTS, *adapter.COSTS, *adapter.OWN}
    facts = {
        "data_hash": hash_json([adapter.identity(item) for item in items]),
        "base_weights_hash": lm.fingerprint(),
        "dtype": str(lm.dtype).removeprefix("torch."),
    }
    settings = {key: value for key, value in plain(cfg).items() if key not in free} | {"bench": adapter.name, **facts}
    settings |= {"protocol_id": extra["protocol_id"]} if "protocol_id" in extra else {}
    return {
        "bench": adapter.name,
        "comparable_group": hash_json(settings)[:16],
        "settings": settings,
        "base_model": lm.name,
        "tokenizer_hash": tokenizer_hash(lm),
        "started": now(),
        "versions": versions(),
        "hardware": hardware(),
        "items": len(items),
        "bootstrap": cfg.bootstrap,
        "seed": cfg.seed,
        **facts,
        **extra,
    }


def _patched(record: Json, own: Json, patches: Sequence[Patch], mount: Mount | None) -> Json:
    """The record of a patched run before it starts, with the settings that are its own."""
    put = [{"method": p.method, "hash": p.hash(), "mount": mount or p.mounts[0]} for p in patches]
    record = record | {"settings": record["settings"] | own | {"mount": mount, "patches": put}, "mount": mount}
    if not put:
        return record
    return record | {
        "method": " + ".join(patch.method for patch in patches),
        "mount": put[0]["mount"],
        "patch_hash": put[0]["hash"] if len(put) == 1 else hash_json([each["hash"] for each in put]),
        "patches": put,
        "bytes": sum(patch.nbytes for patch in patches),
    }


def _finish(adapter: Adapter, lm: LM, store: Store[Any]) -> Report:
    """The report; numbers, costs and seconds are written into the records of runs that have new rows."""
    report = Report.of(adapter, store)
    for run in report.runs:
        seconds = sum(part.get("seconds", 0.0) for part in run.parts)
        if run.record.get("seconds") == seconds and "metrics" in run.record:
            continue  # no part is new: no need to resample
        record = run.record | {"seconds": seconds, "peak_mem": peak_memory(lm)}
        record |= adapter.summary(lm, run.rows, run.parts)
        moved = report.differences(run.name) if run.name != BASE else {}
        record["metrics"] = [
            asdict(number) | {"difference": asdict(moved[key]) if key in moved else None}
            for key, number in run.metrics().items()
        ]
        store.put_run(record)
    return Report.of(adapter, store)
