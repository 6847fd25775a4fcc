"""Parenting, asked fairly: does it beat plain fine-tuning, a few-shot prompt, and tuning on the form of answers alone?

    python benchmarks/parenting.py DATA/squad/squad_v2_dev.jsonl.gz --model gemma-3-270m
    python benchmarks/parenting.py DATA/squad/squad_v2_dev.jsonl.gz --model smollm2-135m-instruct

From raw SQuAD, split by article into training, dev and held-out parts, to rows of the bench ``rag``:

- ``none``: the unpatched model, and ``none, K shots``: the same behind K solved examples of the training articles.
- ``cad``, ``ircan``: behind the same examples.
- ``parenting``, ``mixed``, ``plain``: tuned on the three sets; ``format_only``: tuned as ``plain`` is, with as many
  rows, on documents that say what the model says, so that it learns how an answer looks and nothing about whom to
  trust. None of them sees examples. Five seeds each (of A and of the order of rows), on the same items.

Every method gets the same number of tries on dev, judged by R_Ad + R_Ro on the same items; fair/search.py has what is
tried. K comes first. The held-out articles are asked once, under the settings chosen.

First the time is measured and told; --estimate ends there. benchmarks/work/parenting-MODEL gets the sets, a folder per
patch and the bench's rows; benchmarks/results/parenting-MODEL the rows, dev.json (what was tried and chosen) and
patches.json, from which tables/parenting.py makes what the pages print. The same command goes on where it stopped, and
more --seeds may be asked for later. Answers without documents are kept in the user's cache. With --general-n the
general tasks beside SQuAD's folder are asked at last, with and without seed 0 of parenting.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from shutil import copy
from time import perf_counter
from typing import Any

from facts import commit_rows
from fair.control import consistent
from fair.search import PROMPTED, SHOTS, SPACES, Search, Settings, Space
from general import ability
from tables.parenting import parenting_table
from tables.rows import RESULTS, WORK

import lmpatch as lp
from lmpatch.benches import general, rag
from lmpatch.benches.context.examples import behind, chosen, written
from lmpatch.config import parse, resolve
from lmpatch.data.context import InContext
from lmpatch.data.rag.reader import Build, build, read_questions, read_rag, write
from lmpatch.files import replacing
from lmpatch.inference.closed_book import closed_book_answers
from lmpatch.methods.decoding import CAD, METHODS
from lmpatch.methods.ircan import method as ircan
from lmpatch.methods.parenting import method as parenting
from lmpatch.methods.parenting.config import Config
from lmpatch.probes.integrated_gradients import probe as integrated_gradients
from lmpatch.provenance import hash_json

BUILD = {"held_out": 0.4, "dev": 0.2, "held_foreign": 3000, "held_documents": 4}
"""More held-out articles than ``Build`` takes: a small model knows few of their answers, and R_Ro is of those."""
CONDITIONS = ("conflict", "irrelevant")
JUDGED_BY = "R_Ad+R_Ro"
PROBES = 16  # prompts that are timed for the estimate
NOTES = ("types", "correlation", "parameters", "own_answers", "rows", "validation", "stopped", "tuning_seconds")


def main(argv: Sequence[str] | None = None) -> None:
    bench = Bench(_arguments(list(sys.argv[1:] if argv is None else argv)))
    estimate(bench)
    if bench.args.estimate:
        return
    chosen_settings = tune(bench)
    measure(bench, chosen_settings)
    if bench.args.general and bench.args.general_n:
        patch, data = bench.patch("parenting", chosen_settings["parenting"]), general.load(bench.args.general)
        asked = partial(ability, bench.lm, data, patch, "parenting", bench.args.general_n, bench.out / "general", _told)
        bench.timed("general", asked)
    if bench.out == WORK / f"parenting-{bench.args.model}":
        print(parenting_table(bench.args.model))


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("squad", type=Path)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="left out: benchmarks/work/parenting-MODEL")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tries", type=int, default=5, help="settings that each method gets on dev")
    parser.add_argument("--steps", type=int, default=40, help="of tuning, for every method that tunes")
    parser.add_argument("--n", type=int, default=300, help="held-out items of each condition")
    parser.add_argument("--dev-n", type=int, default=100, help="the same on dev")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer; left out: 16, for a chat model 32")
    parser.add_argument("--ircan-examples", type=int, default=16)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of parenting, for all runs")
    parser.add_argument("--build", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the data builder")
    parser.add_argument("--general", type=Path, help="general tasks; left out: the folder that holds SQuAD's folder")
    parser.add_argument("--general-n", type=int, default=0, help="records of each general task; 0: none")
    parser.add_argument("--estimate", action="store_true", help="tell the time it will take, and stop")
    args = parser.parse_args(words)
    around = args.squad.resolve().parent.parent
    args.general = args.general or (around if (around / "general").is_dir() else None)
    args.out = args.out or WORK / f"parenting-{args.model}"
    return args


class Bench:
    """One folder of results: its sets, its model, its patches, its clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out, self.began = args, args.out, perf_counter()
        builder = resolve(Build, BUILD | parse(Build, args.build))
        _claim(self.out / "run.json", self._identity(builder))
        self.sets = self.out / "sets"
        if not self.sets.exists():
            made = self.timed("data", lambda: build(read_questions(args.squad), builder))
            write(made, self.sets, source=args.squad, cfg=builder)
        self.train = read_rag(self.sets / "train.jsonl")
        self.dev, self.held = (rag.load(self.sets / f"{part}.jsonl") for part in ("dev", "held_out"))
        self.lm = self.timed("load", lambda: lp.load(args.model, dtype=args.dtype, device=args.device))

    def _identity(self, builder: Build) -> dict[str, Any]:
        """What decides the numbers."""
        same = ("model", "dtype", "set", "n", "dev_n", "steps", "tries", "max_new_tokens", "ircan_examples")
        found = {name: getattr(self.args, name) for name in same} | {"build": asdict(builder)}
        found["spaces"] = {name: asdict(space) for name, space in (SPACES | PROMPTED | {"none": SHOTS}).items()}
        return found | {"squad": hashlib.sha256(self.args.squad.read_bytes()).hexdigest()}

    def timed(self, name: str, work: Any) -> Any:
        start = perf_counter()
        made = work()
        print(f"{name}: {perf_counter() - start:.1f} s, {perf_counter() - self.began:.0f} s in all", flush=True)
        return made

    @cached_property
    def own(self) -> dict[str, Any]:
        """Question → what the model answers without documents, for all questions of the run."""
        return dict(zip(asked := self.questions, closed_book_answers(self.lm, asked, progress=_told), strict=True))

    @cached_property
    def short(self) -> dict[str, Any]:
        """Training question → what the model answers without documents and without a chat template, as a few words."""
        asked = [r.question for r in self.train if r.variant == "original"]
        lm = self.lm.plain if self.lm.chat else self.lm
        return dict(zip(asked, closed_book_answers(lm, asked, progress=_told), strict=True))

    @property
    def questions(self) -> list[str]:
        """All that are asked without documents."""
        train = [r for r in self.train if r.kind == "robustness" or r.variant == "original"]
        return [*dict.fromkeys(r.question for r in (*train, *self.dev, *self.held))]

    def config(self, n: int, shots: int, few_shot: bool) -> rag.Config:
        """How the bench asks."""
        tokens = self.args.max_new_tokens or (32 if self.lm.chat else 16)
        return rag.Config(n=n, conditions=CONDITIONS, shots=shots, few_shot=few_shot, max_new_tokens=tokens)

    def settings(self, run: str, own: Settings, seed: int = 0) -> Settings:
        """All settings of a tuned run."""
        steps = {"steps": self.args.steps, "validate_every": self.args.steps, "seed": seed}
        return steps | parse(Config, self.args.set) | SPACES[run].fixed | own

    def patch(self, run: str, own: Settings, seed: int = 0, shots: int = 0) -> lp.Patch:
        """The patch of these settings; one that is there is read."""
        full = self.settings(run, own, seed) if run in SPACES else PROMPTED[run].fixed | own
        path = self.out / "patches" / f"{run}-{hash_json([full, shots])[:10]}"
        if path.exists():
            return lp.load_patch(path)
        if run == "cad":
            made: lp.Patch = METHODS["cad"].fit(self.lm, self._conflicts(shots), resolve(CAD, full))
        elif run == "ircan":
            made = self._scaled(full, shots)
        else:
            made = self._tuned(run, full)
        made.save(path)
        return made

    def _conflicts(self, shots: int) -> list[lp.ContextRecord]:
        """Training questions whose document contradicts the truth, behind the examples."""
        shown = self.shown(shots)
        found = [r for r in self.train if r.variant == "substituted"][: self.args.ircan_examples]
        asked = [behind(shown, InContext(r.prompt, r.without_context)) for r in found]
        return [
            lp.ContextRecord(
                r.documents[0], r.question, r.answer, prompt=a.prompt, without_context=a.without_context, id=r.id
            )
            for r, a in zip(found, asked, strict=True)
        ]

    def shown(self, shots: int) -> str:
        """The solved examples, as the bench shows them."""
        return written(chosen(self.train, shots, rag.Config().seed))

    def _scaled(self, settings: Settings, shots: int) -> lp.Patch:
        records, kept = self._conflicts(shots), self.out / f"work/ircan-{shots}.jsonl"
        kept.parent.mkdir(parents=True, exist_ok=True)
        scores = integrated_gradients.run(self.lm, records, integrated_gradients.Config(), out=kept, progress=_told)
        return ircan.fit(self.lm, records, resolve(ircan.Config, settings), scores=scores)

    def _tuned(self, run: str, settings: Settings) -> lp.Patch:
        bare = float(settings.pop("bare", 0.0))
        cfg = resolve(Config, settings)
        records = consistent(self.train, self.short, bare) if run == "format_only" else self.train
        work = self.out / "work" / f"{run}-{hash_json([settings, bare])[:10]}"
        mined = self.out / "work/mined" / hash_json([getattr(cfg, name) for name in parenting.MINING])[:10]
        for folder in (work, mined):
            folder.mkdir(parents=True, exist_ok=True)
        _share(mined, work)
        made = parenting.fit(self.lm, records, cfg, out=work, progress=_told)
        _share(work, mined)
        return made

    def score(self, run: str, own: Settings, shots: int) -> float | None:
        """R_Ad + R_Ro on dev; None where the settings cannot be run."""
        name = f"{run}-{hash_json(own)[:10]}"
        prompted = run in PROMPTED
        try:
            patch = self.timed(name, partial(self.patch, run, own, shots=shots))
        except (lp.Diverged, lp.BadInput) as error:
            if run != "ircan" and not isinstance(error, lp.Diverged):
                raise
            print(f"  {own}: {error}", flush=True)  # ircan: fewer neurons were found than are to be scaled
            return None
        cfg = self.config(self.args.dev_n, shots if prompted else 0, prompted)
        folder = self.out / "dev" / (f"shots-{shots}" if prompted else "plain")
        report = rag.run(self.lm, self.dev, cfg, patch=patch, run_id=name, out=folder, progress=_told)
        return self._number(report, name, own)

    def score_shots(self, own: Settings) -> float | None:
        """The same of the unpatched model behind so many examples."""
        shots = own["shots"]
        cfg = self.config(self.args.dev_n, shots, True)
        report = rag.run(self.lm, self.dev, cfg, out=self.out / f"dev/shots-{shots}", progress=_told)
        return self._number(report, f"none, {shots} shots", own)

    def _number(self, report: Any, name: str, own: Settings) -> float:
        if (found := report.run(name).metric(JUDGED_BY)) is None:
            raise SystemExit(f"{self.args.model} knows no answer of dev, so nothing can be chosen on it.")
        print(f"  {name} {own}: {JUDGED_BY} {100 * found.value:.1f}", flush=True)
        return float(found.value)


