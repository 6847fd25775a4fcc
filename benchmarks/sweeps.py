"""Every rival's best settings, found with the same care: a grid whose best lies inside it, or none is called best.

    python benchmarks/sweeps.py weights DATA --model gemma-3-270m [--only ft lora rome memit]
    python benchmarks/sweeps.py decoding DATA --model gemma-3-270m [--only cad adacad coiecd]

writes results/sweep-WHAT-MODEL.json: every setting that was tried with its numbers, the best of each method, and the
settings that no other beats on both sides (Pareto): efficacy against KL for changes of weights, ACC against BCU for
decoding rules. Axis after axis the best value is looked for with the others held, twice through. Where it lies at an
end of its axis, the axis grows, up to GROWTH times; if it still lies there, the method has no best, and "edge" says
where. Every method may try as many settings as any other (EFFORT).

`ft` and `lora` write all facts at once, every one in each epoch (breadth first, as LocFT-BF, arXiv:2509.22072, finds
best), `ft` into one module. `memit` looks for λ at several sizes of a commit. Facts are those of counterfact/train,
contexts MemoTrap's dev half; the evaluation halves are never looked at. bf16 by default: a sweep ranks settings, it
reports no score. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tables.rows import RESULTS, WORK

import lmpatch as lp
from lmpatch.benches import memotrap
from lmpatch.data.context import read_context
from lmpatch.data.edits import read_edits
from lmpatch.data.lines import read_text
from lmpatch.inference.generate import generate
from lmpatch.inference.states import hidden, next_kl
from lmpatch.methods import finetune, memit, rome
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import apply
from lmpatch.patches.patch import Patch
from lmpatch.provenance import hardware, hash_json, now, versions

TOKENS, GROWTH, EFFORT, ROUNDS = 8, 4, 60, 2
COMMITS = (10, 40, 100)
Settings = dict[str, Any]
Row = dict[str, Any]


@dataclass
class Axis:
    """One setting and the values that are tried. ``grow`` gives the next value beyond an end, or None where the setting
    ends; without it the values have no order."""

    name: str
    values: list[Any]
    grow: Callable[[Any, bool], Any] | None = None
    grown: int = field(default=0, compare=False)

    def extended(self, best: Any) -> bool:
        """Whether the best lay at an end that could be moved, and was."""
        if self.grow is None or best not in (self.values[0], self.values[-1]):
            return False
        up = best == self.values[-1]
        beyond = self.grow(best, up)
        if beyond is None or self.grown == GROWTH:
            return False
        self.values.insert(len(self.values) if up else 0, beyond)
        self.grown += 1
        return True

    def at_edge(self, best: Any) -> bool:
        """At an end that is not the setting's own."""
        ends = self.grow is not None and best in (self.values[0], self.values[-1])
        return ends and self.grow is not None and self.grow(best, best == self.values[-1]) is not None


def times(factor: float, low: float = 0.0, high: float = float("inf")) -> Callable[[Any, bool], Any]:
    """Values a factor apart."""

    def grow(value: Any, up: bool) -> Any:
        new = type(value)(value * factor if up else value / factor)
        return new if new != value and low <= new <= high else None

    return grow


def plus(step: float, low: float, high: float) -> Callable[[Any, bool], Any]:
    """Values a step apart, between the setting's own ends."""

    def grow(value: Any, up: bool) -> Any:
        new = value + step if up else value - step
        new = type(value)(round(new, 6))
        return new if low <= new <= high else None

    return grow


def descend(
    axes: Sequence[Axis], start: Settings, score: Callable[[Settings], float | None]
) -> tuple[Settings, list[str]]:
    """The best settings, axis after axis, and the axes at whose end they lie.

    Args:
        score: of settings; None once no more may be tried.
    """
    best = dict(start)
    for _ in range(ROUNDS):
        before = dict(best)
        for axis in axes:
            while True:
                found = {i: score({**best, axis.name: value}) for i, value in enumerate(axis.values)}
                known = {i: x for i, x in found.items() if x is not None}
                if not known:
                    break
                best[axis.name] = axis.values[max(known, key=lambda i: known[i])]
                if len(known) < len(found) or not axis.extended(best[axis.name]):
                    break
        if best == before:
            break
    return best, [axis.name for axis in axes if axis.at_edge(best[axis.name])]


