"""Whom does a model believe, its context or its memory? IRCAN beside everything it is compared with, and its ablations.

    python benchmarks/ircan.py DATA --task memotrap
    python benchmarks/ircan.py DATA --task cose --model smollm2-135m-instruct
    python benchmarks/ircan.py DATA --task ecare --model smollm2-135m-instruct

DATA holds memotrap/completion_dev and _test, or kre/cose_dev and _test (.jsonl or .jsonl.gz). Everything is chosen on
the same records of the dev half, by their balance of context use (BCU): the mean of the share answered as their context
says, and the share that under another record's context is answered as the unpatched model does without any. So are
neurons and (h, beta) of IRCAN, alone and under CAD, neurons and factor of SCoNE, heads and strength of ITI, layers and
factor of ParamMute, and the strength of each decoding rule; for questions with options the prompt's ending is chosen by
the first share. Then each is measured once on the test half by the bench ``memotrap`` or ``kre``. IRCAN, SCoNE and
ParamMute act only where a prompt carries a context, so plain text keeps its perplexity to the bit; --when always and
--objective accuracy do as published. What is tried on dev is counted in --dev-dtype; credits are fp32. The test half
is asked in --dtype. At last the general tasks in DATA are asked with and without IRCAN's patch, in --dev-dtype.

Works in benchmarks/work/ircan-TASK (ircan-TASK-MODEL for any model but gemma-3-270m): the bench's rows, dev.json (what
was tried on dev), results.json and .md, report.html and plots, IRCAN's patch, and rows and page of the general tasks.
Rows, records and chosen.json (what was tried and chosen) are kept in benchmarks/results under the same name, from which
tables/ makes what the pages print. The same command goes on where it stopped; Ctrl-C loses what is under way: 25
records of attribution, 64 records of one setting or grid on dev, or 64 records of one run on test.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from html import escape
from pathlib import Path
from time import perf_counter
from typing import Any

from facts import commit_rows, markdown
from general import ability
from safetensors.torch import load_file, save_file
from tables.rows import RESULTS, WORK

import lmpatch as lp
from lmpatch.benches import general, kre, memotrap
from lmpatch.benches.context.prompts import worded
from lmpatch.data.context import ContextRecord, read_context
from lmpatch.locate.neurons import drawn, ranked, scaling
from lmpatch.methods import iti, param_mute, scone
from lmpatch.methods.ircan.grid import accuracies, foreign, own_answers
from lmpatch.methods.ircan.method import best_of, grid
from lmpatch.models.lm import LM
from lmpatch.models.units import Neuron
from lmpatch.patches.ledger import apply
from lmpatch.patches.patch import Patch
from lmpatch.patches.weight.delta import When
from lmpatch.probes.integrated_gradients import probe as integrated_gradients
from lmpatch.probes.integrated_gradients.probe import attributions_of, cases, kept
from lmpatch.provenance import hardware, hash_json, now, versions

FILES = {"memotrap": "memotrap/completion", "cose": "kre/cose", "ecare": "kre/ecare"}
H, BETA = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64), (1.25, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0)
SCONE = ((3, 5, 10, 16, 32), (1.5, 2.0, 3.0, 5.0, 7.0))
HEADS, PUSH = (2, 4, 8, 16), (1.0, 3.0, 5.0, 10.0, 15.0)
MUTED, QUIET = (2, 3, 5), (0.75, 0.5, 0.25, 0.0)
RULES: dict[str, tuple[str, tuple[float, ...]]] = {  # method -> its setting, and what is tried
    "cad": ("alpha", (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)),
    "adacad": ("floor", (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5)),
    "coiecd": ("alpha", (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)),
    "power": ("tau", (0.9, 0.75, 0.5, 0.25, 0.1)),
    "grd": ("lam", (0.0, 0.25, 0.5, 0.75, 1.0)),
    "arr": ("", (0.0,)),
}
SUFFIXES = ("Answer: ", "Answer: \n", "The correct answer is ", "Answer: \nThe correct option is \n**")
FEW = 3  # seeds of a control that is slow to make
PART, BLOCK = 25, 64  # dev records of attribution, and of a grid, that are kept as one
WORDINGS = ("base", "attr", "instr", "opin", "instr+opin", "based_on", "based_on_formatted", "utilizing_formatted")
OBJECTIVES = {
    "bcu": "the mean, over {n} dev records, of the share answered as their own context says and the share answered, "
    "under another record's, as the unpatched model does without any; the same records for every method",
    "accuracy": "the share of {n} dev records answered as their own context says; the same records for every method",
}
Setting = tuple[int, float]


class Dev:
    """What was tried on dev, kept as it comes."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.kept: dict[str, Any] = {"identity": identity}
        if path.exists():
            self.kept = json.loads(path.read_text())
            if self.kept["identity"] != identity:
                raise SystemExit(f"{path} was made of other records or another model. Use another --out.")

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The value under that name, made and kept where it is not there yet."""
        if name not in self.kept:
            start = perf_counter()
            self.kept[name] = {"value": make(), "seconds": 0.0}
            self.kept[name]["seconds"] = round(perf_counter() - start, 1)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.kept, indent=1))
            partial.replace(self.path)
        return self.kept[name]["value"]


def told(done: int, total: int, what: str) -> None:
    print(f"\r{now()[11:19]}  {what}: {done} of {total}   ", end="\n" if done == total else "", flush=True)


def right(
    lm: LM,
    records: Sequence[ContextRecord],
    neurons: Sequence[Neuron],
    settings: Sequence[Setting],
    on: Sequence[Patch],
    words: Sequence[str] | None = None,
    when: When = "always",
) -> list[int]:
    """How many records each setting answers right, or with these words, with these patches on the model."""
    with ExitStack() as stack:
        for patch in on:
            stack.enter_context(apply(lm, patch))
        found = accuracies(lm, records, neurons, settings, words=words, when=when, progress=told).tolist()
    return [round(share * len(records)) for share in found]


def right_one(lm: LM, records: Sequence[ContextRecord], *on: Patch) -> int:
    """The same of the model with these patches as it is."""
    return right(lm, records, [], [(0, 1.0)], on)[0]


class Study:
    """Everything that is chosen on dev, and the patches that follow."""

    def __init__(
        self,
        lm: LM,
        fast: LM,
        tested: LM,
        dev: list[ContextRecord],
        kept: Dev,
        args: argparse.Namespace,
        folder: Path,
    ) -> None:
        self.lm, self.fast, self.tested, self.dev, self.kept, self.folder = lm, fast, tested, dev, kept, folder
        self.options: dict[str, Any] = {}
        """Of the bench, chosen on dev."""
        if dev[0].options:
            self.options = {"suffix": self.suffix()}
            self.dev = [worded(record, "plain", **self.options) for record in dev]
        self.bench: Any = kre if dev[0].options else memotrap
        self.when: When = args.when
        self.asked: list[ContextRecord] = []
        """With another record's context; none where that takes no part."""
        self.words: list[str] = []
        """What the unpatched model answers there without any."""
        if args.objective == "bcu":
            self.asked = foreign(self.dev)
            self.words = kept.once("own answers", partial(own_answers, fast, self.asked))
        self.tables: dict[str, list[list[float]]] = {}
        """Of each method every setting with what it is chosen by."""
        self.shares: dict[str, list[list[float]]] = {}
        """The same with both shares: answered as told, and as without a context."""
        self.chosen: dict[str, Setting] = {}
        self.named = self.credited(args.examples)

    def suffix(self) -> str:
        """The ending of the prompt with which the unpatched model follows most contexts."""
        found = []
        for suffix in SUFFIXES:
            ended = [worded(record, "plain", suffix=suffix) for record in self.dev]
            found.append(self.kept.once(f"suffix {suffix!r}", partial(right_one, self.fast, ended)))
        return SUFFIXES[found.index(max(found))]

    def credited(self, count: int) -> dict[str, list[list[tuple[int, int, float]]]]:
        """The neurons that each record names for IRCAN and for SCoNE, which share their passes."""
        whole: dict[str, list[list[tuple[int, int, float]]]] = {"ircan": [], "scone": []}
        used = self.dev[:count]
        for start in range(0, len(used), PART):
            found = self.kept.once(f"credits {start}", partial(self.credits, used, start))
            for name, part in found.items():
                whole[name] += part
            told(min(start + PART, len(used)), len(used), "crediting neurons")
        return whole

    def credits(self, used: Sequence[ContextRecord], start: int) -> dict[str, Any]:
        """The same of one part."""
        own, theirs = integrated_gradients.Config(), scone.Config()
        first = max(0, start - theirs.window)  # SCoNE compares a record with those before it
        parts = list(attributions_of(self.lm, cases(self.lm, used[first : start + PART]), [own, theirs]))
        lists: dict[str, list[Any]] = {
            "ircan": [credit.neurons for part, _ in parts for credit in kept(part, own)],
            "scone": list(scone.named((credit for _, part in parts for credit in part.scores), theirs)),
        }
        return {name: found[start - first :] for name, found in lists.items()}

    def gridded(
        self, name: str, named: str, settings: list[Setting], on: Sequence[Patch] = ()
    ) -> tuple[list[Neuron], float]:
        """The best neurons and their factor. Kept 64 records at a time."""
        neurons = [neuron for neuron, _ in ranked(self.named[named])]
        settings = [(h, factor) for h, factor in settings if h <= len(neurons)]
        if len(settings) < 2:
            raise SystemExit(f"the records name {len(neurons)} neurons for {named}: too few to choose from.")
        found = self.scored(name, neurons, settings, on, hash_json(settings)[:8])
        self.tables[name] = self.table(name, settings, found)
        score = [sum(shares) / len(shares) for shares in found[1:]]
        self.chosen[name] = h, factor = best_of(settings[1:], score)
        return neurons[:h], factor

    def scored(
        self, name: str, neurons: Sequence[Neuron], settings: Sequence[Setting], on: Sequence[Patch], mark: str
    ) -> list[list[float]]:
        """Of each setting the share answered as told, and with ``asked`` the other one. Kept 64 records at a time."""
        found: list[list[float]] = [[] for _ in settings]
        for label, records, words in (("", self.dev, None), (" foreign", self.asked, self.words)):
            total = [0] * len(settings)
            for start in range(0, len(records), BLOCK):
                block, said = records[start : start + BLOCK], words and words[start : start + BLOCK]
                count = partial(right, self.fast, block, neurons, settings, on, said, self.when)
                part = self.kept.once(f"{name}{label} {start} {mark}".rstrip(), count)
                total = [t + n for t, n in zip(total, part, strict=True)]
            for shares, n in zip(found, total, strict=True):
                shares += [n / len(records)] if records else []
        return found

    def table(self, name: str, settings: Sequence[Setting], found: Sequence[Sequence[float]]) -> list[list[float]]:
        self.shares[name] = [[*s, *(round(x, 5) for x in own)] for s, own in zip(settings, found, strict=True)]
        return [[*s, round(sum(own) / len(own), 5)] for s, own in zip(settings, found, strict=True)]

    def best(self, name: str, settings: list[Setting], make: Callable[[int, float], Patch]) -> Setting:
        """The setting whose patch is the best; of equal ones the first, which is the gentlest."""
        found = [self.scored(f"{name} {k} {x}", [], [(0, 1.0)], [make(k, x)], "")[0] for k, x in settings]
        self.tables[name] = self.table(name, settings, found)
        self.chosen[name] = best_of(settings, [sum(shares) / len(shares) for shares in found])
        return self.chosen[name]

    def scaled(self, method: str, neurons: list[Neuron], factor: float, **more: Any) -> Patch:
        notes = {"neurons": [[n.layer, n.index] for n in neurons], "factor": factor, **more}
        return scaling(self.lm, neurons, factor, when=self.when, method=method, config=notes, notes=notes)

    @cached_property
    def ircan(self) -> tuple[list[Neuron], float]:
        return self.gridded("ircan", "ircan", grid(H, BETA))

    def of_ircan(self, factor: float | None = None, seed: int | None = None) -> list[Patch]:
        """The best setting; with a seed random neurons instead, with a factor another one."""
        neurons, beta = self.ircan
        chosen = neurons if seed is None else drawn(self.lm, len(neurons), seed)
        return [self.scaled("ircan", chosen, beta if factor is None else factor, seed=seed)]

    def of_ircan_cad(self) -> list[Patch]:
        """IRCAN chosen under the best CAD."""
        (cad,) = self.of_rule("cad")
        return [self.scaled("ircan", *self.gridded("ircan + cad", "ircan", grid(H, BETA), [cad])), cad]

    def of_scone(self) -> list[Patch]:
        return [self.scaled("scone", *self.gridded("scone", "scone", grid(*SCONE)))]

    def of_rule(self, method: str) -> list[Patch]:
        """A decoding rule with its best setting."""
        name, values = RULES[method]

        def make(_: int, value: float) -> Patch:
            settings: dict[str, Any] = {name: value} if name else {}
            return lp.fit(self.lm, method, self.dev[:1], **settings)

        return [make(*self.best(method, [(0, value) for value in values], make))]

    @cached_property
    def heads(self) -> iti.HeadProbes:
        """What every head tells about dev's answers."""
        path = self.folder / f"heads-{hash_json(self.kept.kept['identity'])[:12]}.safetensors"
        if not path.exists():
            found = iti.observe(self.lm, self.dev, iti.Config(examples=len(self.dev)), progress=told)
            whole = {"accuracy": found.accuracy, "loss": found.loss}
            whole |= {f"{kind} direction": x.contiguous() for kind, x in found.directions.items()}
            whole |= {f"{kind} spread": x.contiguous() for kind, x in found.spreads.items()}
            partial_ = path.with_suffix(".partial")
            save_file(whole, partial_)
            partial_.replace(path)
        have = load_file(path)
        kinds: tuple[iti.Direction, ...] = ("probe", "mass_mean")
        directions, spreads = ({kind: have[f"{kind} {what}"] for kind in kinds} for what in ("direction", "spread"))
        return iti.HeadProbes(have["accuracy"], have["loss"], directions, spreads)

    def of_iti(self, direction: iti.Direction, seed: int | None = None) -> list[Patch]:
        """Heads and strength chosen on dev; with a seed as many random heads instead."""

        def make(k: int, push: float, seed: int | None = None) -> Patch:
            cfg = iti.Config(heads=k, strength=push, direction=direction, control_seed=seed)
            return iti.fit(self.lm, self.dev, cfg, probes=self.heads)

        settings = [(k, push) for k in HEADS if k <= self.heads.accuracy.numel() for push in PUSH]
        return [make(*self.best(f"iti {direction}", settings, make), seed)]

    def of_param_mute(self, seed: int | None = None) -> list[Patch]:
        """Layers and factor chosen on dev, those first that work harder over memory's answers; or random layers."""
        cfg = param_mute.Config(responses="given", when=self.when)

        def order() -> list[int]:
            notes = param_mute.fit(self.lm, self.dev, cfg, progress=told).notes
            more = [u - f for u, f in zip(notes["unfaithful"], notes["faithful"], strict=True)]
            return sorted(range(len(more)), key=lambda layer: -more[layer])

        layers = self.kept.once("param_mute layers", order)

        def make(k: int, factor: float) -> Patch:
            return param_mute.fit(self.lm, self.dev[:1], replace(cfg, layers=tuple(layers[:k]), factor=factor))

        settings = [(k, factor) for k in MUTED if k <= len(layers) for factor in QUIET]
        k, factor = self.best("param_mute", settings, make)
        if seed is not None:
            layers = random.Random(seed).sample(layers, k)
        return [make(k, factor)]

    def asked_by_bench(self, name: str, patches: list[Patch]) -> None:
        """What the bench itself says of a winner on dev: the grid only counts what it can tell."""
        cfg = self.bench.Config(baselines=(), irrelevant=False, **self.options)

        def ask() -> float:
            report = self.bench.run(
                self.tested, self.dev, cfg, patch=patches, run_id=name, out=self.folder / "dev", progress=told
            )
            return float(report.metrics()[name]["acc"].value)

        self.kept.once(f"{name} asked {self.tested.dtype}", ask)


