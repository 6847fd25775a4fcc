"""Whom does a model believe, its context or its memory? IRCAN beside everything it is compared with, and its ablations.

    python benchmarks/ircan.py DATA --task memotrap
    python benchmarks/ircan.py DATA --task cose

DATA holds memotrap/completion_dev and _test, or kre/cose_dev and _test (.jsonl or .jsonl.gz). Everything is chosen on
the dev half: neurons and (h, beta) of IRCAN, neurons and factor of SCoNE, heads and strength of ITI, layers and factor
of ParamMute. Then each is measured once on the test half by the bench ``memotrap`` or ``kre``. fp32.

Writes into benchmarks/results/ircan-TASK: the bench's rows, scores.jsonl (attribution), dev.json (what was tried on
dev), results.json, report.html and plots. The same command goes on where it stopped; Ctrl-C loses what is under way:
a few records of attribution, one setting on dev (of IRCAN's grid 64 records), or 64 records of one run on test.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from html import escape
from pathlib import Path
from time import perf_counter
from typing import Any

import lmpatch as lp
from lmpatch.benches import kre, memotrap
from lmpatch.data.context import ContextRecord, read_context
from lmpatch.methods import iti, param_mute, scone
from lmpatch.methods._ircan_grid import accuracies
from lmpatch.methods._neurons import drawn, ranked, scaling
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import apply
from lmpatch.patches.patch import Patch
from lmpatch.probes import integrated_gradients
from lmpatch.probes._scores import Scores
from lmpatch.record import hardware, hash_json, now, versions
from lmpatch.units.address import Neuron

RESULTS = Path(__file__).parent / "results"
FILES = {"memotrap": "memotrap/completion", "cose": "kre/cose", "ecare": "kre/ecare"}
H, BETA = (1, 2, 4, 8, 12, 16), (2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0)
SCONE = ((3, 5, 10), (3.0, 5.0, 7.0))
HEADS, PUSH = (2, 4, 8, 16), (1.0, 3.0, 5.0, 10.0, 15.0)
MUTED, QUIET = (2, 3, 5), (0.0, 0.25, 0.5, 0.75)
SEEDS = range(10)
BLOCK = 64  # dev records of the grid that are kept as one
WORDINGS = ("base", "attr", "instr", "opin", "instr+opin", "based_on", "based_on_formatted", "utilizing_formatted")
Settings = list[tuple[int, float]]


class Dev:
    """What was tried on dev, kept as it comes."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.kept = path, {"identity": identity}
        if path.exists():
            self.kept = json.loads(path.read_text())
            if self.kept["identity"] != identity:
                raise SystemExit(
                    f"{path} was made of other records, another model or other settings. Use another --out."
                )

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


def table_of(
    lm: LM, records: Sequence[ContextRecord], neurons: Sequence[Neuron], settings: Settings
) -> list[list[float]]:
    """[h, beta, accuracy] of every setting; one pass, states below the lowest scaled block computed once."""
    found = accuracies(lm, records, neurons, settings, progress=told).tolist()
    return [[h, beta, round(a, 5)] for (h, beta), a in zip(settings, found, strict=True)]


def alone(lm: LM, records: Sequence[ContextRecord], patch: Patch) -> float:
    """Accuracy of one patch by the same measure."""
    with apply(lm, patch, mount="side"):
        return round(float(accuracies(lm, records, [], [(0, 1.0)])[0]), 5)


def best_of(table: Sequence[Sequence[float]]) -> tuple[int, float]:
    """The setting with the highest accuracy; of equal ones the first, which is the gentlest."""
    h, beta, _ = max(table, key=lambda row: row[2])
    return int(h), beta