def pareto(rows: Iterable[Row], more: str, other: str, less: bool) -> list[Row]:
    """Those that no other row beats on both numbers; ``less``: of the second less is better."""
    sign, front = -1 if less else 1, list[Row]()
    for row in sorted(rows, key=lambda row: (-row[more], -sign * row[other])):
        if not front or sign * row[other] > sign * front[-1][other]:
            front.append(row)
    return front


class Sweep:
    """All settings that were tried, kept in one file as they come."""

    def __init__(self, file: Path, record: Row) -> None:
        self.file = file
        self.kept: Row = json.loads(file.read_text()) if file.exists() else {"rows": {}, "best": {}}
        same = ("model", "dtype", "facts", "tokens")
        if self.kept.get("record") and any(self.kept["record"].get(key) != record.get(key) for key in same):
            raise SystemExit(f"{file} is of another run. Move it away.")
        self.kept["record"] = record

    def search(
        self,
        name: str,
        axes: Sequence[Axis],
        start: Settings,
        measure: Callable[[Settings], Row],
        front: tuple[str, str, bool],
        effort: int = EFFORT,
    ) -> None:
        """Find the best settings of one method; ``measure`` gives its numbers, ``score`` among them."""
        rows: list[Row] = self.kept["rows"].setdefault(name, [])
        known = {hash_json(row["settings"]): row for row in rows}
        asked: set[str] = set()

        def score(settings: Settings) -> float | None:
            key = hash_json(settings)
            if key not in known:
                if len(asked | {key}) > effort:
                    return None
                begin = perf_counter()
                row = {"settings": settings, **measure(settings)}
                row["seconds"] = round(perf_counter() - begin, 1)
                known[key] = row
                rows.append(row)
                print(name, settings, {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}, flush=True)
                self.write()
            asked.add(key)
            return float(known[key]["score"])

        best, edge = descend(axes, start, score)
        self.kept["best"][name] = {
            "settings": None if edge else best, "edge": edge, "at_edge": best if edge else None, "tried": len(rows),
            "axes": {axis.name: axis.values for axis in axes},
            "pareto": [
                {key: row[key] for key in ("settings", front[0], front[1])} for row in pareto(rows, *front)
            ],
        }  # fmt: skip
        self.write()
        if edge:
            print(f"{name}: no best settings. {best} lies at the end of {', '.join(edge)}.", flush=True)

    def write(self) -> None:
        partial_ = self.file.with_suffix(".partial")
        partial_.write_text(json.dumps(self.kept, indent=1) + "\n")
        partial_.replace(self.file)


