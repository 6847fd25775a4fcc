"""Train the RECIPE editors that ship with lmpatch.

    python benchmarks/recipe_train.py DATA retrieval          which fact is a question about? For any model (*)
    python benchmarks/recipe_train.py DATA verifier           does it ask for the fact that was found? On that retrieval
    python benchmarks/recipe_train.py DATA gemma-3-270m       prompt vectors of a model; --out WORK, --set KEY=VALUE
    python benchmarks/recipe_train.py DATA smollm2-135m-instruct

reads counterfact/train, knowedit/wiki_counterfact_train, the second half of knowedit/zsre and of nq, and popqa; facts
of the relations in wordings.json are asked in further words. Never an evaluation file, and no fact whose prompt is
asked there. Writes the editor into the package and the curves to results/recipe-train-*.jsonl. Resumable: the same
command goes on where it stopped.

(*) The retrieval that ships is that of 0.1.0, taken out of its editor: of those trained since none knew the plain
rewordings of examples/ as well (docs/log.md).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import lmpatch as lp
from lmpatch.config import parse, resolve
from lmpatch.data.edits import read_asks, read_edits
from lmpatch.methods import recipe
from lmpatch.patches.editor import PACKAGED, joined, load_editor
from lmpatch.training.facts import without

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
WORDINGS: dict[str, list[str]] = json.loads((ROOT / "benchmarks/wordings.json").read_text())
"""Relation -> forms of prompts that ask for it: those of the data, and others written for this."""
NEAR = (
    {"country", "associated country", "location", "citizenship", "native to", "country of origin", "founded in"},
    {"birthplace", "native to", "location", "headquarters", "workplace", "continent", "founded in"},
    {"occupation", "title", "field", "employer", "position", "sport", "instrument", "genre of music"},
    {"mother tongue", "original language", "official language", "citizenship"},
    {"organisation", "team", "employer", "owner", "developer or maker", "broadcaster"},
    {"producer", "director", "screenwriter", "author", "composer", "developer or maker"},
)
"""Relations of which one may ask for the other."""
FORMS = {form: relation for relation, forms in WORDINGS.items() for form in forms}
POPQA = ("genre of music", "producer", "director", "country", "birthplace", "father", "occupation")
OWN: dict[str, dict[str, int]] = {
    "retrieval": {"key_steps": 1000, "verifier_steps": 800, "prompt_steps": 0},
    "verifier": {"verifier_steps": 800, "prompt_steps": 0},
}
"""Settings of the parts that are for any model."""
EVALUATION = (
    "counterfact/eval.jsonl.gz", "knowedit/wiki_counterfact_test.jsonl.gz", "locft/zsre_1500.jsonl.gz",
    "locft/wikibigedit_1500.jsonl.gz",
)  # fmt: skip
"""The packaged editors were trained before the last two stood here: they saw 24 of the first 1,000 facts of locft's
zsRE."""


def questions(file: Path) -> list[lp.Edit]:
    """PopQA's answers as facts."""
    facts = []
    for ask in read_asks(file):
        for relation in POPQA:
            head, tail = WORDINGS[relation][0].split("{}")
            if ask.prompt.startswith(head) and ask.prompt.endswith(tail):
                subject = ask.prompt[len(head) : len(ask.prompt) - len(tail)]
                facts.append(lp.Edit(ask.prompt, ask.answers[0], subject))
    return facts


def reworded(facts: list[lp.Edit], count: int = 3) -> list[lp.Edit]:
    """The facts of relations in ``WORDINGS``, with ``count`` further wordings and ``count`` questions about the same
    subject that another relation answers; the other facts as they are."""
    draw, found = random.Random(0), []
    for fact in facts:
        own = FORMS.get(fact.prompt.replace(str(fact.subject), "{}"))
        if own:
            far = [name for name in WORDINGS if name != own and not any({name, own} <= near for near in NEAR)]
            forms = [form for form in WORDINGS[own] if form.format(fact.subject) != fact.prompt]
            more = [form.format(fact.subject) for form in draw.sample(forms, count)]
            texts = [draw.choice(WORDINGS[draw.choice(far)]).format(fact.subject) for _ in range(count)]
            # an answer only says how many tokens are compared
            locality = (*fact.locality, ("other relation", tuple(lp.Ask(text, (fact.target,)) for text in texts)))
            fact = replace(fact, rephrases=(*fact.rephrases, *more), locality=locality)
        found.append(fact)
    return found


def data(folder: Path) -> tuple[list[lp.Edit], list[lp.Ask]]:
    """Facts and unrelated questions to train on."""
    zsre = read_edits(folder / "knowedit/zsre.jsonl.gz")
    half = len(zsre) // 2  # the first half is for evaluation
    facts = [
        *read_edits(folder / "counterfact/train.jsonl.gz"),
        *read_edits(folder / "knowedit/wiki_counterfact_train.jsonl.gz"),
        *zsre[half:],
        *questions(folder / "popqa/popqa.jsonl.gz"),
    ]
    held = [edit for name in EVALUATION for edit in read_edits(folder / name)] + zsre[:half]
    kept = without(reworded(facts), held)
    asks = read_asks(folder / "nq/nq_locality.jsonl.gz")
    print(f"{len(kept)} of {len(facts)} facts: the others are asked in the evaluation files", flush=True)
    return kept, asks[len(asks) // 2 :]


def save(editor: lp.Editor, part: str) -> None:
    """Into the package. Prompt vectors are the rest of the retrieval: with a new one they are written anew."""
    if part not in OWN:
        return editor.save(PACKAGED / f"recipe-{part}.safetensors")
    halves = {file: load_editor(file) for file in PACKAGED.glob("recipe-*.safetensors")}
    editor.save(PACKAGED / "recipe-retrieval.safetensors")
    for file, whole in halves.items():
        if whole.on is not None:
            parts = {name: part for name, part in whole.parts.items() if name not in whole.on.parts}
            tensors = {name: tensor for name, tensor in whole.tensors.items() if name not in whole.on.tensors}
            joined(replace(whole, parts=parts, tensors=tensors), editor).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("part", help="retrieval, verifier, or a model")
    parser.add_argument("--out", type=Path, default=Path("recipe-work"))
    parser.add_argument("--limit", type=int, help="facts, for a trial")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of recipe.Training")
    args = parser.parse_args()
    facts, asks = data(args.data)
    if args.limit:
        facts = random.Random(0).sample(facts, args.limit)
    cfg = resolve(recipe.Training, OWN.get(args.part, {}) | parse(recipe.Training, args.set))
    lm = lp.load("gemma-3-270m" if args.part in OWN else args.part, dtype="bfloat16", device="cpu")
    editor = recipe.train(
        lm, recipe.TrainingData(facts, asks), cfg, out=args.out / args.part,
        progress=lambda done, total, what: print(f"{what} {done}/{total}", flush=True),
    )  # fmt: skip
    save(editor, args.part)
    curves = args.out / args.part / f"{args.part if args.part in OWN else 'prompts'}.jsonl"
    shutil.copy(curves, RESULTS / f"recipe-train-{args.part}.jsonl")
    print(editor.summary())


if __name__ == "__main__":
    main()
