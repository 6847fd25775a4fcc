"""RECIPE on evaluation facts: quality as the memory grows, retrieval by itself, and what an edit and an answer cost.

    python benchmarks/recipe.py quality DATA     n = 1 to 5,000: recipe, RAG, a cosine gate, fact in the prompt, none
    python benchmarks/recipe.py retrieval DATA   recall and false fires as the memory grows, sentinel and cosine
    python benchmarks/recipe.py forced DATA      1,000 cases, teacher-forced: the same with less noise
    python benchmarks/recipe.py speed DATA       seconds per edit and per answer, bytes per edit

writes results/recipe-<name>.json, or works in work/recipe-<set>-<n>/ and keeps rows and records in results/. Tables and
plots beside the editors of weights are made of them by write_numbers.py. The facts are CounterFact's evaluation half,
KnowEdit's wiki_counterfact_test and the half of its zsRE that no editor was trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter
from typing import Any

from facts import QUICK, SETS, commit_rows, told, unseen
from tables.rows import RESULTS, WORK

import lmpatch as lp
from lmpatch.benches import facts
from lmpatch.data.edits import read_edits
from lmpatch.methods import recipe
from lmpatch.patches.memory.patch import encode_keys
from lmpatch.patches.patch import plain
from lmpatch.provenance import hardware, now, versions

SIZES = (1, 10, 100, 1000, 5000)
SIZES_OF = {"counterfact": SIZES, "zsre": (1, 100, 402), "wiki": (1, 100, 500)}
UNTRAINED = {"zsre": 402}
"""How many of a set's facts no training saw; all where it is not said."""
RUNS = {
    "recipe": recipe.Config(),
    "recipe_text": recipe.Config(insert="text"),
    "recipe_cosine": recipe.Config(gate="cosine"),
}


