"""What a memory of many facts answers: asked as they were told, in other words, and beside the point.

    python benchmarks/recipe_answers.py DATA gemma-3-270m [--sets counterfact ...] [--editor FILE] [--scored 300]
    python benchmarks/recipe_answers.py DATA smollm2-135m-instruct

All facts of a set are in the memory, ``--scored`` of them are asked: by generation, ``--tokens`` new ones, fp32. Beside
the memory stand the model as it is and the same fact as text before the question, whatever is asked. Writes
results/recipe-answers-MODEL.json, and every answer to results/recipe-answers-MODEL/SET.jsonl.gz. A set that is there is
kept; delete its file to measure it again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from facts import SETS, unseen
from tables.rows import RESULTS, read_lines, write_lines

import lmpatch as lp
from lmpatch.data.edits import read_edits
from lmpatch.data.matching import normalise
from lmpatch.inference.tokens import premise
from lmpatch.methods import recipe
from lmpatch.patches.memory.patch import MemoryPatch
from lmpatch.provenance import hardware, now, versions

FACTS = {"counterfact": 1000, "zsre": 402, "wiki": 500, "real-zsre": 1000, "real-wiki": 1000}
"""How many facts of a set are in the memory; no training saw them, but for 24 of real-zsre."""
FILES = SETS | {"real-zsre": "locft/zsre_1500.jsonl.gz", "real-wiki": "locft/wikibigedit_1500.jsonl.gz"}
BESIDE = ("same_subject", "same_relation")
ASKED = ("edit", "rephrase")
FORMS = {"recipe": recipe.Config(), "vectors": recipe.Config(insert="vectors")}


class Question(NamedTuple):
    """``wanted`` answers it if the fact holds; where the fact is beside the question, it is the fact's target."""

    kind: str
    text: str
    fact: lp.Edit
    wanted: str


def questions(edits: list[lp.Edit], unrelated: list[lp.Ask]) -> Iterator[Question]:
    """What is asked of these facts, one question of a kind."""
    for i, edit in enumerate(edits):
        yield Question("edit", edit.prompt, edit, edit.target)
        for text in edit.rephrases[:1]:
            yield Question("rephrase", text, edit, edit.target)
        for kind, asks in edit.locality:
            if kind in BESIDE and asks:
                yield Question(kind, asks[0].prompt, edit, edit.target)
        for kind, asks in edit.portability:
            for ask in asks[:1]:
                yield Question(kind, ask.prompt, edit, ask.answers[0])
        yield Question("unrelated", unrelated[i % len(unrelated)].prompt, edit, edit.target)


def answers(lm: lp.LM, data: Path, name: str, scored: int, tokens: int, editor: lp.Editor) -> list[dict[str, Any]]:
    """A row for each question and form: the model as it is, but for the facts themselves; the fact before the question
    on what it should touch; the memory on all; its vectors alone on the facts themselves. A question that uses no
    fact is answered as by the model as it is, to the bit (tests/methods/test_recipe.py), and not asked again."""
    edits = read_edits(data / FILES[name])[: FACTS[name]]
    asked = [*questions(random.Random(0).sample(edits, min(scored, len(edits))), unseen(data))]
    about = [q for q in asked if q.kind not in (*BESIDE, "unrelated")]
    rows: list[dict[str, Any]] = []

    def note(form: str, which: list[Question], patch: lp.Patch | None = None) -> None:
        before = form == "fact_before"
        texts = [premise(q.fact.prompt, q.fact.target) + q.text if before else q.text for q in which]
        hits = patch.finder().search(texts) if isinstance(patch, MemoryPatch) else [[]] * len(texts)
        known = {row["question"]: row["answer"] for row in rows if row["form"] == "none"} if patch else {}
        idle = {text for text, hit in zip(texts, hits, strict=True) if not (hit and hit[0].fired)}
        said = {text: known[text] for text in idle if text in known}
        new = [text for text in dict.fromkeys(texts) if text not in said]
        with lp.apply(lm, patch) if patch else nullcontext():
            said |= dict(zip(new, lp.generate(lm, new, max_new_tokens=tokens), strict=True))
        for q, text, hit in zip(which, texts, hits, strict=True):
            row = {"form": form, "kind": q.kind, "question": q.text, "target": q.wanted, "answer": said[text]}
            rows.append(row | {"fired": bool(hit and hit[0].fired)})
        print(name, form, flush=True)

    note("none", [q for q in asked if q.kind not in ASKED])
    note("fact_before", about)
    for form, config in FORMS.items():
        if form == "vectors" and editor.base.any_model:
            continue
        patch = recipe.fit(lm, edits, config, editor=editor)
        note(form, [q for q in asked if form == "recipe" or q.kind in ASKED], patch)
    return rows


def scores(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares by form and kind. ``alone``: the target and nothing else; ``again``: the target twice or more."""
    table: dict[str, Any] = {}
    before = {(row["kind"], row["question"]): row["answer"] for row in rows if row["form"] == "none"}
    for key in dict.fromkeys((row["form"], row["kind"]) for row in rows):
        own = [row for row in rows if (row["form"], row["kind"]) == key]
        pairs = [(normalise(row["answer"]), normalise(row["target"])) for row in own]
        bigrams = [[*pairwise(row["answer"].casefold().split())] for row in own]
        same = [
            row["answer"] == before[row["kind"], row["question"]] for row in own if key[1] in (*BESIDE, "unrelated")
        ]
        table["/".join(key)] = {
            "n": len(own),
            "stated": mean(answer.startswith(target) for answer, target in pairs),
            "contained": mean(target in answer for answer, target in pairs),
            "alone": mean(answer == target for answer, target in pairs),
            "again": mean(answer.count(target) > 1 for answer, target in pairs),
            "empty": mean(not answer for answer, _ in pairs),
            "distinct_2": mean(len(set(each)) / len(each) if each else 1.0 for each in bigrams),
            "fired": mean(row["fired"] for row in own),
        } | ({"unchanged": mean(same)} if same else {})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model")
    parser.add_argument("--sets", nargs="*", choices=FACTS, default=list(FACTS))
    parser.add_argument("--scored", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer; a chat model's sentences need about 48")
    parser.add_argument("--editor", type=Path, help="default: the packaged one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="default: results/recipe-answers-MODEL")
    args = parser.parse_args()
    out = args.out or RESULTS / f"recipe-answers-{args.model}"
    out.mkdir(exist_ok=True)
    lm = lp.load(args.model, dtype=args.dtype, device="cpu")
    editor = recipe.editor_for(lm, args.editor)
    found = {}
    for name in args.sets:
        file = out / f"{name}.jsonl.gz"
        if not file.exists():
            rows = answers(lm, args.data, name, args.scored, args.tokens, editor)
            write_lines(file, rows)
        found[name] = scores(read_lines(file))
        for key, row in found[name].items():
            print(name, key, {measure: round(value, 3) for measure, value in row.items()}, flush=True)
    record = {"made": now(), "versions": versions(), "hardware": hardware(), "editor": editor.hash(), "results": found}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