def _share(source: Path, target: Path) -> None:
    """Scores of units are the same for all runs that mine alike: what differs comes after."""
    for file in source.glob("mined-*.safetensors"):
        if not (target / file.name).exists():
            copy(file, target / file.name)


def _claim(path: Path, identity: dict[str, Any]) -> None:
    """Make the folder this run's.

    Raises:
        SystemExit: it holds another one.
    """
    identity = json.loads(json.dumps(identity))
    if path.exists():
        known = json.loads(path.read_text())
        if differ := [key for key in identity if identity[key] != known.get(key)]:
            raise SystemExit(f"{path.parent} was made with other values of {', '.join(differ)}. Use another --out.")
    _write(path, identity)


def _write(path: Path, value: Any) -> None:
    with replacing(path) as work:
        work.write_text(json.dumps(value, indent=1) + "\n")


def estimate(bench: Bench) -> float:
    """Time a few prompts and steps and tell the seconds the whole run takes; what is done already is not taken off."""
    args, most = bench.args, max(SHOTS.values)
    shown = bench.shown(SHOTS.values[1])
    unknown = dict.fromkeys((r.question for r in bench.dev), "")
    some = [replace(s, shown=shown) for s in rag.samples(bench.dev, unknown) if s.condition in CONDITIONS][:PROBES]
    cfg = bench.config(args.n, most, True)
    plain = _seconds(lambda: rag.ask(bench.lm, some, cfg)) / len(some)
    few = _seconds(lambda: rag.ask(bench.lm, some, cfg, base=())) / len(some)
    alone = _seconds(lambda: closed_book_answers(bench.lm, bench.questions[:64])) / 64
    step = _step(bench)
    tuned, dev, held, tries = len(SPACES), 2 * args.dev_n, 2 * args.n, args.tries
    mined = args.seeds * 2 * Config().mine_steps * Config().mine_rows / 5 * step
    parts = {
        "answers without documents": alone * len(bench.questions),
        "tuning on dev": tuned * tries * (args.steps * step + dev * plain),
        "prompts, CAD and IRCAN on dev": dev * (3 * (plain + few) + tries * 3 * few),
        "tuning of further seeds": tuned * (args.seeds - 1) * args.steps * step + mined,
        "held-out articles": held * (tuned * args.seeds * plain + plain + 4 * few),
    }
    total: float = sum(parts.values())
    for name, seconds in parts.items():
        print(f"  {name}: {seconds / 60:.0f} minutes")
    print(f"estimate: {total / 60:.0f} minutes in all", flush=True)
    return total


