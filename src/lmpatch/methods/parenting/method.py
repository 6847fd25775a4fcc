"""``fit`` of Parenting."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...data.rag.reader import RagRecord
from ...errors import BadInput
from ...inference.forward import HEAD_CHUNK, frozen
from ...models.lm import LM
from ...models.sharding import sharded
from ...patches.base import fingerprint
from ...patches.ledger import applied
from ...patches.weight.delta import Delta, LowRank
from ...patches.weight.patch import WeightPatch
from ...progress import Progress
from ...provenance import hash_json
from .config import Config
from .data import SETS, WHOLE, Rows, prepare
from .mine import Mined, balance, correlation, mine, typed, z_scores
from .plot import plots as plots
from .tune import Mix, Tuner, mixes
from .units import TYPES, Adapter, Type, Unit, cut

SKILLS = ("adherence", "robustness")
MERGE: dict[Type, tuple[float, float, float]] = {
    "entangled": (0.4, 0.4, 0.2), "adherence": (0.8, 0.0, 0.2), "robustness": (0.0, 0.8, 0.2), "others": (0.1, 0.1, 0.8)
}  # fmt: skip
"""Weights of the adherence, the robustness and the mixed adapter in each type of unit, as released."""
TOKENS = 384  # of a long row, for the estimate of memory
MINING = (
    "units", "modules", "rank", "alpha", "cue_rows", "mine_steps", "mine_rows", "mine_lr", "mine_warmup", "beta1",
    "beta2", "update_point", "decay", "clip", "known_share", "refusals", "seed",
)  # fmt: skip
"""What decides the scores of units: a run that differs elsewhere may use those of another."""


def fit(
    lm: LM, records: Sequence[RagRecord], cfg: Config, *, out: str | Path | None = None,
    progress: Progress | None = None,
) -> WeightPatch:  # fmt: skip
    """Find the units that carry adherence and robustness, and tune each type with its own losses.

    Args:
        records: of the training articles (``data.rag.read_rag``): adherence, robustness, document extraction.
        out: folder of scores and checkpoints. A run that is there goes on where it stopped.
    Returns:
        one LowRank per projection that was tuned (Dense with full parameters). Notes: every unit's type and scores,
        how much the scores of the two skills correlate over units, layer weights, validation losses, how many own
        answers were known, refused, cut off or given by the documents.
    Raises:
        BadInput: a set is missing or has fewer records than units, the settings contradict each other, or
            ``full_matrix`` is asked of a model that is shared among processes.
        Diverged: the run diverged before its first good state. Later it stops, and the last good state is kept.
    Source: Xu et al. 2025 (arXiv:2410.10360), sec. 3.
    Differs: scores are taken on unclipped gradients before the step; A and B of a projection are one unit; units of no
    skill are frozen, where released code trains and averages them (``mode="merge"``).
    """
    _check(lm, cfg)
    start = time.perf_counter()
    units = cut(lm, cfg.units, cfg.rank, cfg.modules)
    folder = Path(out) if out is not None else None
    on = [one.patch.hash() for one in applied(lm)]  # with another patch it is another model
    given = [fingerprint(lm), str(lm.dtype), on, [r.id + r.prompt + r.answer for r in records]]
    with frozen(lm):
        sets, counts = prepare(lm, records, cfg, len(units), progress)
        mined: dict[str, Mined] = {}
        types: list[Type] = ["entangled"] * len(units)
        gamma, alike = 0.5, None
        if cfg.mode not in WHOLE:
            stamp = hash_json([{name: getattr(cfg, name) for name in MINING}, *given])
            for name in SKILLS:
                file = folder / f"mined-{name}.safetensors" if folder else None
                mined[name] = mine(lm, units, sets[name], cfg, name, progress, file, stamp)
        importance = {name: found.importance for name, found in mined.items()}
        if mined:
            adherence, robustness = importance.values()
            types = typed(adherence, robustness, cfg.threshold, cfg.rule)
            gamma, alike = balance(adherence, robustness, types), round(correlation(adherence, robustness), 5)
        tally = {t: types.count(t) for t in TYPES if mined}
        if progress and mined:
            said = ", ".join(f"{count} {t}" for t, count in tally.items())
            progress(1, 1, f"units: {said}; z-scores correlate {alike:.2f}, gamma {gamma:.2f}")
        stamp = hash_json([asdict(cfg), *given])
        deltas, notes = _tuned(lm, units, types, gamma, sets, cfg, folder, stamp, progress)
    notes |= counts | {
        "types": tally,
        "gamma": round(gamma, 5),
        "correlation": alike,
        "parameters": sum(u.size for u, t in zip(units, types, strict=True) if t != "others" or cfg.mode == "merge"),
        "units": [[u.name, u.layer, u.projection, t] for u, t in zip(units, types, strict=True)] if mined else [],
        "scores": {name: {"z": z_scores(x).tolist(), "importance": x.tolist()} for name, x in importance.items()},
        "layers": {name: found.layers.tolist() for name, found in mined.items()},
        "mining": {name: found.notes for name, found in mined.items()},
    }
    edits = [{"id": r.id, "kind": r.kind, "variant": r.variant} for r in records]
    seconds = time.perf_counter() - start
    return WeightPatch.make(lm, deltas, method="parenting", config=cfg, edits=edits, seconds=seconds, notes=notes)


def _check(lm: LM, cfg: Config) -> None:
    rows = ("rows_adherence", "rows_robustness")
    whole = ("rank", "mine_steps", "mine_rows", "steps", "validate_every", *(() if cfg.mode in WHOLE else rows))
    if low := [name for name in whole if getattr(cfg, name) < 1]:
        raise BadInput(f"{low[0]} is {getattr(cfg, low[0])}; it must be at least 1.")
    if min(counts := [cfg.rows_adherence, cfg.rows_robustness, cfg.rows_extraction]) < 0 or not any(counts):
        raise BadInput(f"a step has {counts} rows of the three sorts; give 0 or more, and at least one row in all.")
    shares = ("beta1", "beta2", "delta", "known_share")
    if odd := [name for name in shares if not 0 <= getattr(cfg, name) <= 1]:
        raise BadInput(f"{odd[0]} is {getattr(cfg, odd[0])}; it must be in 0..1.")
    if cfg.mode == "merge" and cfg.merge_space == "delta" and cfg.units == "factor":
        raise BadInput("units=factor weighs A and B apart, which no product has. Set merge_space=factors.")
    if cfg.units == "full_matrix" and sharded(lm):
        raise BadInput(
            "units=full_matrix needs whole weights, and the model is shared among processes. Leave --shard out, or set "
            "units=matrix."
        )


def _tuned(
    lm: LM, units: Sequence[Unit], types: Sequence[Type], gamma: float, sets: Mapping[str, Rows], cfg: Config,
    folder: Path | None, stamp: str, progress: Progress | None,
) -> tuple[dict[str, Delta], dict[str, Any]]:  # fmt: skip
    """The change of weights, and what is worth knowing about the run."""
    scale = cfg.alpha / cfg.rank if cfg.units != "full_matrix" else 1.0
    one = mixes(cfg.delta, 0.5)["entangled"]
    plans: dict[str, Mix] = {"tuning": mixes(cfg.delta, gamma) if cfg.boundary else dict.fromkeys(TYPES, one)}
    if cfg.mode == "merge":
        kinds = SKILLS if cfg.delta == 1 else SETS
        plans = {f"tuning {name}": {"entangled": {name: 1.0}} for name in SKILLS}
        plans["tuning all"] = {"entangled": dict.fromkeys(kinds, 1 / len(kinds))}
    adapters, loops, curves = [], [], {}
    for name, mix in plans.items():
        adapters.append(Adapter(lm, units, scale, cfg.seed, None if cfg.mode == "merge" else types))
        tuner = Tuner(lm, adapters[-1], sets, mix, cfg, name)
        loops.append(tuner.run(folder, stamp, progress))
        curves[name] = [{key: point[key] for key in ("step", *tuner.counts)} for point in loops[-1].curve]
    notes: dict[str, Any] = {"validation": curves, "stopped": [loop.stopped for loop in loops if loop.stopped]}
    notes["tuning_seconds"] = round(sum(loop.seconds for loop in loops), 3)
    return _averaged(lm, adapters, types, cfg) if cfg.mode == "merge" else adapters[0].deltas(lm), notes


@torch.no_grad()
def _averaged(lm: LM, adapters: Sequence[Adapter], types: Sequence[Type], cfg: Config) -> dict[str, Delta]:
    """Adherence, robustness and mixed adapter, unit by unit with the released weights."""
    first, factors = adapters[0], cfg.merge_space == "factors" or cfg.units == "full_matrix"
    pieces = [(piece, MERGE[t]) for unit, t in zip(first.units, types, strict=True) for piece in unit.pieces]
    sizes = torch.tensor([piece.size for piece, _ in pieces])
    for k, adapter in enumerate(adapters):  # of a product only B is weighed: that is then exact
        shares = torch.tensor([shares[k] if factors or piece.factor == "b" else 1.0 for piece, shares in pieces])
        adapter.flat["entangled"].mul_(shares.repeat_interleave(sizes).to(lm.device))
    if factors:
        first.flat["entangled"].copy_(sum((adapter.flat["entangled"] for adapter in adapters), torch.zeros(())))
        return first.deltas(lm)
    parts = [adapter.factors() for adapter in adapters]
    return {
        lm.layout.weight(module): LowRank(
            torch.cat([own[module]["b"] * first.scale for own in parts], 1),
            torch.cat([own[module]["a"] for own in parts]),
        )
        for module in parts[0]
    }


def estimate(lm: LM, count: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model, rounded up: the adapter with gradients, moments and scores, what autograd
    keeps of one batch, and logits of one head chunk."""
    layout = lm.layout
    units = cut(lm, cfg.units, cfg.rank, cfg.modules)
    parameters = sum(unit.size for unit in units) * (3 if cfg.mode == "merge" else 1)
    rows = max(cfg.mine_rows, cfg.rows_adherence, cfg.rows_robustness, cfg.rows_extraction)
    batch = rows * TOKENS * (12 * layout.n_layers * layout.d_model + 4 * sum(layout.widths))
    return 4 * (8 * parameters + batch + 3 * HEAD_CHUNK * layout.vocab)


