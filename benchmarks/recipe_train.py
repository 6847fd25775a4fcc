"""Train the RECIPE editors that ship with lmpatch.

    python benchmarks/recipe_train.py DATA retrieval          which fact is a question about? For any model (*)
    python benchmarks/recipe_train.py DATA gemma-3-270m       prompt vectors of a model; --out WORK, --set KEY=VALUE
    python benchmarks/recipe_train.py DATA smollm2-135m-instruct

reads counterfact/train, knowedit/wiki_counterfact_train, the second half of knowedit/zsre and of nq, and popqa, whose
questions are asked in other words by the templates below; never an evaluation file, and no fact whose prompt is asked
there. Writes the editor into the package and the curves to results/recipe-train-*.jsonl. Resumable: the same command
goes on where it stopped.

(*) The retrieval that ships is that of 0.1.0, taken out of its editor: of those trained since none knew the plain
rewordings of examples/ as well (docs/log.md).
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

import lmpatch as lp
from lmpatch.config import parse, resolve
from lmpatch.data.edits import read_asks, read_edits
from lmpatch.methods import recipe
from lmpatch.methods.recipe.data import without
from lmpatch.patches.editor import PACKAGED

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
WORDINGS = {
    "What genre is {}?": ("Which genre does {} belong to?", "{} is a work of which genre?", "The genre of {} is"),
    "Who was the producer of {}?": ("Who produced {}?", "By whom was {} produced?", "The producer of {} is"),
    "Who was the director of {}?": ("Who directed {}?", "{} was made by which director?", "{} was directed by"),
    "In what country is {}?": ("Which country is {} in?", "Where is {} located?", "{} is a place in the country of"),
    "In what city was {} born?": ("Where was {} born?", "What is the birthplace of {}?", "{} was born in the city of"),
    "Who is the father of {}?": ("Who is {}'s father?", "{} is whose child?", "The father of {} is"),
    "What is {}'s occupation?": ("What does {} do for a living?", "What is the job of {}?", "The occupation of {} is"),
}
"""How PopQA asks, and the same in other words."""
ELSE = ("When did {} begin?", "How long is {}?", "What is {} best known for?", "Who owns {}?", "How old is {}?")
"""Questions about the same subject that no fact of PopQA answers."""
EVALUATION = (
    "counterfact/eval.jsonl.gz", "knowedit/wiki_counterfact_test.jsonl.gz", "locft/zsre_1500.jsonl.gz",
    "locft/wikibigedit_1500.jsonl.gz",
)  # fmt: skip
"""The packaged editors were trained before the last two stood here: they saw 24 of the first 1,000 facts of locft's
zsRE."""


def questions(file: Path) -> list[lp.Edit]:
    """PopQA's answers as facts. A question about the same subject is to be left alone; its answer only says how many
    tokens are compared."""
    draw, facts = random.Random(0), []
    for ask in read_asks(file):
        for form, others in WORDINGS.items():
            head, tail = form.split("{}")
            if ask.prompt.startswith(head) and ask.prompt.endswith(tail):
                subject = ask.prompt[len(head) : len(ask.prompt) - len(tail)]
                near = draw.choice(ELSE + tuple(other for other in WORDINGS if other != form)).format(subject)
                rephrases = [wording.format(subject) for wording in others]
                locality = {"same subject": [lp.Ask(near, ask.answers)]}
                facts.append(lp.Edit(ask.prompt, ask.answers[0], subject, rephrases=rephrases, locality=locality))
    return facts


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
    kept = without(facts, held)
    asks = read_asks(folder / "nq/nq_locality.jsonl.gz")
    print(f"{len(kept)} of {len(facts)} facts: the others are asked in the evaluation files", flush=True)
    return kept, asks[len(asks) // 2 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("part", help="retrieval, or a model")
    parser.add_argument("--out", type=Path, default=Path("recipe-work"))
    parser.add_argument("--limit", type=int, help="facts, for a trial")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of recipe.Training")
    args = parser.parse_args()
    facts, asks = data(args.data)
    if args.limit:
        facts = random.Random(0).sample(facts, args.limit)
    retrieval = args.part == "retrieval"
    own = {"key_steps": 1000, "prompt_steps": 0} if retrieval else {}
    cfg = resolve(recipe.Training, own | parse(recipe.Training, args.set))
    lm = lp.load("gemma-3-270m" if retrieval else args.part, dtype="bfloat16", device="cpu")
    editor = recipe.train(
        lm, recipe.TrainingData(facts, asks), cfg, out=args.out / args.part,
        progress=lambda done, total, what: print(f"{what} {done}/{total}", flush=True),
    )  # fmt: skip
    editor.save(PACKAGED / f"recipe-{args.part}.safetensors")
    curves = args.out / args.part / ("retrieval.jsonl" if retrieval else "prompts.jsonl")
    shutil.copy(curves, RESULTS / f"recipe-train-{args.part}.jsonl")
    print(editor.summary())


if __name__ == "__main__":
    main()