def _seconds(work: Any) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def _step(bench: Bench) -> float:
    """Seconds of a step of plain tuning, the second of three."""
    times: list[float] = []

    def clock(done: int, total: int, what: str) -> None:
        if what == "tuning":
            times.append(perf_counter())

    some = [r for kind in ("adherence", "extraction") for r in [x for x in bench.train if x.kind == kind][:16]]
    cfg = resolve(Config, bench.settings("plain", {"steps": 3, "rows_adherence": 4, "rows_robustness": 0}))
    parenting.fit(bench.lm, some, cfg, progress=clock)
    first, second, *_ = times
    return second - first


def tune(bench: Bench) -> dict[str, Settings]:
    """Choose every setting on the dev articles, by the same number on the same items and with as many tries.

    The few-shot prompt comes first: CAD and IRCAN are asked behind it.
    """
    bench.timed("answers without documents", lambda: bench.own)
    tried: dict[str, Any] = {}
    best: dict[str, Settings] = {}

    def search(run: str, space: Space, score: Any) -> None:
        found = Search(space)
        best[run] = found.run(bench.args.tries, score)
        lines = [{"settings": own, "value": None if value == float("-inf") else value} for own, value in found.tried]
        tried[run] = {"tried": lines, "chosen": best[run], "inside": found.inside()}
        _write(bench.out / "dev.json", {"dev_n": bench.args.dev_n, "steps": bench.args.steps, "methods": tried})

    search("none", SHOTS, bench.score_shots)
    shots = best["none"]["shots"]
    for run, space in SPACES.items():
        search(run, space, partial(_scored, bench, run, 0))
    for run, space in PROMPTED.items():
        search(run, space, partial(_scored, bench, run, shots))
    _keep(bench, bench.out / "dev.json")
    return best