class Study:
    """Everything that is chosen on dev, and the patches that follow."""

    def __init__(self, lm: LM, dev: list[ContextRecord], kept: Dev, scores: Scores, args: argparse.Namespace) -> None:
        self.lm, self.dev, self.kept, self.scores = lm, dev, kept, scores
        self.gridded, self.tuned = dev[: args.grid], dev[: args.tune]
        self.neurons = [neuron for neuron, _ in ranked(credit.neurons for credit in scores.records)]
        if not self.neurons:
            raise SystemExit("no record names a neuron: the contexts raise no answer.")

    def grid(self) -> list[list[float]]:
        """IRCAN's grid on dev; its first row is the model as it is. Kept 64 records at a time."""
        settings = [(0, 1.0), *((h, beta) for h in H if h <= len(self.neurons) for beta in BETA)]
        total = [0.0] * len(settings)
        for start in range(0, len(self.gridded), BLOCK):
            block = self.gridded[start : start + BLOCK]
            part = self.kept.once(
                f"ircan {start}", lambda block=block: table_of(self.lm, block, self.neurons[: max(H)], settings)
            )
            total = [t + row[2] * len(block) for t, row in zip(total, part, strict=True)]
        shares = [round(t / len(self.gridded), 5) for t in total]
        return [[h, beta, share] for (h, beta), share in zip(settings, shares, strict=True)]

    def of_ircan(self, factor: float | None = None, seed: int | None = None) -> Patch:
        """The best setting; with a seed random neurons instead, with a factor another one."""
        h, beta = best_of(self.grid()[1:])
        beta = beta if factor is None else factor
        chosen = self.neurons[:h] if seed is None else drawn(self.lm, h, seed)
        notes = {"neurons": [[n.layer, n.index] for n in chosen], "h": h, "beta": beta, "seed": seed}
        return scaling(self.lm, chosen, beta, method="ircan", config=notes, notes=notes)

    def of_scone(self) -> Patch:
        """Neurons and factor chosen on dev."""
        most = max(SCONE[0])

        def find() -> Any:
            patch = scone.fit(self.lm, self.dev, scone.Config(neurons=most), progress=told)
            return [[layer, index] for layer, index, _ in patch.notes["neurons"]]

        found = [Neuron(*pair) for pair in self.kept.once("scone neurons", find)]
        settings = [(k, factor) for k in SCONE[0] for factor in SCONE[1]]
        k, factor = best_of(self.kept.once("scone", lambda: table_of(self.lm, self.tuned, found, settings)))
        notes = {"neurons": [[n.layer, n.index] for n in found[:k]], "factor": factor}
        return scaling(self.lm, found[:k], factor, method="scone", config=notes, notes=notes)

    @cached_property
    def heads(self) -> iti.Found:
        """What every head tells about dev's answers."""
        found = iti.observe(self.lm, self.dev, iti.Config(), progress=told)
        self.kept.once("iti heads", found.accuracy.tolist)
        return found

    def of_iti(self, direction: iti.Direction) -> Patch:
        """Heads and strength chosen on dev."""
        cfg = iti.Config(direction=direction)
        found = self.heads
        most = found.accuracy.numel()
        rows = [
            [k, push, self.kept.once(
                f"iti {direction} {k} {push}",
                lambda k=k, push=push: alone(
                    self.lm, self.tuned, iti.fit(self.lm, self.dev, replace(cfg, heads=k, strength=push), found=found)
                ),
            )]
            for k in HEADS if k <= most for push in PUSH
        ]  # fmt: skip
        k, push = best_of(rows)
        return iti.fit(self.lm, self.dev, replace(cfg, heads=k, strength=push), found=found)

    def of_param_mute(self) -> Patch:
        """Layers and factor chosen on dev. Those that work harder over memory's answers come first."""
        cfg = param_mute.Config(responses="given")

        def order() -> list[int]:
            notes = param_mute.fit(self.lm, self.dev[:200], cfg, progress=told).notes
            more = [u - f for u, f in zip(notes["unfaithful"], notes["faithful"], strict=True)]
            return sorted(range(len(more)), key=lambda layer: -more[layer])

        layers = self.kept.once("param_mute layers", order)

        def fit(k: int, factor: float) -> Patch:
            return param_mute.fit(self.lm, self.dev[:1], replace(cfg, layers=tuple(layers[:k]), factor=factor))

        rows = [
            [k, factor, self.kept.once(
                f"param_mute {k} {factor}", lambda k=k, factor=factor: alone(self.lm, self.tuned, fit(k, factor))
            )]
            for k in MUTED if k <= len(layers) for factor in QUIET
        ]  # fmt: skip
        return fit(*best_of(rows))


