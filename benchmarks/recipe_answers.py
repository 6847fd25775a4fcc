"""What a memory of many facts answers: asked as they were told, in other words, and beside the point.

    python benchmarks/recipe_answers.py DATA gemma-3-270m [--sets counterfact ...] [--editor FILE] [--scored 300]
    python benchmarks/recipe_answers.py DATA smollm2-135m-instruct

All facts of a set are in the memory, ``--scored`` of them are asked: by generation, 16 new tokens, fp32. Beside the
memory stand the model as it is and the same fact as text before the question, whatever is asked. Writes
results/recipe-answers-MODEL.json, and every answer to results/recipe-answers-MODEL/SET.jsonl.gz. A set that is there is
kept; delete its file to measure it again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from facts import SETS, unseen
from tables.rows import RESULTS

import lmpatch as lp
from lmpatch.data.edits import read_edits
from lmpatch.data.matching import normalise
from lmpatch.inference.tokens import statement
from lmpatch.methods import recipe
from lmpatch.provenance import hardware, now, versions

FACTS = {"counterfact": 1000, "zsre": 402, "wiki": 500, "real-zsre": 1000, "real-wiki": 1000}
"""How many facts of a set are in the memory; no training saw any of them."""
FILES = SETS | {"real-zsre": "locft/zsre_1500.jsonl.gz", "real-wiki": "locft/wikibigedit_1500.jsonl.gz"}
BESIDE = ("same_subject", "same_relation")
FORMS: dict[str, dict[str, Any]] = {"recipe": {}, "vectors": {"insert": "vectors"}, "text": {"insert": "text"}}


def questions(edits: list[lp.Edit], unrelated: list[lp.Ask]) -> Iterator[tuple[str, str, lp.Edit]]:
    """(kind, question, fact)."""
    for i, edit in enumerate(edits):
        yield "edit", edit.prompt, edit
        for text in edit.rephrases[:1]:
            yield "rephrase", text, edit
        for kind, asks in edit.locality:
            if kind in BESIDE and asks:
                yield kind, asks[0].prompt, edit
        for kind, asks in edit.portability:
            for ask in asks[:1]:
                yield kind, ask.prompt, lp.Edit(edit.prompt, ask.answers[0], edit.subject)
        yield "unrelated", unrelated[i % len(unrelated)].prompt, edit


def answers(lm: lp.LM, data: Path, name: str, scored: int, editor: lp.Editor | None) -> list[dict[str, Any]]:
    """A row for each question and form."""
    edits = read_edits(data / FILES[name])[: FACTS[name]]
    asked = random.Random(0).sample(edits, min(scored, len(edits)))
    rows = [*questions(asked, unseen(data))]
    texts = [question for _, question, _ in rows]
    told = [f"{statement(edit.prompt, edit.target)} {question}" for _, question, edit in rows]
    said = {"none": lp.generate(lm, texts, max_new_tokens=16), "fact_before": lp.generate(lm, told, max_new_tokens=16)}
    fired: dict[str, bool] = {}
    for form, config in FORMS.items():
        try:
            patch = recipe.fit(lm, edits, recipe.Config(**config), editor=editor)
        except lp.BadInput as error:  # no prompt vectors for this model
            print(error)
            continue
        fired = {text: hits[0].fired for text, hits in zip(texts, patch.finder().search(texts), strict=True)}
        with lp.apply(lm, patch):
            said[form] = lp.generate(lm, texts, max_new_tokens=16)
        print(name, form, flush=True)
    return [
        {
            "form": form, "kind": kind, "question": question, "target": edit.target, "answer": answer,
            "unpatched": said["none"][i], "fired": fired[question],
        }
        for form, texts_said in said.items()
        for i, ((kind, question, edit), answer) in enumerate(zip(rows, texts_said, strict=True))
    ]  # fmt: skip


def scores(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares by form and kind. ``alone``: the target and nothing else; ``again``: the target twice or more."""
    table: dict[str, Any] = {}
    for key in dict.fromkeys((row["form"], row["kind"]) for row in rows):
        own = [row for row in rows if (row["form"], row["kind"]) == key]
        pairs = [(normalise(row["answer"]), normalise(row["target"])) for row in own]
        bigrams = [[*pairwise(row["answer"].casefold().split())] for row in own]
        table["/".join(key)] = {
            "n": len(own),
            "stated": mean(answer.startswith(target) for answer, target in pairs),
            "contained": mean(target in answer for answer, target in pairs),
            "alone": mean(answer.rstrip(". ") == target.rstrip(". ") for answer, target in pairs),
            "again": mean(answer.count(target) > 1 for answer, target in pairs),
            "empty": mean(not answer for answer, _ in pairs),
            "distinct_2": mean(len(set(each)) / len(each) if each else 1.0 for each in bigrams),
            "unchanged": mean(row["answer"] == row["unpatched"] for row in own),
            "fired": mean(row["fired"] for row in own),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model")
    parser.add_argument("--sets", nargs="*", choices=FACTS, default=list(FACTS))
    parser.add_argument("--scored", type=int, default=300)
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
            rows = answers(lm, args.data, name, args.scored, editor)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.write_bytes(gzip.compress(text.encode(), mtime=0))
        lines = gzip.decompress(file.read_bytes()).decode().splitlines()
        found[name] = scores([json.loads(line) for line in lines])
        for key, row in found[name].items():
            print(name, key, {measure: round(value, 3) for measure, value in row.items()}, flush=True)
    record = {"made": now(), "versions": versions(), "hardware": hardware(), "editor": editor.hash(), "results": found}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
