"""Every editor on the same facts: the tables of the papers, by free generation as well, from one command.

    python benchmarks/editors.py DATA                                         everything; hours to days on a CPU
    python benchmarks/editors.py DATA --estimate                              says how long, and stops
    python benchmarks/editors.py DATA --model gemma-3-270m --sets counterfact --n 1 100 --seeds 0 --only rome rag
    python benchmarks/editors.py DATA --steps tables --latex tables.tex       tables of what is committed, no model

The editors are all methods that write facts, the forms in FORMS, and those in SEQUENTIAL in commits of one fact. In
four steps, each of which skips what is there:

    tune      the same number of tried settings for each editor, on counterfact/train: results/sweep-editors-MODEL.json
    run       editor x set x facts in the model x seed. Below SAVED facts 100 facts are asked group by group; from there
              on one commit, whose patch stays in work/editors/
    general   tasks and the perplexity of plain text after 1,000 facts
    tables    Markdown on stdout, LaTeX in a file

Ctrl-C loses nothing: patches and rows stay in work/editors/, and the same command goes on. Packed rows go to
results/editors/, a file for each model and set. What an editor cannot do is said and left out. Answers end where the
model, or a new line, ends them, after ``--tokens`` at most.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, get_type_hints

from editors_settings import EFFORT, FACTS, FORMS, opened, tune
from facts import unseen
from general import TASKS
from recipe_answers import FILES
from tables import editors as printed
from tables import editors_rows as rows
from tables.rows import RESULTS, WORK, read_lines, write_lines

import lmpatch as lp
from lmpatch import registry
from lmpatch.benches import facts
from lmpatch.benches import general as ability
from lmpatch.benches.core.report import Report
from lmpatch.benches.facts import compare
from lmpatch.benches.facts.advice import costs
from lmpatch.data.edits import prompt_key, read_edits
from lmpatch.errors import ForeignWrite, LmpatchError
from lmpatch.patches.file import load_patch
from lmpatch.patches.ledger import applied
from lmpatch.patches.patch import Patch, plain
from lmpatch.provenance import hardware, hash_json, versions
from lmpatch.resources import format_bytes

MODELS = ("gemma-3-270m", "smollm2-135m-instruct")
HELD_OUT = {"counterfact": 5000, "zsre": 402, "wiki": 500, "real-zsre": 1500, "real-wiki": 1500}
"""Facts of a set that no packaged editor was trained on, the first ones of its file; but for 24 of real-zsre."""
SIZES, SEEDS, SAVED, SCORED, GENERAL = (1, 10, 100, 1000, 5000), (0, 1, 2), 100, 100, 1000
MOST = {"weight": 1000}
"""Kind of patch -> facts at most; others take as many as SIZES has."""
SEQUENTIAL = ("rome", "memit")
STEPS = ("tune", "run", "general", "tables")


class Cell(NamedTuple):
    """Runs that may stand in one table."""

    set: str
    n: int
    seed: int
    commit: int
    """Facts of a commit; 0: all of them."""

    @property
    def name(self) -> str:
        return f"{self.set}-{self.n}-seed{self.seed}" + (f"-commits{self.commit}" if self.commit else "")


@dataclass
class Bench:
    """One model, its editors, and where things are."""

    lm: lp.LM
    model: str
    data: Path
    cfg: compare.Config
    entrants: dict[str, compare.Entrant]
    work: Path
    results: Path
    left_out: dict[str, str]

    def facts(self, cell: Cell) -> list[lp.Edit]:
        """The facts of a cell in the order of its seed, no prompt twice. Below SAVED: as many as are asked."""
        every = {prompt_key(e.prompt): e for e in read_edits(self.data / FILES[cell.set])[: HELD_OUT[cell.set]]}
        edits = list(every.values())
        random.Random(cell.seed).shuffle(edits)
        size = cell.n if cell.n >= SAVED else min(self.cfg.cases, len(edits)) // cell.n * cell.n
        return facts.with_unrelated(edits, unseen(self.data))[:size] if size <= len(edits) else []

    def run(self, cell: Cell, name: str) -> Report:
        """One editor on one cell; what is there is not made again."""
        edits, who, folder = self.facts(cell), self.entrants[name], self.work / cell.name
        if cell.n >= SAVED and not cell.commit:
            return compare.entered(
                self.lm, edits, who, self.cfg, folder, data_name=cell.set, progress=partial(told, f"{cell.name} {name}")
            )
        cfg = self.cfg.bench(n=cell.n, commit_size=cell.commit or None, immediate=False)
        make = Kept(who.make, folder / "commits" / compare.slug(name)) if cell.commit else who.make
        return facts.run(
            self.lm, edits, cfg, make=make, make_each=None if cell.commit else who.make_each, settings=who.settings,
            prep={"training_s": who.training, "statistics_s": who.statistics}, run_id=name, data_name=cell.set,
            out=folder, progress=partial(told, f"{cell.name} {name}"),
        )  # fmt: skip

    def file(self, cell: Cell) -> Path:
        return self.results / f"{self.model}-{cell.set}.jsonl.gz"

    def done(self, cell: Cell, name: str) -> bool:
        """It is packed already, under the same settings and asked the same."""
        same = json.loads(json.dumps([plain(self.cfg), plain(dict(self.entrants[name].settings))]))
        known = (line for line in read_lines(self.file(cell)) if line["run"] == name)
        return any(
            cell == Cell(*(line[key] for key in Cell._fields)) and [line["asked"], line["made"]["settings"]] == same
            for line in known
        )

    def keep(self, cell: Cell, report: Report) -> None:
        """Pack the runs of a cell into the committed file of its model and set."""
        kept = self.work / cell.name / "commits"
        lines = [
            {
                "model": self.model, **cell._asdict(), "run": run.name, "baseline": run.record["baseline"],
                "asked": plain(self.cfg), "made": _made(run.record, kept / compare.slug(run.name)),
                "costs": costs(run), "kinds": rows.packed(plain(row) for row in run.rows),
            }
            for run in report.runs
        ]  # fmt: skip
        merge(self.file(cell), lines)


class Kept:
    """A maker of commits that writes each patch down; one that is there is read."""

    def __init__(self, make: Callable[[lp.LM, list[lp.Edit]], Patch], folder: Path) -> None:
        self.make, self.folder = make, folder

    def __call__(self, lm: lp.LM, edits: list[lp.Edit]) -> Patch:
        place = self.folder / f"{len(applied(lm))}-{hash_json(plain(edits))[:12]}"
        if place.exists():
            return load_patch(place)
        patch = self.make(lm, edits)
        patch.save(place)
        return patch


def _made(record: dict[str, Any], commits: Path) -> dict[str, Any]:
    """How a run was made, in short; seconds of commits that may have been read again are the patches' own."""
    kept = {key: record.get(key) for key in ("dtype", "protocol_id", "started", "versions", "hardware", "collapsed_at")}
    kept |= {"patch": str(record.get("patch_hash"))[:12], "settings": record["settings"].get("method")}
    if commits.is_dir():
        kept["edit_s"] = median(load_patch(path).made["seconds"] for path in commits.iterdir())
    return {key: value for key, value in kept.items() if value not in (None, [])}