def rows(study: Study, seeds: int) -> list[tuple[str, Callable[[], list[Patch]], dict[str, Any]]]:
    """(name, how its patches are made, settings of the bench) of every row, the cheap and the telling ones first.

    Args:
        seeds: of the random controls.
    """
    alone = {"irrelevant": False}
    found: list[tuple[str, Callable[[], list[Patch]], dict[str, Any]]] = [
        ("ircan", study.of_ircan, {}),
        ("cad", partial(study.of_rule, "cad"), {}),
        ("ircan + cad", study.of_ircan_cad, {}),
        *((method, partial(study.of_rule, method), {}) for method in RULES if method != "cad"),
        ("scone", study.of_scone, {}),
        ("param_mute", study.of_param_mute, {}),
        ("iti mass_mean", partial(study.of_iti, "mass_mean"), {}),
        ("iti probe", partial(study.of_iti, "probe"), {}),
        ("ErCAN", partial(study.of_ircan, 0.0), alone),
    ]
    for seed in range(seeds):
        found.append((f"ERN {seed}", partial(study.of_ircan, None, seed), alone))
        found.append((f"ErRN {seed}", partial(study.of_ircan, 0.0, seed), alone))
    for seed in range(min(seeds, FEW)):
        found.append((f"iti random {seed}", partial(study.of_iti, "mass_mean", seed), alone))
        found.append((f"param_mute random {seed}", partial(study.of_param_mute, seed), alone))
    return found