def rows(study: Study) -> list[tuple[str, Callable[[], list[Patch]], dict[str, Any]]]:
    """(name, how its patches are made, settings of the bench) of every row, the cheap and the telling ones first."""
    lm, one = study.lm, study.dev[:1]

    def decode(method: str, **settings: Any) -> Patch:
        return lp.fit(lm, method, one, **settings)

    found: list[tuple[str, Callable[[], list[Patch]], dict[str, Any]]] = [
        ("ircan", lambda: [study.of_ircan()], {}),
        ("cad", lambda: [decode("cad", alpha=0.5)], {}),
        ("ircan + cad", lambda: [study.of_ircan(), decode("cad", alpha=0.5)], {}),
        ("adacad", lambda: [decode("adacad")], {}),
        ("coiecd", lambda: [decode("coiecd")], {}),
        ("scone", lambda: [study.of_scone()], {}),
        ("param_mute", lambda: [study.of_param_mute()], {}),
        ("iti mass_mean", lambda: [study.of_iti("mass_mean")], {}),
        ("iti probe", lambda: [study.of_iti("probe")], {}),
        ("ErCAN", lambda: [study.of_ircan(factor=0.0)], {"irrelevant": False}),
    ]
    for seed in SEEDS:
        found.append((f"ERN {seed}", lambda seed=seed: [study.of_ircan(seed=seed)], {"irrelevant": False}))
        found.append((f"ErRN {seed}", lambda seed=seed: [study.of_ircan(0.0, seed)], {"irrelevant": False}))
    return found


def measure(lm: LM, test: list[ContextRecord], study: Study, args: argparse.Namespace, folder: Path) -> Any:
    """Every row on test. The unpatched model and the wordings are asked once for all of them."""
    bench: Any = memotrap if args.task == "memotrap" else kre
    wordings = WORDINGS[1:] if args.task == "memotrap" else WORDINGS  # of a completion, base is the plain wording
    config = bench.Config(baselines=wordings, n=args.n, batch_size=args.batch)
    report = bench.run(lm, test, config, data_name=args.task, out=folder, progress=told)
    for name, make, settings in rows(study):
        have = {run.name: len(run.parts) == run.record["planned"] for run in report.runs}
        if have.get(name):
            continue
        start = perf_counter()
        config = bench.Config(baselines=(), n=args.n, batch_size=args.batch, **settings)
        report = bench.run(lm, test, config, patch=make(), run_id=name, data_name=args.task, out=folder, progress=told)
        numbers = {key: round(metric.value, 4) for key, metric in report.metrics(name).items()}
        print(f"{name}: {numbers} in {perf_counter() - start:.0f} s", flush=True)
        write(report, study, args, folder)  # whole at any time
    return report


def mean_of(report: Any, prefix: str) -> dict[str, float]:
    """Mean and standard deviation over the seeds of a control."""
    found = [report.metrics(run.name)["acc"].value for run in report.runs if run.name.startswith(f"{prefix} ")]
    middle = sum(found) / len(found)
    spread = (sum((x - middle) ** 2 for x in found) / max(1, len(found) - 1)) ** 0.5
    return {"acc": middle, "sd_over_seeds": spread, "seeds": len(found)}