def example(lm: LM) -> tuple[list[RagRecord], Config]:
    """Records and settings that run in milliseconds on a tiny model."""
    towns = ("Paris", "Rome", "Tokyo", "Seattle", "Lima", "Oslo", "Cairo", "Quito", "Delhi", "Seoul", "Accra", "Turin")
    records = []
    for i in range(24):
        town, other = towns[i % len(towns)], towns[(i + 1 + i // len(towns)) % len(towns)]
        ask, text = f"Where is tower {i}?", f"Tower {i} is in {town}."
        noise = f"The mayor of {other} is away."
        records.append(RagRecord(ask, (text,), "adherence", "original", town, (town,), id=f"{i}:original"))
        records.append(RagRecord(ask, (noise,), "robustness", "foreign", "", (town,), id=f"{i}:foreign"))
        if i % 6 == 0:
            answer = f"Doc 1: relevant\nDoc 2: off-topic noise\n{text}"
            records.append(RagRecord(ask, (text, noise), "extraction", "three", answer, (town,), id=f"{i}:three"))
    quick = {"rank": 2, "mine_steps": 2, "mine_rows": 2, "cue_rows": 4, "steps": 3, "warmup": 0, "validate_every": 3}
    # not attention: a random one amplifies what bf16 rounds, until mounts that agree seem not to
    return records, Config(**quick, modules="mlp", lr=0.05, clip=10.0, refusals=True)  # type: ignore[arg-type]
