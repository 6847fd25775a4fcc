"""The facts bench on CounterFact's evaluation half: single edits, one commit of 100, a stream of 1,000.

    python benchmarks/facts.py single DATA       rome, r_rome, FT-M, FT-L, 100 facts one at a time
    python benchmarks/facts.py commit DATA       memit and its options, FT-M, LoRA, 100 facts in one commit
    python benchmarks/facts.py stream DATA       memit, 1,000 facts in commits of 100, with retention
    python benchmarks/facts.py commit DATA --set wiki --per-kind 2    other facts, with RIPE's axes

works in work/facts-<name>/ (resumable, with a page and a table beside it; the set's name follows) and keeps rows and
records in results/facts-<name>/. The settings were chosen on counterfact/train (layers.py). Second moments come from
WikiText-2; NAS takes its norms from the project's own facts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from tables.rows import RESULTS, WORK, keep

import lmpatch as lp
from lmpatch.benches import facts
from lmpatch.data.edits import read_asks
from lmpatch.data.lines import read_text
from lmpatch.methods import finetune, memit, rome
from lmpatch.methods.rome import r_rome

PREFIXES: dict[str, Any] = {"short_prefixes": 2, "long_prefixes": 2}
MEMIT: dict[str, Any] = {"long_prefixes": 2, "hits": 2}

METHODS: dict[str, dict[str, tuple[Any, Any]]] = {
    "single": {
        "rome": (rome, rome.Config(**PREFIXES)),
        "r_rome": (r_rome, r_rome.Config(**PREFIXES)),
        "ft_m": (finetune, finetune.Config()),
        "ft_l": (finetune, finetune.Config(layer=2, limit=2e-3)),
    },
    "commit": {
        "memit": (memit, memit.Config(**MEMIT)),
        "memit_alphaedit": (memit, memit.Config(**MEMIT, solver="alphaedit", ridge=0.3)),
        "memit_encore": (memit, memit.Config(**MEMIT, frobenius=1e-3)),
        "memit_nas": (memit, memit.Config(**MEMIT, nas=True)),
        "ft_m": (finetune, finetune.Config()),
        "lora": (finetune, finetune.Config(rank=8, lr=2e-3)),
    },
    "stream": {
        "memit": (memit, memit.Config(**MEMIT)),
        "memit_alphaedit": (memit, memit.Config(**MEMIT, solver="alphaedit", ridge=0.3)),
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "single": {"n": 1, "health": False, "latency": False},
    "commit": {"n": 100, "latency": False},
    "stream": {"n": 1000, "commit_size": 100, "retention": True, "latency": False, "sample": 200},
}
SETS = {
    "counterfact": "counterfact/eval.jsonl.gz",
    "zsre": "knowedit/zsre.jsonl.gz",
    "wiki": "knowedit/wiki_counterfact_test.jsonl.gz",
}
QUICK: dict[str, Any] = {
    "per_kind": 2, "max_new_tokens": 16, "health": False, "latency": False, "distractor": False, "pack": 0,
}  # fmt: skip
"""Settings of the bench where many runs are compared."""


def unseen(data: Path) -> list[lp.Ask]:
    """Unrelated questions of the half that no editor was trained on."""
    asks = read_asks(data / "nq/nq_locality.jsonl.gz")
    return asks[: len(asks) // 2]


def saved(report: Any, out: Path, width: int) -> None:
    """Page and table of a bench, beside its folder of runs; its rows to where they are committed."""
    report.save_html(out.with_suffix(".html"))
    with out.with_suffix(".md").open("w") as file:
        Console(file=file, width=width).print(report.table(every=True))
    commit_rows(out)


def commit_rows(out: Path) -> None:
    """Rows and records of a folder below ``work`` to the same place below ``results``; others stay where they are."""
    if out.is_relative_to(WORK):
        keep(out, RESULTS / out.relative_to(WORK))


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *lines))


def makers(module: Any, cfg: Any, text: list[str], anchors: list[lp.Edit]) -> dict[str, Any]:
    given: dict[str, Any] = {"text": text} if module is not finetune else {}
    if getattr(cfg, "nas", False):
        given["anchors"] = anchors
    made: dict[str, Callable[..., Any]] = {"make": lambda lm, edits: module.fit(lm, edits, cfg, **given)}
    if hasattr(module, "fit_each"):
        made["make_each"] = lambda lm, edits: module.fit_each(lm, edits, cfg, **given)
    return made


def told(name: str, done: int, total: int, what: str) -> None:
    print(f"{name}: {what} {done}/{total}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(METHODS))
    parser.add_argument("data", type=Path)
    parser.add_argument("--set", choices=list(SETS), default="counterfact")
    parser.add_argument("--limit", type=int, help="facts at most")
    parser.add_argument(
        "--per-kind", type=int, default=facts.Config.per_kind, help="questions of a kind and fact at most"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="*", help="these methods only")
    args = parser.parse_args()
    settings = SETTINGS[args.name]
    lm = lp.load("gemma-3-270m", dtype=args.dtype, device="cpu")
    edits = facts.load(
        args.data / SETS[args.set],
        limit=args.limit or max(100, settings["n"]),
        unrelated=args.data / "nq/nq_locality.jsonl.gz",
    )
    text = read_text(args.data / "wikitext2/raw_train_part.txt.gz")
    anchors = lp.read_edits(Path(__file__).parents[1] / "examples/facts.jsonl")
    cfg = facts.Config(max_new_tokens=16, per_kind=args.per_kind, **settings)
    out = WORK / (f"facts-{args.name}" + (f"-{args.set}" if args.set != "counterfact" else ""))
    for run_id, (module, config) in METHODS[args.name].items():
        if args.only and run_id not in args.only:
            continue
        report = facts.run(
            lm, edits, cfg, **makers(module, config, text, anchors), settings=vars(config), run_id=run_id, mount="bake",
            data_name=SETS[args.set].removesuffix(".jsonl.gz"), out=out,
            progress=partial(told, run_id),
        )  # fmt: skip
        saved(report, out, width=220)
        Console(width=220).print(report.table(every=True))


if __name__ == "__main__":
    main()