def write(report: Any, study: Study, args: argparse.Namespace, folder: Path) -> None:
    """results.json, the plots, and the page with both."""
    numbers = {
        run.name: {name: vars(metric) for name, metric in report.metrics(run.name).items()}
        | {"differences": {name: vars(metric) for name, metric in report.differences(run.name).items()}}
        for run in report.runs
    }
    controls = {p: mean_of(report, p) for p in ("ERN", "ErRN") if any(r.name.startswith(f"{p} ") for r in report.runs)}
    h, beta = best_of(study.grid()[1:])
    whole = {
        "made": now(), "model": study.lm.name, "dtype": "float32", "task": args.task, "versions": versions(),
        "hardware": hardware(), "ircan": {"h": h, "beta": beta}, "dev": study.kept.kept, "controls": controls,
        "runs": numbers,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    plots = draw(report, study, controls, folder)
    page = report.save_html(folder / "report.html").read_text(encoding="utf-8")
    pictures = "".join(
        f'<figure><figcaption>{escape(path.stem)}</figcaption><img alt="{escape(path.stem)}" style="width:100%" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for path in plots
    )
    page = page.replace("</body>", f'<h2>Neurons, settings, ablations</h2><div class="plots">{pictures}</div></body>')
    (folder / "report.html").write_text(page, encoding="utf-8")


def draw(report: Any, study: Study, controls: dict[str, dict[str, float]], folder: Path) -> list[Path]:
    """Where the neurons are, what h and beta do on dev, what erasing and chance do on test."""
    from matplotlib.figure import Figure

    made = []

    def figure(name: str, width: float = 6.0) -> Any:
        made.append((folder / f"{name}.png", Figure(figsize=(width, 3.4), layout="constrained")))
        return made[-1][1].add_subplot()

    layers = range(study.lm.layout.n_layers)
    named, mass = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0.0)
    for credit in study.scores.records:
        for layer, _, score in credit.neurons:
            named[layer] += 1
            mass[layer] += score
    axes = figure("neurons-by-layer")
    for shift, counts, label in ((-0.2, named, "candidates named"), (0.2, mass, "score mass")):
        total = sum(counts.values()) or 1
        axes.bar([layer + 1 + shift for layer in layers], [counts[i] / total for i in layers], 0.4, label=label)
    axes.set(xlabel="layer", ylabel="share", title=f"context-aware neurons, {len(study.scores.records)} dev records")
    axes.legend()

    grid = study.grid()
    h, beta = best_of(grid[1:])
    for name, label, of, fixed in (("accuracy-by-beta", "beta", 1, h), ("accuracy-by-h", "h", 0, beta)):
        axes = figure(name)
        line = [(row[of], row[2]) for row in grid[1:] if row[1 - of] == fixed]
        axes.plot(*zip(*line, strict=True), marker="o", label=f"{'beta' if of == 0 else 'h'} = {fixed:g}")
        axes.axhline(grid[0][2], ls="--", color="grey", label="unpatched")
        axes.set(xlabel=label, ylabel="accuracy on dev")
        axes.grid(alpha=0.3)
        axes.legend()

    bars = [("unpatched", "none"), ("IRCAN", "ircan"), ("ErCAN", "ErCAN")]
    found = [(label, report.metrics(name)["acc"]) for label, name in bars if any(r.name == name for r in report.runs)]
    drawn_bars = [(label, metric.value, metric.stderr or 0.0) for label, metric in found]
    drawn_bars += [(f"{name}, {c['seeds']} seeds", c["acc"], c["sd_over_seeds"]) for name, c in controls.items()]
    axes = figure("ablations")
    labels, values, errors = zip(*drawn_bars, strict=True)
    axes.bar(
        labels, values, yerr=errors, color=["grey", "tab:blue", "tab:red", "tab:orange", "tab:purple"][: len(labels)]
    )
    axes.set(ylabel="ACC on test", title="error bars: s.e. over records; of controls, s.d. over seeds")
    axes.tick_params(axis="x", labelsize=8)

    axes = figure("pareto", 7.0)
    for run in report.runs:
        numbers = report.metrics(run.name)
        if "robustness" in numbers:
            point = numbers["acc"].value, numbers["robustness"].value
            axes.plot(*point, "o", color="grey" if run.record["baseline"] else "tab:blue")
            axes.annotate(run.name, point, fontsize=7, xytext=(3, 3), textcoords="offset points")
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
    parser.add_argument("--examples", type=int, default=100, help="dev records on which neurons are found")
    parser.add_argument("--grid", type=int, help="dev records on which ircan's grid is tried; default: every one")
    parser.add_argument("--tune", type=int, default=100, help="dev records on which iti, scone, param_mute are tuned")
    parser.add_argument("--n", type=int, help="test records, chosen by hash; default: every one")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, help="folder; default: results/ircan-TASK beside this file")
    args = parser.parse_args()
    folder: Path = args.out or RESULTS / f"ircan-{args.task}"
    folder.mkdir(parents=True, exist_ok=True)
    dev, test = (read_context(_file(args.data, f"{FILES[args.task]}_{half}")) for half in ("dev", "test"))
    lm = lp.load(args.model, device=args.device)
    cfg = integrated_gradients.Config()
    start = perf_counter()
    scores = integrated_gradients.run(lm, dev[: args.examples], cfg, progress=told, out=folder / "scores.jsonl")
    print(f"attribution of {len(scores.records)} records: {perf_counter() - start:.0f} s", flush=True)
    identity = {"model": lm.fingerprint(), "dev": hash_json([[r.prompt, r.answer, r.memory] for r in dev])}
    identity |= {"examples": args.examples, "grid": args.grid, "tune": args.tune}
    study = Study(lm, dev, Dev(folder / "dev.json", identity), scores, args)
    report = measure(lm, test, study, args, folder)
    write(report, study, args, folder)
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