class Facts:
    """Facts, their questions, and what the unpatched model says where nothing may change."""

    def __init__(self, lm: LM, edits: Sequence[lp.Edit], text: list[str]) -> None:
        self.lm, self.edits, self.text = lm, list(edits), text
        self.commits: dict[str, memit.Commit] = {}

    def near(self, edits: Sequence[lp.Edit]) -> list[str]:
        return [ask.prompt for edit in edits for _, asks in edit.locality for ask in asks[:1]]

    def measure(self, groups: Sequence[Sequence[lp.Edit]], patches: Iterable[Patch]) -> Row:
        """Efficacy and paraphrase by generation, KL in nats at neighbours, and their harmonic mean with exp(-KL)."""
        told, other, drift, n = 0, 0, list[torch.Tensor](), 0
        for group, patch in zip(groups, patches, strict=True):
            near = self.near(group)
            before = hidden(self.lm, near)
            with apply(self.lm, patch, mount="side" if "side" in patch.mounts else None):
                asked = [edit.prompt for edit in group] + [edit.rephrases[0] for edit in group]
                said = generate(self.lm, asked, max_new_tokens=TOKENS)
                drift.append(next_kl(self.lm, before, hidden(self.lm, near)))
            hits = [text.strip().startswith(edit.target) for text, edit in zip(said, [*group, *group], strict=True)]
            told, other, n = told + sum(hits[: len(group)]), other + sum(hits[len(group) :]), n + len(group)
        efficacy, paraphrase, kl = told / n, other / n, float(torch.cat(drift).mean())
        parts = (efficacy, paraphrase, float(torch.exp(torch.tensor(-kl))))
        score = len(parts) / sum(1 / part for part in parts) if min(parts) > 0 else 0.0
        return {"efficacy": efficacy, "paraphrase": paraphrase, "kl": kl, "score": score}

    def tuned(self, settings: Settings) -> Row:
        return self.measure([self.edits], [finetune.fit(self.lm, self.edits, finetune.Config(**settings))])

    def single(self, settings: Settings) -> Row:
        cfg = rome.Config(**settings)
        edits = self.edits[:20]
        return self.measure([[edit] for edit in edits], rome.fit_each(self.lm, edits, cfg, text=self.text))

    def commit(self, size: int, settings: Settings) -> Row:
        """Commits of that many facts; a search of values serves every λ."""
        cfg = memit.Config(**settings)
        key = hash_json(asdict(replace(cfg, weight=None, solver="memit")))
        if key not in self.commits:
            self.commits = {key: memit.Commit(self.lm, self.edits, cfg, self.text, None, None)}
        commit = self.commits[key]
        commit.cfg = cfg
        used = list(range(min(len(self.edits), max(size, 40))))
        picks = [used[start : start + size] for start in range(0, len(used), size)]
        return self.measure([[self.edits[i] for i in pick] for pick in picks], map(commit.patch, picks))


def weights(lm: LM, facts: Facts, sweep: Sweep, only: Sequence[str]) -> None:
    last, front = lm.layout.n_layers - 1, ("efficacy", "kl", True)
    layers = Axis("layer", sorted({round(last * share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)}), plus(1, 0, last))
    ends = Axis("end", [None, "answer", "eos"])
    ft = [
        layers, Axis("lr", [1e-4, 2e-4, 5e-4, 1e-3, 2e-3], times(2)), Axis("epochs", [5, 10, 25, 50], times(2, 1)),
        ends, Axis("limit", [None, 5e-4, 2e-3]),
    ]  # fmt: skip
    lora = [
        Axis("lr", [5e-4, 1e-3, 2e-3, 4e-3], times(2)), Axis("rank", [4, 8, 16], times(2, 1)),
        Axis("epochs", [5, 10, 25, 50], times(2, 1)), ends,
    ]  # fmt: skip
    low = round(last / 18) if lm.layout.post_norm else round(0.3 * last)
    search = [
        Axis("lr", [0.1, 0.2, 0.3, 0.5], times(1.6)), Axis("clamp", [1.0, 2.0, 4.0, 8.0], times(2)),
        Axis("rewordings", [0, 2, 4]), Axis("sampled_prefixes", [0, 5]), ends,
        Axis("kl", [0.02, 0.0625, 0.2], times(3)),
    ]  # fmt: skip
    at = Axis("layer", sorted({0, low, low + 1, low + 3}), plus(1, 0, last))
    starts: dict[str, tuple[list[Axis], Settings, Callable[[Settings], Row]]] = {
        "ft": (ft, {"layer": layers.values[2], "lr": 5e-4, "epochs": 25, "end": None, "limit": None}, facts.tuned),
        "lora": (lora, {"rank": 8, "lr": 2e-3, "epochs": 25, "end": None}, facts.tuned),
        "rome": (
            [at, Axis("key", ["mean", "bare"]), *search],
            {
                "layer": low,
                "key": "mean",
                "lr": 0.3,
                "clamp": 4.0,
                "rewordings": 0,
                "sampled_prefixes": 0,
                "end": None,
                "kl": 0.0625,
            },
            facts.single,
        ),
    }
    for name, (axes, start, measure) in starts.items():
        if name in only:
            sweep.search(name, axes, start, measure, front)
    if "memit" not in only:
        return
    four = [tuple(range(first, min(first + 4, last + 1))) for first in sorted({0, low, low + 2, low + 4})]
    for size in COMMITS:
        axes = [
            Axis("weight", [500.0, 1500.0, 5000.0, 15000.0], times(3)), Axis("layers", [list(own) for own in four]),
            Axis("clamp", [0.4, 0.75, 1.5], times(2)), Axis("rewordings", [0, 2]), Axis("end", [None, "answer"]),
        ]  # fmt: skip
        begin = {"weight": 5000.0, "layers": list(four[1]), "clamp": 0.75, "rewordings": 0, "end": None}
        sweep.search(f"memit {size}", axes, begin, partial(facts.commit, size), front)


