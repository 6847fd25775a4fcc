"""Parenting from raw SQuAD to report: base, plain mixed fine-tuning, parenting, its ablations, IRCAN, CAD.

    python benchmarks/parenting.py ../shared/data/squad/squad_v2_dev.jsonl.gz

writes results/parenting: the sets, a folder per patch, rows and page of the bench, parenting.json, and two PNGs. The
same command goes on where it stopped. The runs that matter most come first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import copy
from time import perf_counter
from typing import Any

import lmpatch as lp
from lmpatch.benches import general, rag
from lmpatch.data.rag import Build, RagRecord, build, read_questions, read_rag, write
from lmpatch.methods import cad, ircan, parenting
from lmpatch.methods._parenting_plot import plots
from lmpatch.models.closed_book import closed_book_answers
from lmpatch.record import hardware, now, versions
from lmpatch.settings import parse, resolve

TUNED: dict[str, dict[str, Any]] = {
    "parenting": {},
    "mixed": {"mode": "mixed"},
    "no_boundary": {"boundary": False},
    "no_layer_cue": {"cue": "none"},
    "no_extraction": {"delta": 1.0},
}
"""Runs of the method, the first two before the baselines without training."""
ABLATIONS = ("no_boundary", "no_layer_cue", "no_extraction")
SHORT = ("conflict", "irrelevant")


def main() -> None:
    args = _arguments()
    began = perf_counter()
    out: Path = args.out
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = perf_counter()
        made = work()
        seconds[name] = round(perf_counter() - start, 1)
        print(f"{name}: {seconds[name]} s, {perf_counter() - began:.0f} s in all", flush=True)
        return made

    builder = resolve(Build, parse(Build, args.build))
    if not (out / "sets").exists():
        timed(
            "data",
            lambda: write(build(read_questions(args.squad), builder), out / "sets", source=args.squad, cfg=builder),
        )
    train = read_rag(out / "sets/train.jsonl")
    held = read_rag(out / "sets/held_out.jsonl", part="held_out")
    lm = timed("load", lambda: lp.load(args.model, dtype=args.dtype))
    asked = [r.question for r in train if r.kind == "robustness"] + [r.question for r in held]
    timed("own answers", lambda: closed_book_answers(lm, asked, progress=_told))
    bench = rag.Config(n=args.n)
    for name in ("base", "parenting", "mixed", "ircan", "cad", *ABLATIONS):
        patch = None if name == "base" else timed(name, lambda n=name: _patch(lm, train, n, out, args))
        timed(f"bench {name}", lambda n=name, p=patch: _benched(lm, held, n, p, bench, out))
        _report(out, seconds, args)
    if args.general:
        patch = lp.load_patch(out / "patches/parenting")
        cfg = general.Config(n=args.general_n, windows=16, protocols=("cloze-v1", "perplexity-v1"))
        found = timed(
            "general", lambda: general.run(lm, general.load(args.general), cfg, patch=patch, out=out / "general")
        )
        found.save_html(out / "general.html")
        _report(out, seconds, args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("squad", type=Path)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "parenting")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of parenting, for all runs")
    parser.add_argument("--build", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the data builder")
    parser.add_argument("--n", type=int, default=120, help="items of each condition at most")
    parser.add_argument("--ircan-examples", type=int, default=24)
    parser.add_argument("--general", type=Path, help="folder of general tasks: ability before and after")
    parser.add_argument("--general-n", type=int, default=40, help="records of each general task")
    return parser.parse_args()


def _patch(lm: lp.LM, train: Sequence[RagRecord], name: str, out: Path, args: argparse.Namespace) -> lp.Patch:
    """The patch of one run; one that is there is read."""
    path = out / "patches" / name
    if path.exists():
        return lp.load_patch(path)
    conflicts = [r for r in train if r.variant == "substituted"][: args.ircan_examples]
    records = [
        lp.ContextRecord(r.documents[0], r.question, r.answer, prompt=r.prompt, bare=r.bare, id=r.id) for r in conflicts
    ]
    if name == "cad":
        made: lp.Patch = cad.fit(lm, records, cad.Config())
    elif name == "ircan":
        made = ircan.fit(lm, records, ircan.Config(), progress=_told)
    else:
        work = out / "work" / name
        if name in ABLATIONS:  # the scores of units are the same: the layer cue is multiplied in later
            work.mkdir(parents=True, exist_ok=True)
            for file in (out / "work/parenting").glob("mined-*.safetensors"):
                copy(file, work / file.name)
        settings = parse(parenting.Config, args.set) | TUNED[name]
        made = parenting.fit(lm, train, resolve(parenting.Config, settings), out=work, progress=_told)
    made.save(path)
    return made


def _benched(lm: lp.LM, held: Sequence[RagRecord], name: str, patch: Any, cfg: rag.Config, out: Path) -> None:
    """All conditions for the runs of the main table; the ablations are asked two, in a folder of their own."""
    short = name in ABLATIONS
    chosen = rag.Config(n=cfg.n, conditions=SHORT) if short else cfg
    run_id = "" if patch is None else name
    rag.run(lm, held, chosen, patch=patch, run_id=run_id, out=out / ("ablations" if short else "bench"), progress=_told)


def _report(out: Path, seconds: dict[str, float], args: argparse.Namespace) -> None:
    """parenting.json, pages and pictures of what is there so far."""
    path = out / "parenting.json"
    before = json.loads(path.read_text())["seconds"] if path.exists() else {}
    record: dict[str, Any] = {"made": now(), "versions": versions(), "hardware": hardware(), "model": args.model}
    record |= {"seconds": {**seconds, **{k: max(v, seconds.get(k, 0)) for k, v in before.items()}}, "runs": {}}
    record["minutes"] = round(sum(record["seconds"].values()) / 60, 1)
    for folder in ("bench", "ablations"):
        if (out / folder / "runs.jsonl").exists():
            report = rag.read_report(out / folder)
            report.save_html(out / f"{folder}.html")
            for run in report.runs:
                record["runs"][f"{folder}/{run.name}"] = {m["name"]: m for m in run.record["metrics"]}
    for patch in sorted((out / "patches").glob("*")):
        if patch.name in TUNED:
            loaded = lp.load_patch(patch)
            kept = (
                "types",
                "gamma",
                "parameters",
                "own_answers",
                "rows",
                "mining",
                "validation",
                "stopped",
                "tuning_seconds",
            )
            record.setdefault("patches", {})[patch.name] = {k: loaded.notes[k] for k in kept} | {"bytes": loaded.nbytes}
            if patch.name == "parenting":
                plots(loaded, out)
    path.write_text(json.dumps(record, indent=1) + "\n")
    for name, found in record["runs"].items():
        shown = [
            f"{m} {100 * found[m]['value']:.1f} ± {100 * (found[m]['stderr'] or 0):.1f}"
            for m in ("R_Ad", "R_Ro")
            if m in found
        ]
        print(f"  {name}: {', '.join(shown)}", flush=True)


def _told(done: int, total: int, what: str) -> None:
    if done == total or done % max(1, total // 10) == 0:
        print(f"  {what} {done}/{total}", flush=True)


if __name__ == "__main__":
    main()