def measure(test: list[ContextRecord], study: Study, args: argparse.Namespace, folder: Path) -> Any:
    """Every row on test. The unpatched model and the wordings are asked once for all of them."""
    config = partial(study.bench.Config, n=args.n, batch_size=args.batch, **study.options)
    wordings = WORDINGS[1:] if args.task == "memotrap" else WORDINGS  # of a completion, base is the plain wording
    ask = partial(study.bench.run, study.tested, test, data_name=args.task, out=folder, progress=told)
    report = ask(config(baselines=wordings))
    for number, (name, make, settings) in enumerate(rows(study, args.seeds), 1):
        start = perf_counter()
        patches = make()  # also of a row that is there: its tables belong to the report
        if name in ("ircan", "ircan + cad", "scone"):
            study.asked_by_bench(name, patches)
        if any(run.name == name and len(run.parts) == run.record["planned"] for run in report.runs):
            continue
        report = ask(config(baselines=(), **settings), patch=patches, run_id=name)
        numbers = {key: round(metric.value, 4) for key, metric in report.run(name).metrics().items()}
        print(f"{name}: {numbers} in {perf_counter() - start:.0f} s", flush=True)
        if number % 5 == 0:
            write(report, study, args, folder)
    return report


def other_tasks(study: Study, args: argparse.Namespace, folder: Path) -> None:
    """What IRCAN does to them."""
    (patch,) = study.of_ircan()
    if not (folder / "patch").exists():
        patch.save(folder / "patch")
    ability(study.fast, general.load(args.data), patch, "ircan", args.general_n, folder / "general", told)


