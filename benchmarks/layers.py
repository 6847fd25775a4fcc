"""Which layer should ROME and MEMIT write? A sweep on training facts; the evaluation facts are never looked at.

    python benchmarks/layers.py DATA/counterfact/train.jsonl.gz DATA/wikitext2/raw_train_part.txt.gz

writes results/layers.json. bf16 on the side mount: a sweep ranks settings, it reports no score. Whole methods are
compared by sweeps.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import lmpatch as lp
from lmpatch.data.edits import read_edits
from lmpatch.data.lines import read_text
from lmpatch.inference.generate import generate
from lmpatch.methods import memit, rome
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import apply
from lmpatch.provenance import hardware, now, versions

RESULTS = Path(__file__).parent / "results"
TOKENS = 8
WEIGHTS: tuple[dict[str, Any], ...] = (
    {"weight": 1500.0}, {"weight": 5000.0}, {"weight": 15000.0}, {"solver": "alphaedit", "ridge": 0.3}
)  # fmt: skip


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


def rome_row(lm: LM, edits: list[lp.Edit], layer: int, text: list[str]) -> dict[str, Any]:
    cfg = rome.Config(layer=layer, short_prefixes=2, long_prefixes=2)
    start = perf_counter()
    patches = rome.fit_each(lm, edits, cfg, text=text)
    seconds = (perf_counter() - start) / len(edits)
    return {"method": "rome", "config": asdict(cfg), "seconds_per_edit": seconds} | measure(
        lm, edits, patches, [[e] for e in edits]
    )


def memit_rows(
    lm: LM, edits: list[lp.Edit], layers: tuple[int, ...], clamp: float, text: list[str]
) -> Iterator[dict[str, Any]]:
    """One value search, then a solve per weight: the values do not depend on it."""
    cfg = memit.Config(layers=layers, clamp=clamp, long_prefixes=2, hits=2)
    start = perf_counter()
    commit = memit.Commit(lm, edits, cfg, text, None, None)
    seconds = (perf_counter() - start) / len(edits)
    for change in WEIGHTS:
        commit.cfg = replace(cfg, **change)
        patch = commit.patch(range(len(edits)))
        yield {"method": "memit", "config": asdict(commit.cfg), "seconds_per_edit": seconds} | measure(
            lm, edits, [patch], [edits]
        )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    single = [r for r in rows if r["method"] == "rome"]
    for name, mark in (("efficacy", "o"), ("paraphrase", "s"), ("unchanged", "^")):
        axes.plot([r["config"]["layer"] for r in single], [r[name] for r in single], marker=mark, label=name)
    axes.set(
        xlabel="layer written by ROME", ylim=(-0.03, 1.03), title="CounterFact train, Gemma-3-270M, one fact at a time"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("facts")
    parser.add_argument("text")
    parser.add_argument("--single", type=int, default=16, help="facts written one at a time")
    parser.add_argument("--many", type=int, default=40, help="facts written in one commit")
    parser.add_argument("--plot", type=Path, help="draw them, too: a PNG")
    args = parser.parse_args()
    lm = lp.load("gemma-3-270m", dtype="bfloat16", device="cpu")
    edits, text = read_edits(args.facts, limit=max(args.single, args.many)), read_text(args.text)
    record = {"made": now(), "versions": versions(), "hardware": hardware(), "dtype": "bfloat16", "tokens": TOKENS}
    record |= {"single": args.single, "many": args.many}
    file = RESULTS / "layers.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []  # a run goes on

    def have(method: str, **config: Any) -> bool:
        return any(r["method"] == method and all(r["config"][k] == v for k, v in config.items()) for r in rows)

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        config = row["config"]
        where = (
            config["layer"]
            if row["method"] == "rome"
            else (config["layers"], config["clamp"], config["solver"], config["weight"])
        )
        print(row["method"], where, {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}, flush=True)
        file.write_text(json.dumps({"record": record, "rows": rows}, indent=1) + "\n")

    for layers, clamp in (
        ((2, 3, 4, 5), 0.75), ((2, 3, 4, 5), 1.5), ((5, 6, 7, 8), 1.5), ((1, 2, 3), 1.5), ((8, 9, 10, 11), 1.5),
    ):  # fmt: skip
        if have("memit", layers=list(layers), clamp=clamp):
            continue
        for found in memit_rows(lm, edits[: args.many], layers, clamp, text):
            keep(found)
    for layer in (0, 1, 2, 3, 4, 5, 6, 8, 10):
        if not have("rome", layer=layer):
            keep(rome_row(lm, edits[: args.single], layer, text))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