def _scored(bench: Bench, run: str, shots: int, own: Settings) -> float | None:
    return bench.score(run, own, shots)


def measure(bench: Bench, best: dict[str, Settings]) -> None:
    """Every run on the held-out articles; rows are kept after each."""
    shots = best["none"]["shots"]
    order = [("", 0), *((run, 0) for run in (*SPACES, *PROMPTED))]
    order += [(run, seed) for seed in range(1, bench.args.seeds) for run in SPACES]
    notes: dict[str, Any] = {}
    for run, seed in order:
        prompted = run in PROMPTED
        name = run if prompted or not run else f"{run}-{seed}"
        patch = bench.timed(name, partial(bench.patch, run, best[run], seed, shots if prompted else 0)) if run else None
        cfg = bench.config(bench.args.n, shots, prompted)
        ask = partial(rag.run, bench.lm, bench.held, cfg, patch=patch, run_id=name, out=bench.out, progress=_told)
        report = bench.timed(f"bench {name or 'none'}", ask)
        if patch is not None:
            notes[name] = {key: patch.notes[key] for key in NOTES if key in patch.notes} | {"bytes": patch.nbytes}
            _write(bench.out / "patches.json", notes)
            _keep(bench, bench.out / "patches.json")
        commit_rows(bench.out)
        for each in report.runs if patch is None else [report.run(name)]:
            found = [(m, each.metric(m)) for m in ("R_Ad", "R_Ro")]
            told = [f"{m} {100 * x.value:.1f} ± {100 * (x.clustered or x.stderr or 0):.1f}" for m, x in found if x]
            print(f"  {each.name}: {', '.join(told)}", flush=True)


def _keep(bench: Bench, path: Path) -> None:
    """A file of the run beside its rows."""
    if bench.out.is_relative_to(WORK):
        kept = RESULTS / bench.out.relative_to(WORK)
        kept.mkdir(parents=True, exist_ok=True)
        copy(path, kept / path.name)


def _told(done: int, total: int, what: str) -> None:
    if done == total or done % max(1, total // 10) == 0:
        print(f"  {what} {done}/{total}", flush=True)


if __name__ == "__main__":
    main()