def decoding(lm: LM, records: Sequence[lp.ContextRecord], sweep: Sweep, only: Sequence[str]) -> None:
    """ACC, robustness and BCU of every strength; the best has the highest BCU."""

    def measure(method: str, settings: Settings) -> Row:
        patch, run_id = lp.fit(lm, method, [], **settings), f"{method} {json.dumps(settings)}"
        cfg = memotrap.Config(baselines=())
        report = memotrap.run(lm, list(records), cfg, patch=patch, run_id=run_id, out=WORK / sweep.file.stem)
        found = report.metrics()[run_id]
        row = {name: float(found[name].value) for name in ("acc", "robustness", "bcu")}
        return row | {"score": row["bcu"]}

    alpha = [0.0, 0.25, 0.5, 1.0, 2.0]
    rules: dict[str, tuple[list[Axis], Settings]] = {
        "cad": ([Axis("alpha", list(alpha), beyond_zero)], {"alpha": 0.5}),
        "adacad": ([Axis("floor", [0.0, 0.15, 0.3, 0.6, 1.2], times(2))], {"floor": 0.0}),
        "coiecd": (
            [Axis("alpha", list(alpha), beyond_zero), Axis("ratio", [1.5, 2.0, 4.0, 8.0, 16.0], times(2, 1))],
            {"alpha": 1.0, "ratio": 4.0},
        ),
    }
    for name, (axes, start) in rules.items():
        if name in only:
            sweep.search(name, axes, start, partial(measure, name), ("acc", "bcu", False))


def beyond_zero(value: float, up: bool) -> float:
    """Strengths go on below zero, where they listen less to the context."""
    return value * 2 if up and value > 0 else round(value + (0.25 if up else -0.25), 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["weights", "decoding"])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--n", type=int, default=100, help="facts, or records with contexts")
    parser.add_argument("--only", nargs="*", help="these methods only")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lm = lp.load(args.model, dtype=args.dtype, device="cpu")
    record = {
        "made": now(), "model": lm.name, "dtype": args.dtype, "facts": args.n, "tokens": TOKENS, "effort": EFFORT,
        "versions": versions(), "hardware": hardware(),
    }  # fmt: skip
    sweep = Sweep(args.out or RESULTS / f"sweep-{args.what}-{args.model}.json", record)
    if args.what == "weights":
        edits = read_edits(args.data / "counterfact/train.jsonl.gz", limit=args.n)
        facts = Facts(lm, edits, read_text(args.data / "wikitext2/raw_train_part.txt.gz"))
        weights(lm, facts, sweep, args.only or ("ft", "lora", "rome", "memit"))
    else:
        records = read_context(args.data / "memotrap/completion_dev.jsonl.gz", limit=args.n)
        decoding(lm, records, sweep, args.only or ("cad", "adacad", "coiecd"))


if __name__ == "__main__":
    main()
