"""Which layer should ROME and MEMIT write? A sweep on training facts; the evaluation facts are never looked at.

    python benchmarks/layers.py DATA/counterfact/train.jsonl.gz DATA/wikitext2/raw_train_part.txt.gz

writes results/layers.json and results/layers.png. bf16 on the side mount: a sweep ranks settings, it reports no score.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import lmpatch as lp
from lmpatch.data.readers import read_edits, read_text
from lmpatch.methods import memit, rome
from lmpatch.models.lm import LM
from lmpatch.models.run import generate
from lmpatch.patches.ledger import apply
from lmpatch.record import hardware, now, versions

RESULTS = Path(__file__).parent / "results"
TOKENS = 8


def says(texts: list[str], answers: list[str]) -> float:
    return sum(t.strip().startswith(a) for t, a in zip(texts, answers, strict=True)) / len(texts)


def ask(lm: LM, edits: list[lp.Edit]) -> tuple[list[str], list[str], list[str]]:
    near = [ask.prompt for e in edits for _, asks in e.locality for ask in asks[:1]]
    prompts = [e.prompt for e in edits] + [e.rephrases[0] for e in edits] + near
    texts = generate(lm, prompts, max_new_tokens=TOKENS)
    return texts[: len(edits)], texts[len(edits) : 2 * len(edits)], texts[2 * len(edits) :]


def measure(lm: LM, edits: list[lp.Edit], patches: list[Any], groups: list[list[lp.Edit]]) -> dict[str, float]:
    """Efficacy and paraphrase by generation, share of neighbours whose text is unchanged."""
    told, other, same = 0.0, 0.0, 0.0
    for patch, group in zip(patches, groups, strict=True):
        before = ask(lm, group)[2]
        with apply(lm, patch, mount="side"):
            direct, rephrased, near = ask(lm, group)
        answers = [e.target for e in group]
        told += says(direct, answers) * len(group) / len(edits)
        other += says(rephrased, answers) * len(group) / len(edits)
        same += sum(a == b for a, b in zip(before, near, strict=True)) / len(near) * len(group) / len(edits)
    return {"efficacy": told, "paraphrase": other, "unchanged": same}


def row(lm: LM, edits: list[lp.Edit], method: ModuleType, cfg: Any, text: list[str]) -> dict[str, Any]:
    start = perf_counter()
    if method is rome:
        patches, groups = rome.fit_each(lm, edits, cfg, text=text), [[e] for e in edits]
    else:
        patches, groups = [memit.fit(lm, edits, cfg, text=text)], [edits]
    seconds = (perf_counter() - start) / len(edits)
    name = method.__name__.rpartition(".")[2]
    found = {"method": name, "config": asdict(cfg), "n": len(edits), "seconds_per_edit": seconds}
    found |= measure(lm, edits, patches, groups)
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items() if k != "config"},
          cfg.layer if method is rome else (cfg.layers, cfg.weight, cfg.hits, cfg.solver), flush=True)  # fmt: skip
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    single = [r for r in rows if r["method"] == "rome"]
    for name, mark in (("efficacy", "o"), ("paraphrase", "s"), ("unchanged", "^")):
        axes.plot([r["config"]["layer"] for r in single], [r[name] for r in single], marker=mark, label=name)
    axes.set(xlabel="layer written by ROME", ylim=(-0.03, 1.03), title="CounterFact train, Gemma-3-270M, one fact at a time")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("facts")
    parser.add_argument("text")
    parser.add_argument("--single", type=int, default=24, help="facts written one at a time")
    parser.add_argument("--many", type=int, default=50, help="facts written in one commit")
    args = parser.parse_args()
    lm = lp.load("gemma-3-270m", dtype="bfloat16")
    edits, text = read_edits(args.facts, limit=max(args.single, args.many)), read_text(args.text)
    record = {"made": now(), "versions": versions(), "hardware": hardware(), "dtype": "bfloat16", "tokens": TOKENS}
    rows: list[dict[str, Any]] = []
    for layer in range(12):
        cfg = rome.Config(layer=layer, short_prefixes=2, long_prefixes=2)
        rows.append(row(lm, edits[: args.single], rome, cfg, text))
    for layers in ((1, 2, 3, 4), (3, 4, 5, 6), (5, 6, 7, 8), (2, 4, 6), (4, 5)):
        for weight in (150.0, 1500.0):
            cfg = memit.Config(layers=layers, weight=weight, long_prefixes=2, hits=2)
            rows.append(row(lm, edits[: args.many], memit, cfg, text))
        (RESULTS / "layers.json").write_text(json.dumps({"record": record, "rows": rows}, indent=1))
    plot(rows, RESULTS / "layers.png")


if __name__ == "__main__":
    main()