def merge(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Put the lines into the file, in place of older ones of the same run and cell."""
    keys = ("set", "n", "seed", "commit", "run")
    every = {tuple(line.get(key) for key in keys): line for line in [*read_lines(file), *lines]}
    write_lines(file, [every[key] for key in sorted(every, key=str)])


def told(name: str, done: int, total: int, what: str) -> None:
    if done >= total:
        print(f"{name}: {what} {done}/{total}", flush=True)


def most(name: str) -> int:
    """Facts an editor is tried with at most, by the kind of patch it makes."""
    method = registry.method(FORMS.get(name, name).split()[0])
    return MOST.get(get_type_hints(method.fit)["return"].kind, max(SIZES))


def cells(args: argparse.Namespace, bench: Bench) -> Iterator[tuple[Cell, str]]:
    """Every cell with every editor that is not done. One order of facts is enough below SAVED."""
    for chosen in args.sets:
        for n in args.n:
            for seed in args.seeds if n >= SAVED else args.seeds[:1]:
                here = [name for name in bench.entrants if n <= most(name)]
                if not bench.facts(Cell(chosen, n, seed, 0)):
                    print(f"{chosen} has fewer than {n} facts", flush=True)
                    break
                for commit in (0, 1) if n >= SAVED else (0,):
                    cell, names = Cell(chosen, n, seed, commit), [x for x in here if not commit or x in SEQUENTIAL]
                    yield from ((cell, name) for name in names if not bench.done(cell, name))


def foreseen(args: argparse.Namespace, bench: Bench) -> dict[str, float]:
    """Hours of each editor that has work left, from the time that a few facts take; the longest first."""
    left = {name for _, name in cells(args, bench)}
    if not left:
        return {}
    some = bench.facts(Cell(args.sets[0], min(args.n), args.seeds[0], 0))
    who = [one for name, one in bench.entrants.items() if name in left]
    found = compare.expected(bench.lm, some, who, bench.cfg)
    asked = found[0].seconds / 2
    for each in found[1:]:
        bench.entrants[each.name] = replace(bench.entrants[each.name], statistics=each.statistics)
        if each.why:
            bench.left_out[each.name] = each.why
            del bench.entrants[each.name]
    each_s = {each.name: each.each for each in found}
    hours = {each.name: 0.0 for each in found[1:] if not each.why}
    for cell, name in cells(args, bench):
        hours[name] += (asked + each_s[name] * max(cell.n, SCORED if cell.n < SAVED else 0)) / 3600
    for name, time in sorted(hours.items(), key=lambda pair: -pair[1]):
        print(f"{name}: about {time:.1f} hours", flush=True)
    need = format_bytes(max(each.bytes for each in found))
    print(f"{bench.model}: in all about {sum(hours.values()):.1f} hours, {need} on top of the model", flush=True)
    return hours


def run(args: argparse.Namespace, bench: Bench) -> None:
    """Every cell; an editor that cannot write one is left out there, and the others go on."""
    for cell, name in cells(args, bench):
        try:
            bench.keep(cell, bench.run(cell, name))
        except ForeignWrite:
            raise
        except LmpatchError as error:
            bench.left_out[f"{cell.name} {name}"] = str(error)
            print(f"{cell.name} {name} is left out: {error}", flush=True)


def general(args: argparse.Namespace, bench: Bench) -> None:
    """Tasks and plain text under the patch of GENERAL facts that ``run`` left behind."""
    cell, out = Cell(args.sets[0], GENERAL, args.seeds[0], 0), bench.work / "general"
    data, cfg = ability.load(args.data), ability.Config(n=args.records, tasks=TASKS)
    for name, who in bench.entrants.items():
        place = bench.work / cell.name / "patches" / compare.slug(name)
        if not place.exists():
            print(f"{name} has no patch of {GENERAL:,} facts: general ability is left out", flush=True)
            continue
        report = ability.run(
            bench.lm, data, cfg, patch=load_patch(place), run_id=who.name, data_name="public tasks", out=out,
            progress=partial(told, f"general {name}"),
        )  # fmt: skip
        lines = [
            {"model": bench.model, "set": "general", "n": GENERAL, "seed": cell.seed, "commit": 0, "run": one.name,
             "baseline": one.record["baseline"], "tasks": rows.packed_tasks(plain(row) for row in one.rows)}
            for one in report.runs
        ]  # fmt: skip
        merge(bench.results / f"{bench.model}-general.jsonl.gz", lines)


def prepared(args: argparse.Namespace, model: str) -> Bench:
    """The model and its editors with their best settings, which are looked for first."""
    them = opened(model, args.data, args.editors, args.only, dtype=args.dtype, device=args.device)
    name = Path(model).name
    sweep = args.results.parent / f"sweep-editors-{name}.json"
    if "tune" in args.steps and not args.estimate:
        tune(them, args.data, sweep, args.effort, args.tuned)
    made = them.built(json.loads(sweep.read_text())["best"] if sweep.exists() else {})
    for left, why in them.left_out.items():
        print(f"{left} is left out: {why}", flush=True)
    cfg = compare.Config(cases=args.scored, max_new_tokens=args.tokens, pack=args.pack, bootstrap=0)
    return Bench(them.lm, name, args.data, cfg, made, args.work / name, args.results, them.left_out)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="editors.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", nargs="+", default=list(MODELS), help="names or folders")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--only", nargs="+", help="these editors only")
    parser.add_argument("--sets", nargs="+", choices=list(HELD_OUT), default=list(HELD_OUT))
    parser.add_argument("--n", nargs="+", type=int, default=list(SIZES), help="facts in the model")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--scored", type=int, default=SCORED, help="facts of a cell that are asked")
    parser.add_argument("--pack", type=int, default=20, help="facts of them that are asked the probe pack")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer at most")
    parser.add_argument("--effort", type=int, default=EFFORT, help="settings that tuning may try of each editor")
    parser.add_argument("--tuned", type=int, default=FACTS, help="facts of counterfact/train that tuning writes")
    parser.add_argument("--records", type=int, default=200, help="of a task of general ability")
    parser.add_argument("--editors", nargs="+", type=Path, default=[], help="editors that lmpatch train wrote")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--estimate", action="store_true", help="say how long it takes, and stop")
    parser.add_argument("--json", action="store_true", help="a last line that is one JSON object")
    parser.add_argument("--latex", type=Path, help="a file for the tables as LaTeX")
    parser.add_argument("--work", type=Path, default=WORK / "editors")
    parser.add_argument("--results", type=Path, default=RESULTS / "editors")
    args = parser.parse_args(words)
    summary: dict[str, Any] = {"versions": versions(), "hardware": hardware(), "models": {}}
    for model in args.model if {*args.steps} - {"tables"} or args.estimate else []:
        bench = prepared(args, model)
        hours = foreseen(args, bench) if args.estimate or "run" in args.steps else {}
        for step, work in (("run", run), ("general", general)):
            if step in args.steps and not args.estimate:
                work(args, bench)
        summary["models"][bench.model] = {"hours": hours, "left_out": bench.left_out}
    rows.every.cache_clear()
    if "tables" in args.steps and not args.estimate:
        print(printed.markdown(args.results), flush=True)
        if args.latex:
            args.latex.write_text(printed.latex(args.results), encoding="utf-8")
    if args.json:
        print(json.dumps(summary | {"runs": len(rows.every(args.results))}, default=str))


if __name__ == "__main__":
    main()
