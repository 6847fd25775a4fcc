"""General ability before and after 1,000 edits, editor by editor.

    python benchmarks/general.py DATA [--only recipe memit]
    python benchmarks/general.py DATA --facts

fits each editor on the same CounterFact evaluation facts, saves the patch under WORK, and asks the tasks in DATA with
and without it: work/general/ (resumable), whose rows are kept in results/general/. With --facts it asks 100 of the
facts instead: general-facts. In bf16: differences are paired, and both sides round alike. Texts do not: of the facts
read the teacher-forced numbers.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from time import perf_counter

from facts import METHODS, QUICK, makers, saved, told, unseen
from tables.rows import WORK

import lmpatch as lp
from lmpatch.benches import facts, general
from lmpatch.data.edits import read_edits
from lmpatch.data.lines import read_text
from lmpatch.methods import recipe
from lmpatch.progress import Progress

TASKS = ("csqa", "anli", "mmlu", "squad", "perplexity")
EDITORS = ("recipe", "memit_alphaedit", "memit", "ft_m")


def patch_of(lm: lp.LM, name: str, edits: list[lp.Edit], data: Path, work: Path) -> lp.Patch:
    """The editor's patch for these facts; one that was saved before is read."""
    editor = recipe.editor_for(lm) if name == "recipe" else None
    folder = work / (f"{name}-{editor.hash()[:8]}-{len(edits)}" if editor else f"{name}-{len(edits)}")
    if folder.exists():
        return lp.load_patch(folder)
    start = perf_counter()
    if editor:
        made: lp.Patch = recipe.fit(lm, edits, recipe.Config(), editor=editor)
    else:
        module, config = METHODS["commit"][name]
        text = read_text(data / "wikitext2/raw_train_part.txt.gz")
        made = makers(module, config, text, [])["make"](lm, edits)
    print(f"{name}: {len(edits)} facts in {perf_counter() - start:.0f} s", flush=True)
    made.save(folder)
    return made


def kept(lm: lp.LM, edits: list[lp.Edit], patch: lp.Patch, name: str, data: Path) -> None:
    """What became of the facts themselves."""
    cfg = facts.Config(n=len(edits), sample=100, **QUICK)
    report = facts.run(
        lm, facts.with_unrelated(edits, unseen(data)), cfg, patch=patch, run_id=name,
        data_name="counterfact/eval", out=WORK / "general-facts",
        progress=partial(told, name),
    )  # fmt: skip
    saved(report, WORK / "general-facts", width=160)


def ability(lm: lp.LM, data: general.Data, patch: lp.Patch, name: str, n: int, out: Path, progress: Progress) -> None:
    """The tasks with and without a patch; n records of each."""
    cfg = general.Config(n=n, tasks=TASKS)
    report = general.run(lm, data, cfg, patch=patch, run_id=name, data_name="public tasks", out=out, progress=progress)
    saved(report, out, width=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="*", choices=EDITORS, default=list(EDITORS))
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--n", type=int, default=200, help="records of a task")
    parser.add_argument("--facts", action="store_true", help="ask the facts, not the tasks")
    parser.add_argument("--work", type=Path, default=Path("general-work"))
    args = parser.parse_args()
    lm = lp.load("gemma-3-270m", dtype="bfloat16", device="cpu")
    edits = read_edits(args.data / "counterfact/eval.jsonl.gz", limit=args.edits)
    if args.facts:
        for name in args.only:
            kept(lm, edits, patch_of(lm, name, edits, args.data, args.work), name, args.data)
        return
    data = general.load(args.data)
    for name in args.only:
        patch = patch_of(lm, name, edits, args.data, args.work)
        ability(lm, data, patch, name, args.n, WORK / "general", partial(told, name))


if __name__ == "__main__":
    main()
