"""``run``: ask the unpatched model, its baselines and the patched one, keep every row, and put the model back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

from ...errors import BadInput
from ...models.lm import LM
from ...patches.patch import Mount, Patch, plain
from ...progress import Progress
from ...provenance import hardware, hash_json, now, versions
from ...resources import require_memory
from .adapter import Adapter, Ask, adapt, of
from .contract import BASE, Json
from .health import peak_memory, synchronise, working_memory
from .report import Report
from .store import Store
from .writer import Make, MakeEach, Maker, Writer, mounted, refuse_decode, refuse_patched, unchanged

BLOCK = 64  # items that are kept as one, so an interrupted run loses little
COSTS = ("batch_size", "bootstrap")
PROBES = 16  # items that an estimate times


def run(
    bench: ModuleType | Adapter,
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
            something else.
        NotEnoughMemory: asking would need more than is free.
        ForeignWrite: the model did not come back as it was.
    """
    adapter = bench if isinstance(bench, Adapter) else adapt(bench)
    patches = () if patch is None else (patch,) if isinstance(patch, Patch) else tuple(patch)
    if patches and (make or make_each):
        raise BadInput("give either a patch or a function that makes patches, not both.")
    if (make or make_each) and adapter.write is None:
        raise BadInput(
            f"{adapter.name} makes no patches. Fit one with {run_id or 'a method'} first, and give it as patch."
        )
    refuse_patched(lm)
    if not adapter.CONTEXTS:
        refuse_decode(patches)
    cfg = adapter.settle(cfg or adapter.Config(), data, bool(patches))
    items = _items(adapter, lm, data, cfg, bool(patches), progress)
    maker = Maker(patches, make, make_each, adapter.fit_batch(cfg))
    _need(adapter, lm, items, cfg)
    store = Store(Path(out) if out is not None else None, adapter.Row.read)
    session = Session(adapter, lm, cfg, items, store, mount, progress)
    base = _record(adapter, lm, data, items, cfg, len(session.parts)) | {"data_name": data_name}
    baselines = {BASE: adapter.asks(cfg), **adapter.baselines(cfg)}
    name = run_id or " + ".join(each.method for each in patches) or "patched"
    records = {each: base | {"run_id": each, "baseline": True} for each in baselines}
    if maker.any:
        maker.check(items, adapter.commits)
        records[name] = _patched(adapter, base, name, cfg, patches, mount, settings, prep)
    for record in records.values():
        store.open_run(record)
    adapter.warm(lm, items, cfg, store.folder, progress)
    for each, ask in baselines.items():
        session.asked(each, ask)
    if maker.any and session.left(name):
        with unchanged(lm):
            session.patched(name, maker, baselines[BASE])
    return _finish(adapter, lm, store)


@dataclass
class Session:
    """Everything one call asks."""

    adapter: Adapter
    lm: LM
    cfg: Any
    items: Sequence[Any]
    store: Store[Any]
    mount: Mount | None
    progress: Progress | None

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
            start = perf_counter()
            base = None if name == BASE else self.base(number)
            self.keep(name, number, ask(self.lm, part, base), start, {})

    def patched(self, name: str, maker: Maker, ask: Ask) -> None:
        """The same with patches on, and everything taken off again, proved."""
        if self.adapter.write is None:
            with mounted(self.lm, maker.patches, self.mount):
                self.asked(name, ask)
            return
        assert self.adapter.commits is not None
        left = {id(part[0]): number for number, part in self.left(name)}
        originals: dict[str, str] = {}
        for item, fits in maker.fits(self.lm, [part[0] for _, part in self.left(name)], self.adapter.commits):
            start, writer = perf_counter(), Writer(self.lm, self.mount, originals)
            try:
                rows, note = self.adapter.write(self.lm, item, self.cfg, fits, writer)
            finally:
                writer.close()
            self.keep(name, left[id(item)], rows, start, {**note, **writer.record()})

    def base(self, number: int) -> list[Any]:
        """The unpatched model's rows of a part."""
        return self._base.get(number, [])

    @cached_property
    def _base(self) -> dict[int, list[Any]]:
        parts: dict[int, list[Any]] = {}
        for row in self.store.rows_of(BASE):
            parts.setdefault(row.chunk, []).append(row)
        return parts

    def keep(self, name: str, number: int, rows: Sequence[Any], start: float, note: Json) -> None:
        """Store a part's rows, in their place."""
        synchronise(self.lm)
        record = {"run_id": name, "chunk": number, **note, "seconds": perf_counter() - start}
        self.store.add(record, [replace(row, run_id=name, chunk=number) for row in rows])
        if self.progress:
            done = sum(len(self.parts[i]) for run, i in self.store.chunks if run == name and i < len(self.parts))
            self.progress(done, len(self.items), f"scoring {name}")


@dataclass(frozen=True)
class Estimate:
    """What a run will take, fitting left out."""

    seconds: float
    bytes: int
    """Memory on top of the model."""
    items: int