def mean_of(report: Any, prefix: str) -> dict[str, float]:
    """Mean and standard deviation over the seeds of a control."""
    found = [run.metrics()["acc"].value for run in report.runs if run.name.startswith(f"{prefix} ")]
    middle = sum(found) / len(found)
    spread = (sum((x - middle) ** 2 for x in found) / max(1, len(found) - 1)) ** 0.5
    return {"acc": middle, "sd_over_seeds": spread, "seeds": len(found)}


def write(report: Any, study: Study, args: argparse.Namespace, folder: Path) -> None:
    """results.json, the plots, and the page with both."""
    numbers = {
        run.name: {name: vars(metric) for name, metric in run.metrics().items()}
        | {"differences": {name: vars(metric) for name, metric in report.differences(run.name).items()}}
        for run in report.runs
    }
    prefixes = ("ERN", "ErRN", "iti random", "param_mute random")
    controls = {p: mean_of(report, p) for p in prefixes if any(r.name.startswith(f"{p} ") for r in report.runs)}
    objective = OBJECTIVES[args.objective].format(n=len(study.dev))
    whole = {
        "made": now(), "model": study.lm.name, "dtype": args.dtype, "task": args.task, "versions": versions(),
        "hardware": hardware(), "dev_dtype": args.dev_dtype, "objective": objective, "dev_records": len(study.dev),
        "when": study.when, "shares": study.shares,
        "bench": study.options,
        "chosen": study.chosen, "tables": study.tables, "dev": study.kept.kept,
        "controls": controls, "runs": numbers,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    (folder / "results.md").write_text(listed(report, study, controls))
    plots = draw(report, study, controls, folder)
    page = report.save_html(folder / "report.html").read_text(encoding="utf-8")
    pictures = "".join(
        f'<figure><figcaption>{escape(path.stem)}</figcaption><img alt="{escape(path.stem)}" style="width:100%" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for path in plots
    )
    said = f"<p>Every setting was chosen by {escape(objective)}.</p>"
    asked = [
        (name, study.kept.kept.get(f"{name} asked {study.tested.dtype}")) for name in ("ircan", "ircan + cad", "scone")
    ]
    said += "".join(
        f"<p>{name}, asked by the bench on dev: {100 * one['value']:.1f} %.</p>" for name, one in asked if one
    )
    page = page.replace(
        "</body>", f'<h2>Neurons, settings, ablations</h2>{said}<div class="plots">{pictures}</div></body>'
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


def keep_chosen(folder: Path, kept: Path) -> None:
    """What was tried on dev and chosen, without what rows give."""
    whole = json.loads((folder / "results.json").read_text())
    chosen = {key: value for key, value in whole.items() if key not in ("dev", "controls", "runs")}
    (kept / "chosen.json").write_text(json.dumps(chosen) + "\n")


def listed(report: Any, study: Study, controls: dict[str, dict[str, float]]) -> str:
    """What readers look for, as Markdown in %: ± one standard error, of controls the s.d. over seeds."""
    head = ["run", "chosen on dev", "ACC", "difference", "SR", "kept with another's context", "BCU"]
    lines = []
    for run in report.runs:
        if any(run.name.startswith(f"{prefix} ") for prefix in controls):
            continue
        own, moved = run.metrics(), report.differences(run.name)
        cells = [shown(own.get("acc")), shown(moved.get("acc")) if run.name != "none" else ""]
        cells += [shown(own.get(name)) for name in ("sr", "robustness", "bcu")]
        chosen = study.chosen.get(run.name, ())[run.name in RULES :]
        lines.append([run.name, ", ".join(f"{x:g}" for x in chosen), *cells])
    for name, mean in controls.items():
        cell = f"{100 * mean['acc']:.1f} ± {100 * mean['sd_over_seeds']:.1f}"
        lines.append([f"{name}, {mean['seeds']:.0f} seeds", "", cell, "", "", "", ""])
    return markdown(head, lines)


def shown(metric: Any) -> str:
    return f"{100 * metric.value:.1f} ± {100 * (metric.stderr or 0):.1f}" if metric else ""


def draw(report: Any, study: Study, controls: dict[str, dict[str, float]], folder: Path) -> list[Path]:
    """Where the neurons are, what h and beta do on dev, what erasing and chance do on test."""
    from matplotlib.figure import Figure

    made = []

    def figure(name: str, width: float = 6.0) -> Any:
        made.append((folder / f"{name}.png", Figure(figsize=(width, 3.4), layout="constrained")))
        return made[-1][1].add_subplot()

    layers = range(study.lm.layout.n_layers)
    named, mass = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0.0)
    for neurons in study.named["ircan"]:
        for layer, _, score in neurons:
            named[layer] += 1
            mass[layer] += score
    axes = figure("neurons-by-layer")
    for shift, counts, label in ((-0.2, named, "candidates named"), (0.2, mass, "score mass")):
        total = sum(counts.values()) or 1
        axes.bar([layer + 1 + shift for layer in layers], [counts[i] / total for i in layers], 0.4, label=label)
    axes.set(
        xlabel="layer",
        ylabel="share",
        xticks=[layer + 1 for layer in layers],
        title=f"context-aware neurons, {len(study.named['ircan'])} dev records",
    )
    axes.legend()

    (_, _, before), *table = study.tables["ircan"]
    h, beta = len(study.ircan[0]), study.ircan[1]
    tables = {
        "accuracy-by-beta": ("beta", {f"h = {h}": [(b, a) for k, b, a in table if k == h]}),
        "accuracy-by-h": ("h", {f"beta = {beta:g}": [(k, a) for k, b, a in table if b == beta]}),
        "accuracy-by-tau": ("tau", {"fixed tau": sorted(
            [(1.0, before)] + [(x, a) for _, x, a in study.tables.get("power", [])]
            + [(1 + x, a) for _, x, a in study.tables.get("cad", [])]
        )}),
    }  # fmt: skip
    for direction in ("mass_mean", "probe"):
        heads = study.tables.get(f"iti {direction}", [])
        by_k = {
            f"K = {k:g}": [(x, a) for other, x, a in heads if other == k] for k in sorted({row[0] for row in heads})
        }
        tables[f"iti-{direction}"] = ("alpha", by_k)
    for name, (label, lines) in tables.items():
        axes = figure(name)
        for title, line in lines.items():
            axes.plot(*zip(*line, strict=True), marker="o", label=title)
        axes.axhline(before, ls="--", color="grey", label="unpatched")
        axes.set(xlabel=label, ylabel="BCU on dev" if study.asked else "accuracy on dev")
        axes.grid(alpha=0.3)
        axes.legend()

    bars = [("unpatched", "none"), ("IRCAN", "ircan"), ("ErCAN", "ErCAN")]
    found = [(label, report.metrics()[name]["acc"]) for label, name in bars if any(r.name == name for r in report.runs)]
    drawn_bars = [(label, metric.value, metric.stderr or 0.0) for label, metric in found]
    for name, c in controls.items():
        drawn_bars.append((name.replace(" ", "\n") + f",\n{c['seeds']} seeds", c["acc"], c["sd_over_seeds"]))
    axes = figure("ablations", 7.0)
    labels, values, errors = zip(*drawn_bars, strict=True)
    axes.bar(labels, values, yerr=errors, color=[f"C{i}" for i in range(len(labels))])
    axes.set(ylabel="ACC on test", title="error bars: s.e. over records; of controls, s.d. over seeds")
    axes.tick_params(axis="x", labelsize=8)

    axes = figure("pareto", 7.0)
    for run in report.runs:
        numbers, wording = run.metrics(), run.record["baseline"] and run.name != "none"
        if "robustness" in numbers:
            point = numbers["acc"].value, numbers["robustness"].value
            axes.plot(*point, "o", color="lightgrey" if wording else "tab:blue", zorder=1 if wording else 2)
            axes.annotate("" if wording else run.name, point, fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.plot([], [], "o", color="lightgrey", label="unpatched, other wordings")
    axes.legend()
    axes.margins(x=0.15)
    axes.set(xlabel="faithfulness: ACC with its context", ylabel="robustness: kept with another's")
    axes.grid(alpha=0.3)
    for path, drawing in made:
        drawing.savefig(path, dpi=140)
    return [path for path, _ in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--task", choices=FILES, default="memotrap")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the test half")
    parser.add_argument("--dev-dtype", choices=("float32", "bfloat16"), default="bfloat16", help="what is tried on dev")
    parser.add_argument("--objective", choices=OBJECTIVES, default="bcu", help="by which settings are chosen")
    parser.add_argument("--when", choices=("context", "always"), default="context", help="when patched neurons act")
    parser.add_argument("--examples", type=int, default=100, help="dev records on which neurons are found")
    parser.add_argument("--dev", type=int, help="dev records on which every method is tuned; default: every one")
    parser.add_argument("--n", type=int, help="test records, chosen by hash; default: every one")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=10, help="of the random controls; 0: none")
    parser.add_argument("--general-n", type=int, default=100, help="records of each general task; 0: none")
    parser.add_argument("--out", type=Path, help="folder; default: work/ircan-TASK beside this file")
    args = parser.parse_args()
    other = "" if args.model == "gemma-3-270m" else f"-{Path(args.model).name}"
    folder: Path = args.out or WORK / f"ircan-{args.task}{other}"
    folder.mkdir(parents=True, exist_ok=True)
    dev, test = (read_context(_file(args.data, f"{FILES[args.task]}_{half}")) for half in ("dev", "test"))
    made = {
        dtype: lp.load(args.model, device=args.device, dtype=dtype) for dtype in {"float32", args.dtype, args.dev_dtype}
    }
    lm, fast = made["float32"], made[args.dev_dtype]
    dev = dev[: args.dev]
    identity = {"model": lm.fingerprint(), "dev": hash_json([[r.prompt, r.answer, r.memory] for r in dev])}
    identity["examples"] = args.examples
    identity |= {"objective": args.objective, "when": args.when, "dev_dtype": args.dev_dtype}
    study = Study(lm, fast, made[args.dtype], dev, Dev(folder / "dev.json", identity), args, folder)
    report = measure(test, study, args, folder)
    write(report, study, args, folder)
    if args.general_n:
        other_tasks(study, args, folder)
    if folder.is_relative_to(WORK):
        commit_rows(folder)
        keep_chosen(folder, RESULTS / folder.relative_to(WORK))
    print(f"results in {folder}: report.html, results.json and plots")


def _file(folder: Path, name: str) -> Path:
    found = next((path for end in (".jsonl.gz", ".jsonl") if (path := folder / f"{name}{end}").is_file()), None)
    if found is None:
        raise SystemExit(
            f"no {folder / name}.jsonl or .jsonl.gz. Give the folder that holds {name.partition('/')[0]}/."
        )
    return found


if __name__ == "__main__":
    main()
