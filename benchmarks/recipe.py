"""RECIPE on evaluation facts: quality as the memory grows, retrieval by itself, and what an edit and an answer cost.

    python benchmarks/recipe.py quality DATA     n = 1, 10, 100, 1000, 5000 facts: recipe, RAG, fact in the prompt, none
    python benchmarks/recipe.py retrieval DATA   recall and false fires as the memory grows, sentinel and cosine
    python benchmarks/recipe.py speed DATA       seconds per edit and per answer, bytes per edit

writes results/recipe-<name>.*; the facts are CounterFact's evaluation half, none of which the editor has seen.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import lmpatch as lp
from lmpatch.benches import facts
from lmpatch.data.readers import read_asks, read_edits
from lmpatch.methods import recipe
from lmpatch.patches.memory import Recall
from lmpatch.record import hardware, now, versions

RESULTS = Path(__file__).parent / "results"
SIZES = (1, 10, 100, 1000, 5000)
RUNS = {
    "recipe": recipe.Config(),
    "recipe_text": recipe.Config(insert="text"),
    "recipe_cosine": recipe.Config(gate="cosine"),
}


def quality(lm: lp.LM, data: Path, editor: lp.Editor, sizes: list[int], scored: int) -> None:
    """All n edits in the memory, then at most ``scored`` cases are asked."""
    unrelated = data / "nq/nq_locality.jsonl.gz"
    for n in sizes:
        edits = facts.load(data / "counterfact/eval.jsonl.gz", limit=max(n, min(scored, 100)), unrelated=unrelated)
        chunks = 1 if n >= 100 else max(1, min(100, scored) // n)
        cfg = facts.Config(
            n=n, chunks=chunks, sample=scored, max_new_tokens=16, health=False, latency=n == SIZES[-1], distractor=False
        )
        out = RESULTS / f"recipe-{n}"
        for name, config in RUNS.items():
            report = facts.run(
                lm, edits, cfg, make=lambda lm, edits, c=config: recipe.fit(lm, edits, c, editor=editor),
                settings=vars(config), run_id=name, data_name="counterfact/eval", out=out,
                progress=lambda done, total, what, n=n: print(f"{n}: {what} {done}/{total}", flush=True),
            )  # fmt: skip
            report.save_html(out.with_suffix(".html"))


def retrieval(lm: lp.LM, data: Path, editor: lp.Editor) -> dict[str, Any]:
    """Found and used; used though nothing fits. Edits, rephrases, neighbours and unrelated questions apart."""
    edits = read_edits(data / "counterfact/eval.jsonl.gz")
    random.Random(0).shuffle(edits)
    asks = [ask.prompt for ask in read_asks(data / "nq/nq_locality.jsonl.gz")[:1000]]  # the editor saw the other half
    found: dict[str, Any] = {}
    for name in ("recipe", "recipe_cosine"):
        for n in SIZES:
            recall = Recall(recipe.fit(lm, edits[:n], RUNS[name], editor=editor))
            kept = {edit["prompt"]: i for i, edit in enumerate(recall.patch.edits)}
            cases = [edit for edit in edits[:n] if edit.prompt in kept][:1000]
            rows: dict[str, Any] = {"cases": len(cases)}
            for kind, texts in (("edit", [e.prompt for e in cases]), ("rephrase", [e.rephrases[0] for e in cases])):
                hits = [h[0] for h in recall.search(texts)]
                right = [h.place == kept[e.prompt] for h, e in zip(hits, cases, strict=True)]
                rows[f"{kind}_nearest"] = sum(right) / len(cases)
                rows[f"{kind}_used"] = sum(r and h.fired for r, h in zip(right, hits, strict=True)) / len(cases)
            near = [ask.prompt for e in cases for _, group in e.locality for ask in group[:1]]
            for kind, texts in (("neighbour", near), ("unrelated", asks)):
                rows[f"{kind}_false_fire"] = sum(h[0].fired for h in recall.search(texts)) / len(texts)
            found[f"{name}/{n}"] = rows
            print(name, n, json.dumps(rows), flush=True)
    return found


def speed(lm: lp.LM, data: Path, editor: lp.Editor) -> dict[str, Any]:
    """Medians of ten; an edit goes from the request to a memory that answers."""
    edits = read_edits(data / "counterfact/eval.jsonl.gz")
    whole = recipe.fit(lm, edits, RUNS["recipe"], editor=editor)

    def median(call: Any, times: int = 10) -> float:
        seconds = []
        for i in range(times + 1):
            start = perf_counter()
            call(i)
            seconds.append(perf_counter() - start)
        return sorted(seconds[1:])[times // 2]

    found: dict[str, Any] = {"facts": len(whole.edits)}
    network = whole.network()
    weights = network.encoder_weights()
    with torch.no_grad():
        found["edit_s"] = median(lambda i: network.keys([f"{edits[i].prompt} {edits[i].target}"], weights))
    found["bytes_per_edit"] = whole.keys.nbytes / len(whole.keys)
    prompts = [edit.prompt for edit in edits[:11]]
    found["answer_s_unpatched"] = median(lambda i: lp.generate(lm, prompts[i], stop=()))
    with lp.apply(lm, whole):
        found["answer_s"] = median(lambda i: lp.generate(lm, prompts[i], stop=()))
    found["answer_ratio"] = found["answer_s"] / found["answer_s_unpatched"]
    print(json.dumps(found, indent=1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["quality", "retrieval", "speed"])
    parser.add_argument("data", type=Path)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--scored", type=int, default=200, help="cases asked at most")
    parser.add_argument("--editor", type=Path, help="default: the packaged one")
    args = parser.parse_args()
    lm = lp.load("gemma-3-270m")
    editor = lp.load_editor(args.editor) if args.editor else recipe.packaged_editor(lm)
    if args.name == "quality":
        quality(lm, args.data, editor, args.sizes, args.scored)
        return
    made = (retrieval if args.name == "retrieval" else speed)(lm, args.data, editor)
    record = {"made": now(), "versions": versions(), "hardware": hardware(), "editor": editor.hash(), "results": made}
    (RESULTS / f"recipe-{args.name}.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
