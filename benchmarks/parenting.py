"""Parenting from raw SQuAD to report: base, parenting, plain and mixed fine-tuning, IRCAN, CAD, ablations.

    python benchmarks/parenting.py tune DATA/squad/squad_v2_dev.jsonl.gz
    python benchmarks/parenting.py DATA/squad/squad_v2_dev.jsonl.gz

``tune`` chooses the settings of parenting, mixed and plain fine-tuning, CAD's alpha and IRCAN's (neurons, factor) on
the dev articles, by R_Ad + R_Ro on the same items, and writes results/parenting-dev.json. The second command reads that
file and measures everything once on the held-out articles; it is meant to take less than an hour on two cores, and with
the tuning inside would not. Where the file is missing it takes the methods' defaults and says so.

work/parenting gets the sets, a folder per patch, rows and page of the bench, parenting.json with the verdict, and two
PNGs. Either command goes on where it stopped. The runs that matter most come first. Answers without documents that the
user's cache holds are not asked again: for an honest clock set LMPATCH_CACHE to an empty folder. Rows and records are
kept in results/parenting.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shutil import copy
from time import perf_counter
from typing import Any

from facts import commit_rows
from general import ability

import lmpatch as lp
from lmpatch.benches import general, rag
from lmpatch.benches.core.report import Report
from lmpatch.config import parse, resolve
from lmpatch.data.rag.reader import Build, RagRecord, build, read_questions, read_rag, write
from lmpatch.files import replacing
from lmpatch.inference.closed_book import closed_book_answers
from lmpatch.methods.decoding import CAD, METHODS
from lmpatch.methods.ircan import method as ircan
from lmpatch.methods.parenting import method as parenting
from lmpatch.methods.parenting.config import Config
from lmpatch.probes.integrated_gradients import probe as integrated_gradients
from lmpatch.provenance import hardware, now, versions

RESULTS = Path(__file__).parent / "results"
WORK = Path(__file__).parent / "work"
RUNS: dict[str, dict[str, Any]] = {
    "parenting": {},
    "mixed": {"mode": "mixed"},
    "plain": {"mode": "plain"},
    "mixed_same_units": {"boundary": False},
    "no_layer_cue": {"cue": "none"},
    "no_extraction": {"delta": 1.0},
    "ircan": {},
    "cad": {},
}
"""Run → what it changes of its method's settings. ``mixed_same_units`` trains what parenting trains, and is its
ablation without boundary control; ``mixed`` trains all units on one mix of the three losses, ``plain`` on the mean over
all answer tokens of the same rows. Runs that nothing was chosen for on dev take parenting's choice."""
ABLATIONS = ("mixed_same_units", "no_layer_cue", "no_extraction")
TRIED: dict[str, list[dict[str, Any]]] = {
    "parenting": [
        {"lr": 2.5e-4},
        {"lr": 5e-4},
        *({"units": "lora_rank", "threshold": t} for t in (0.0, -0.3, -0.4)),
        {"units": "lora_rank", "threshold": -0.4, "delta": 0.5},
    ],
    "mixed": [{"lr": 1.25e-4}, {"lr": 2.5e-4}, {"lr": 2.5e-4, "delta": 0.5}],
    "plain": [{"lr": 2.5e-4}],
    "cad": [{"alpha": alpha} for alpha in (0.25, 0.5, 1.0)],
    "ircan": [{"neurons": h, "factor": b} for h in (8, 32) for b in (1.5, 2.0)],
}
"""What is chosen from on dev."""
SKILLS = ("R_Ad", "R_Ro", "R_Ad+R_Ro")
NOTES = (
    "types", "correlation", "gamma", "parameters", "own_answers", "rows", "mining", "validation", "stopped",
    "tuning_seconds",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    tuning = words[:1] == ["tune"]
    args = _arguments(words[tuning:])
    chosen = json.loads(args.chosen.read_text())["chosen"] if args.chosen.exists() and not tuning else {}
    bench = Bench(args, args.out / "dev" if tuning else args.out, chosen)
    tune(bench) if tuning else measure(bench)


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("squad", type=Path)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=WORK / "parenting")
    parser.add_argument("--chosen", type=Path, default=RESULTS / "parenting-dev.json", help="what tune writes")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of parenting, for all runs")
    parser.add_argument("--build", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the data builder")
    parser.add_argument("--n", type=int, default=120, help="items of each condition at most")
    parser.add_argument("--ircan-examples", type=int, default=24)
    parser.add_argument(
        "--general", type=Path, help="folder of general tasks and texts; left out: the one that holds SQuAD's folder"
    )
    parser.add_argument("--general-n", type=int, default=100, help="records of each general task")
    args = parser.parse_args(words)
    around = args.squad.resolve().parent.parent
    args.general = args.general or (around if (around / "general").is_dir() else None)
    return args


class Bench:
    """One folder of results: its sets, its model, its patches, its clock."""

    def __init__(self, args: argparse.Namespace, out: Path, chosen: dict[str, dict[str, Any]]) -> None:
        self.args, self.out, self.chosen = args, out, chosen
        self.began, self.seconds = perf_counter(), dict[str, float]()
        builder = resolve(Build, parse(Build, args.build))
        self.resumed = _claim(out / "run.json", self._identity(builder))
        if not (out / "sets").exists():
            self.timed(
                "data",
                lambda: write(build(read_questions(args.squad), builder), out / "sets", source=args.squad, cfg=builder),
            )
        self.train = read_rag(out / "sets/train.jsonl")
        self.lm = self.timed("load", lambda: lp.load(args.model, dtype=args.dtype, device="cpu"))

    def _identity(self, builder: Build) -> dict[str, Any]:
        """What decides the numbers."""
        same = ("model", "dtype", "set", "n", "ircan_examples")
        found = {name: getattr(self.args, name) for name in same}
        found |= {"build": asdict(builder), "chosen": self.chosen, "runs": RUNS}
        return found | {"squad": hashlib.sha256(self.args.squad.read_bytes()).hexdigest()}

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = perf_counter()
        made = work()
        self.seconds[name] = round(perf_counter() - start, 1)
        print(f"{name}: {self.seconds[name]} s, {perf_counter() - self.began:.0f} s in all", flush=True)
        return made

    def ask(self, records: Sequence[RagRecord]) -> None:
        """Everything the model is asked without documents, at once."""
        asked = [r.question for r in self.train if r.kind == "robustness"] + [r.question for r in records]
        self.timed("own answers", lambda: closed_book_answers(self.lm, asked, progress=_told))

    def patch(self, name: str, run: str, settings: dict[str, Any]) -> lp.Patch:
        """The patch of that name; one that is there is read."""
        path = self.out / "patches" / name
        if path.exists():
            return lp.load_patch(path)
        if run in ("cad", "ircan"):
            made = self._decoded(settings) if run == "cad" else self._scaled(settings)
        else:
            made = self._tuned(name, settings)
        made.save(path)
        return made

    def _conflicts(self) -> list[lp.ContextRecord]:
        found = [r for r in self.train if r.variant == "substituted"][: self.args.ircan_examples]
        return [
            lp.ContextRecord(
                r.documents[0], r.question, r.answer, prompt=r.prompt, without_context=r.without_context, id=r.id
            )
            for r in found
        ]

    def _decoded(self, settings: dict[str, Any]) -> lp.Patch:
        return METHODS["cad"].fit(self.lm, self._conflicts(), resolve(CAD, settings))

    def _scaled(self, settings: dict[str, Any]) -> lp.Patch:
        records, kept = self._conflicts(), self.out / "work/ircan.jsonl"
        kept.parent.mkdir(parents=True, exist_ok=True)
        scores = integrated_gradients.run(self.lm, records, integrated_gradients.Config(), out=kept, progress=_told)
        return ircan.fit(self.lm, records, resolve(ircan.Config, settings), scores=scores)

    def _tuned(self, name: str, settings: dict[str, Any]) -> lp.Patch:
        work = self.out / "work" / name
        work.mkdir(parents=True, exist_ok=True)
        for file in self.out.glob("work/*/mined-*.safetensors"):  # the same for all: what differs comes after
            if not (work / file.name).exists():
                copy(file, work / file.name)
        cfg = resolve(Config, {"validate_every": 40} | parse(Config, self.args.set) | settings)
        return parenting.fit(self.lm, self.train, cfg, out=work, progress=_told)


def _claim(path: Path, identity: dict[str, Any]) -> bool:
    """Whether the folder holds a run of this identity already.

    Raises:
        SystemExit: it holds another one.
    """
    identity = json.loads(json.dumps(identity))
    if resumed := path.exists():
        known = json.loads(path.read_text())
        added = {name: run for name, run in identity["runs"].items() if name not in known["runs"]}
        known["runs"] |= added  # a run more is no other bench
        if differ := [key for key in identity if identity[key] != known.get(key)]:
            raise SystemExit(f"{path.parent} was made with other values of {', '.join(differ)}. Use another --out.")
    with replacing(path) as work:
        work.write_text(json.dumps(identity, indent=1) + "\n")
    return resumed


def tune(bench: Bench) -> None:
    """Choose every setting on the dev articles, by the same number on the same items."""
    dev = read_rag(bench.out / "sets/dev.jsonl", part="dev")
    bench.ask(dev)
    cfg = rag.Config(n=bench.args.n, conditions=("conflict", "irrelevant"))
    tried: dict[str, dict[str, Any]] = {run: {} for run in TRIED}
    for run, settings in TRIED.items():
        for own in settings:
            name = "-".join([run, *(f"{key}={value}" for key, value in own.items())])
            try:
                patch = bench.timed(name, partial(bench.patch, name, run, RUNS[run] | own))
            except lp.Diverged as error:
                tried[run][name] = {"settings": own, "diverged": str(error)}
                continue
            report = rag.run(bench.lm, dev, cfg, patch=patch, run_id=name, out=bench.out / "bench", progress=_told)
            if (found := report.run(name).metric("R_Ad+R_Ro")) is None:
                raise SystemExit(f"{bench.args.model} knows no answer of dev, so nothing can be chosen on it.")
            tried[run][name] = {"settings": own, **asdict(found)}
            print(f"  {name}: R_Ad + R_Ro {100 * found.value:.1f}", flush=True)
    best = {run: max(found.values(), key=lambda one: one.get("value", -1.0)) for run, found in tried.items()}
    record: dict[str, Any] = {
        "chosen": {run: one["settings"] for run, one in best.items()},
        "tried": tried,
        "seconds": bench.seconds,
    }
    record |= {"made": now(), "model": bench.args.model, "dtype": bench.args.dtype, "set": bench.args.set}
    with replacing(bench.args.chosen) as work:
        work.write_text(json.dumps(record, indent=1) + "\n")
    print(f"chosen: {record['chosen']}, in {bench.args.chosen}")


def measure(bench: Bench) -> None:
    """Every run on the held-out articles, and the report after each."""
    if not bench.chosen:
        print(f"{bench.args.chosen} is missing: the methods' defaults are measured, nothing was chosen on dev.")
    held = read_rag(bench.out / "sets/held_out.jsonl", part="held_out")
    bench.ask(held)
    cfg = rag.Config(n=bench.args.n, conditions=("context", "conflict", "mixed", "irrelevant", "empty"))
    for run in ("base", *RUNS):
        patch = None
        if run != "base":
            rates = bench.chosen.get(run, bench.chosen.get("parenting", {}))
            patch = bench.timed(run, partial(bench.patch, run, run, rates | RUNS[run]))
        bench.timed(
            f"bench {run}",
            partial(
                rag.run,
                bench.lm,
                held,
                cfg,
                patch=patch,
                run_id=run if patch else "",
                out=bench.out / "bench",
                progress=_told,
            ),
        )
        _report(bench)
    if bench.args.general:
        patch, data = lp.load_patch(bench.out / "patches/parenting"), general.load(bench.args.general)
        asked = partial(ability, bench.lm, data, patch, "parenting", bench.args.general_n, bench.out / "general", _told)
        bench.timed("general", asked)
        _report(bench)


def _report(bench: Bench) -> None:
    """parenting.json, page and pictures of what is there so far."""
    path = bench.out / "parenting.json"
    before = json.loads(path.read_text())["seconds"] if path.exists() else {}
    seconds = {**bench.seconds, **{name: max(s, bench.seconds.get(name, 0)) for name, s in before.items()}}
    report = rag.read_report(bench.out / "bench")
    report.save_html(bench.out / "bench.html")
    commit_rows(bench.out / "bench")
    patches: dict[str, Any] = {}
    for run in RUNS:
        if not (bench.out / "patches" / run).exists():
            continue
        patch = lp.load_patch(bench.out / "patches" / run)
        patches[run] = {key: patch.notes[key] for key in NOTES if key in patch.notes} | {"bytes": patch.nbytes}
        if run == "parenting":
            parenting.plots(patch, bench.out)
    minutes = round(sum(seconds.values()) / 60, 1)
    record = {
        "made": now(), "versions": versions(), "hardware": hardware(), "model": bench.args.model,
        "chosen": bench.chosen or "nothing: the methods' defaults", "seconds": seconds, "minutes": minutes,
        "resumed": bench.resumed, "within_an_hour": None if bench.resumed else minutes <= 60,
        "runs": {run.name: {m["name"]: m for m in run.record["metrics"]} for run in report.runs},
        "verdict": verdict(report), "patches": patches,
    }  # fmt: skip
    with replacing(path) as work:
        work.write_text(json.dumps(record, indent=1) + "\n")
    if bench.out.is_relative_to(WORK):
        copy(path, RESULTS / bench.out.relative_to(WORK) / path.name)
    for each in report.runs:
        found = [(m, each.metric(m)) for m in ("R_Ad", "R_Ro")]
        told = [f"{m} {100 * x.value:.1f} ± {100 * (x.clustered or x.stderr or 0):.1f}" for m, x in found if x]
        size = patches.get(each.name, {}).get("parameters")
        print(f"  {each.name}: {', '.join(told)}{f', {size} parameters' if size else ''}", flush=True)


def verdict(report: Report) -> dict[str, Any]:
    """The paper's claims, as differences on the same items."""
    names = [run.name for run in report.runs[1:]]
    others = [name for name in names if name != "parenting" and name not in ABLATIONS[1:]]
    found = {"against the base": {name: _moved(report, name, report.runs[0].name) for name in names}}
    if "parenting" in names:
        found["parenting minus"] = {name: _moved(report, "parenting", name) for name in others}
        found["minus parenting"] = {name: _moved(report, name, "parenting") for name in names if name in ABLATIONS}
    return found


def _moved(report: Report, name: str, to: str) -> dict[str, Any]:
    """Each number's difference, in points and in the larger of its two standard errors."""
    made: dict[str, Any] = {}
    for metric in SKILLS:
        if found := report.difference(name, metric, to):
            error = max(found.stderr or 0.0, found.clustered or 0.0)
            made[metric] = {"points": round(100 * found.value, 2), "error": round(100 * error, 2), "n": found.n}
            made[metric]["in_errors"] = round(found.value / error, 2) if error else None
    return made


def _told(done: int, total: int, what: str) -> None:
    if done == total or done % max(1, total // 10) == 0:
        print(f"  {what} {done}/{total}", flush=True)


if __name__ == "__main__":
    main()