def estimate(bench: ModuleType | Adapter, lm: LM, data: Any, cfg: Any = None) -> Estimate:
    """Time a few items on the model as it is and tell what ``run`` with one patch will take.

    Raises:
        NotEnoughMemory: more than is free.
    """
    adapter = bench if isinstance(bench, Adapter) else adapt(bench)
    cfg = adapter.settle(cfg or adapter.Config(), data, False)
    items = _items(adapter, lm, data, cfg, False, None)
    need = _need(adapter, lm, items, cfg)
    probes = items[:: max(1, len(items) // PROBES)][:PROBES]
    start = perf_counter()
    adapter.warm(lm, probes, cfg, None, None)
    adapter.asks(cfg)(lm, probes, None)
    each = (perf_counter() - start) / len(probes)
    runs = 2 + len(adapter.baselines(cfg))
    return Estimate(each * len(items) * runs, need, len(items))


def bound(name: str) -> tuple[Callable[..., Report], Callable[[str | Path], Report]]:
    """``run`` and ``read_report`` of the bench whose module has this full name."""

    def run_it(lm: LM, data: Any, cfg: Any = None, **how: Any) -> Report:
        """See ``core.runner.run``."""
        return run(of(name), lm, data, cfg, **how)

    return run_it, partial(_read, name)


def _read(name: str, folder: str | Path) -> Report:
    """The report of a folder that ``run(..., out=folder)`` filled."""
    return Report.read(of(name), folder)


def _items(adapter: Adapter, lm: LM, data: Any, cfg: Any, fixed: bool, progress: Progress | None) -> Sequence[Any]:
    if not (items := adapter.plan(lm, data, cfg, fixed=fixed, progress=progress)):
        raise BadInput("nothing is left to ask. Give at least one record.")
    return items


def _need(adapter: Adapter, lm: LM, items: Sequence[Any], cfg: Any) -> int:
    """Bytes that asking takes on top of the model; raises ``NotEnoughMemory``."""
    texts, new_tokens = adapter.texts(items, cfg)
    need = working_memory(lm, texts, new_tokens, cfg.batch_size)
    require_memory(need, lm.device, "scoring")
    return need


def _record(adapter: Adapter, lm: LM, data: Any, items: Sequence[Any], cfg: Any, planned: int) -> Json:
    """What all runs of one call record; only runs of equal settings, on one model, stand in one table."""
    extra = adapter.record(items, data, cfg)
    free = {*COSTS, *adapter.COSTS, *adapter.OWN}
    settings = {key: value for key, value in plain(cfg).items() if key not in free}
    settings |= {"bench": adapter.name, "data_hash": hash_json([adapter.identity(item) for item in items])}
    settings |= {"base_weights_hash": lm.fingerprint(), "dtype": str(lm.dtype).removeprefix("torch.")}
    settings |= {"protocol_id": extra["protocol_id"]} if "protocol_id" in extra else {}
    return {
        "bench": adapter.name,
        "comparable_group": hash_json(settings)[:16],
        "settings": settings,
        "base_model": lm.name,
        "tokenizer_hash": hash_json(lm.tokenizer.backend_tokenizer.to_str())[:16],
        "started": now(),
        "versions": versions(),
        "hardware": hardware(),
        "planned": planned,
        "items": len(items),
        "bootstrap": cfg.bootstrap,
        "seed": cfg.seed,
        **{key: settings[key] for key in ("base_weights_hash", "dtype", "data_hash")},
        **extra,
    }


def _patched(
    adapter: Adapter,
    base: Json,
    name: str,
    cfg: Any,
    patches: Sequence[Patch],
    mount: Mount | None,
    settings: Mapping[str, Any] | None,
    prep: Mapping[str, Any] | None,
) -> Json:
    """The record of a patched run before it starts."""
    own: Json = {key: plain(getattr(cfg, key)) for key in adapter.OWN} | {"mount": mount}
    own["method"] = plain(dict(settings or {}))
    own["patches"] = [{"method": p.method, "hash": p.hash(), "mount": mount or p.mounts[0]} for p in patches]
    record = base | {"run_id": name, "baseline": False, "settings": base["settings"] | own}
    record |= {"mount": mount, "prep": dict(prep) if prep else None}
    if patches:
        hashes = [patch.hash() for patch in patches]
        record |= {"method": " + ".join(patch.method for patch in patches), "mount": own["patches"][0]["mount"]}
        record |= {"patch_hash": hashes[0] if len(hashes) == 1 else hash_json(hashes), "patches": own["patches"]}
        record |= {"bytes": sum(patch.nbytes for patch in patches)}
    return record


def _finish(adapter: Adapter, lm: LM, store: Store[Any]) -> Report:
    """The report; numbers, costs and seconds are written into the records of runs that have new rows."""
    report = Report.of(adapter, store)
    for run in report.runs:
        seconds = sum(part.get("seconds", 0.0) for part in run.parts)
        if run.record.get("seconds") == seconds and "metrics" in run.record:
            continue  # no part is new: no need to resample
        record = run.record | {"seconds": seconds, "chunks": len(run.parts), "peak_mem": peak_memory(lm)}
        record |= adapter.summary(lm, run.rows, run.parts)
        moved = report.differences(run.name) if run.name != BASE else {}
        record["metrics"] = [
            asdict(number) | {"difference": asdict(moved[key]) if key in moved else None}
            for key, number in run.metrics().items()
        ]
        store.put_run(record)
    return Report.of(adapter, store)