def quality(lm: lp.LM, data: Path, editor: lp.Editor, only: list[str], sizes: list[int], scored: int) -> None:
    """All n edits in the memory, then at most ``scored`` cases are asked."""
    for name in only:
        file, steps = SETS[name], SIZES_OF[name]
        for n in [size for size in steps if size in sizes or not sizes]:
            edits = facts.with_unrelated(read_edits(data / file, limit=UNTRAINED.get(name)), unseen(data))
            edits = edits if n > scored else edits[: max(n, scored)]
            cfg = facts.Config(n=n, chunks=max(1, scored // n), sample=scored, **QUICK)
            out = WORK / f"recipe-{name}-{n}"
            for run, config in RUNS.items():
                if run != "recipe" and n != max(steps):
                    continue
                report = facts.run(
                    lm, edits, cfg, make=partial(recipe.fit, cfg=config, editor=editor),
                    settings=plain(config) | {"editor": editor.hash()}, run_id=run, data_name=file, out=out,
                    progress=partial(told, f"{name} {n}"),
                )  # fmt: skip
                report.save_html(out.with_suffix(".html"))
                commit_rows(out)


def retrieval(lm: lp.LM, data: Path, editor: lp.Editor) -> dict[str, Any]:
    """Found and used; used though nothing fits. Edits, rephrases, neighbours and unrelated questions apart."""
    edits = read_edits(data / "counterfact/eval.jsonl.gz")
    random.Random(0).shuffle(edits)
    asks = [ask.prompt for ask in unseen(data)[:1000]]
    found: dict[str, Any] = {}
    for name in ("recipe", "recipe_cosine"):
        for n in SIZES:
            patch = recipe.fit(lm, edits[:n], RUNS[name], editor=editor)
            finder, kept = patch.finder(), {edit["prompt"]: i for i, edit in enumerate(patch.edits)}
            cases = [edit for edit in edits[:n] if edit.prompt in kept][:1000]
            rows: dict[str, Any] = {"cases": len(cases)}
            for kind, texts in (("edit", [e.prompt for e in cases]), ("rephrase", [e.rephrases[0] for e in cases])):
                hits = [h[0] for h in finder.search(texts)]
                right = [h.place == kept[e.prompt] for h, e in zip(hits, cases, strict=True)]
                rows[f"{kind}_nearest"] = sum(right) / len(cases)
                rows[f"{kind}_used"] = sum(r and h.fired for r, h in zip(right, hits, strict=True)) / len(cases)
            near = [a.prompt for e in cases for _, group in e.locality for a in group[:1] if a.prompt not in kept]
            for kind, texts in (("neighbour", near), ("unrelated", asks)):
                rows[f"{kind}_false_fire"] = sum(h[0].fired for h in finder.search(texts)) / len(texts)
            found[f"{name}/{n}"] = rows
            print(name, n, json.dumps(rows), flush=True)
    return found


def forced(lm: lp.LM, data: Path, editor: lp.Editor) -> dict[str, Any]:
    """Teacher-forced accuracy over 1,000 cases of CounterFact, with 1,000 and 5,000 facts in the memory."""
    edits = read_edits(data / "counterfact/eval.jsonl.gz")
    random.Random(0).shuffle(edits)
    found: dict[str, Any] = {}
    for n in SIZES[-2:]:
        patch = recipe.fit(lm, edits[:n], RUNS["recipe"], editor=editor)
        kept = {edit["prompt"]: edit["target"] for edit in patch.edits}
        cases = [edit for edit in edits[:n] if kept.get(edit.prompt) == edit.target][:1000]
        targets = [edit.target for edit in cases]
        with lp.apply(lm, patch):
            for name, prompts in (
                ("tf_reliability", [edit.prompt for edit in cases]),
                ("tf_generality", [edit.rephrases[0] for edit in cases]),
            ):
                right = [one.accuracy for one in lp.score(lm, prompts, targets)]
                found[f"{n}/{name}"] = {
                    "value": mean(right),
                    "stderr": stdev(right) / len(right) ** 0.5,
                    "n": len(right),
                }
                print(n, name, found[f"{n}/{name}"], flush=True)
    return found


def speed(lm: lp.LM, data: Path, editor: lp.Editor) -> dict[str, Any]:
    """Medians; an edit goes from the request to a memory that answers, on disk to a commit that is flushed."""
    edits = read_edits(data / "counterfact/eval.jsonl.gz")
    whole = recipe.fit(lm, edits, RUNS["recipe"], editor=editor)
    found: dict[str, Any] = {"facts": len(whole.edits), "bytes_per_edit": whole.keys.nbytes / len(whole.keys)}
    found["edit_s"] = timed(lambda i: encode_keys(whole.retriever, edits[i : i + 1]), 50)
    with tempfile.TemporaryDirectory() as folder:
        memory = lp.Memory.create(Path(folder) / "memory", editor)
        start = perf_counter()
        memory.add(edits)
        found["bulk_s_per_edit"] = (perf_counter() - start) / len(edits)
        again = [replace(edit, prompt=f"{edit.prompt} now") for edit in edits[:51]]
        found["edit_on_disk_s"] = timed(lambda i: memory.add([again[i]]), 50)
        prompts = [edit.prompt for edit in edits[:21]]
        patches = {"unpatched": None, "patch": whole, "memory": memory.patch()}
        for name, seconds in side_by_side(lm, prompts, patches).items():
            found[f"answer_s_{name}"] = seconds
    for name in ("patch", "memory"):
        found[f"answer_ratio_{name}"] = found[f"answer_s_{name}"] / found["answer_s_unpatched"]
    print(json.dumps(found, indent=1))
    return found


def timed(call: Callable[[int], object], times: int) -> float:
    """Median seconds of ``call(1)`` to ``call(times)``; ``call(0)`` warms up."""
    seconds = []
    for i in range(times + 1):
        start = perf_counter()
        call(i)
        seconds.append(perf_counter() - start)
    return median(seconds[1:])


def side_by_side(lm: lp.LM, prompts: list[str], patches: Mapping[str, lp.Patch | None]) -> dict[str, float]:
    """Median seconds for 32 new tokens. Each prompt is asked with every patch in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in patches}
    for prompt in prompts:
        for name, patch in patches.items():
            with lp.apply(lm, patch) if patch else nullcontext():
                start = perf_counter()
                lp.generate(lm, prompt, max_new_tokens=32, stop=())
                seconds[name].append(perf_counter() - start)
    return {name: median(each[1:]) for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["quality", "retrieval", "forced", "speed"])
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--sizes", type=int, nargs="*", default=[])
    parser.add_argument("--scored", type=int, default=100, help="cases asked at most")
    parser.add_argument("--editor", type=Path, help="default: the packaged one")
    args = parser.parse_args()
    lm = lp.load("gemma-3-270m", dtype="float32", device="cpu")
    editor = lp.load_editor(args.editor) if args.editor else recipe.editor_for(lm)
    if args.name == "quality":
        quality(lm, args.data, editor, args.sets, args.sizes, args.scored)
        return
    made = {"retrieval": retrieval, "forced": forced, "speed": speed}[args.name](lm, args.data, editor)
    record = {"made": now(), "versions": versions(), "hardware": hardware(), "editor": editor.hash(), "results": made}
    (RESULTS / f"recipe-{args.name}.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
