"""Does one edit wreck the model? Single edits with the defaults of rome, memit and finetune.

    python benchmarks/harm.py DATA --model gemma-3-270m
    python benchmarks/harm.py DATA --model smollm2-135m-instruct --only rome rome-bare

writes results/harm-MODEL.jsonl.gz, a row for each edit, and harm-MODEL.json: for each method the largest perplexity
ratio, how many patches are refused, and how many facts are stated, asked as they were written and in other words.
`rome-bare` is the released form of ROME, which divides by the bare prompt's key. Facts are those of counterfact/train,
asked greedily for 8 tokens; what the guard of ``lmpatch.fit`` would refuse is measured all the same. fp32. The model is
loaded once, covariances are shared, values are searched 20 facts at a time, and the same command goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from tables.rows import RESULTS, read_lines, write_lines

import lmpatch as lp
from lmpatch.data.edits import read_edits
from lmpatch.data.lines import read_text
from lmpatch.errors import Diverged, Harmful
from lmpatch.inference.generate import generate
from lmpatch.inference.plain_text import perplexity
from lmpatch.methods import finetune, memit, rome
from lmpatch.models.lm import LM
from lmpatch.patches.guard import LIMIT, check_harm
from lmpatch.patches.ledger import trial
from lmpatch.patches.patch import Patch
from lmpatch.provenance import hardware, now, versions

CHUNK, TOKENS = 20, 8
Row = dict[str, Any]
Make = Callable[[LM, Sequence[lp.Edit]], Iterator[Patch | str]]


def at_once(module: Any, cfg: Any, text: list[str] | None) -> Make:
    """Patches from one batched search."""

    def make(lm: LM, edits: Sequence[lp.Edit]) -> Iterator[Patch | str]:
        try:
            yield from module.fit_each(lm, edits, cfg, text=text)
        except Diverged as error:
            yield from [str(error)] * len(edits)

    return make


def one_by_one(module: Any, cfg: Any) -> Make:
    def make(lm: LM, edits: Sequence[lp.Edit]) -> Iterator[Patch | str]:
        for edit in edits:
            try:
                yield module.fit(lm, [edit], cfg)
            except Diverged as error:
                yield str(error)

    return make


def methods(text: list[str] | None) -> dict[str, Make]:
    return {
        "rome": at_once(rome, rome.Config(), text),
        "memit": at_once(memit, memit.Config(), text),
        "finetune": one_by_one(finetune, finetune.Config()),
        "rome-bare": at_once(rome, rome.Config(key="bare"), text),
    }


def measure(lm: LM, edit: lp.Edit, patch: Patch | str, before: float) -> Row:
    """What one patch does to plain text, and whether it states its fact."""
    row: Row = {"prompt": edit.prompt, "target": edit.target}
    if isinstance(patch, str):
        return row | {"refused": patch, "ratio": None, "stated": None, "reworded": None}
    refused = ""
    try:
        check_harm(lm, patch, before=before)
    except Harmful as error:
        refused = str(error)
    prompts = [edit.prompt, *edit.rephrases[:2]]
    with trial(lm, patch, "bake", strict=False):
        said = [text.strip() for text in generate(lm, prompts, max_new_tokens=TOKENS)]
    right = [any(text.startswith(answer) for answer in edit.answers) for text in said]
    others = sum(right[1:]) / len(right[1:]) if right[1:] else None
    row |= {"ratio": patch.made["perplexity_ratio"], "change": patch.made["change_ratio"], "refused": refused}
    return row | {"stated": right[0], "reworded": others, "said": said[0]}


def summary(rows: Sequence[Row]) -> Row:
    """The numbers of one method; a ratio that is no number counts as infinite."""
    ratios = [math.inf if row["ratio"] is None else row["ratio"] for row in rows]
    kept = [ratio for row, ratio in zip(rows, ratios, strict=True) if not row["refused"]]
    largest, largest_kept = (max(found, default=1.0) for found in (ratios, kept))
    shares = {key: [row[key] for row in rows if row[key] is not None] for key in ("stated", "reworded")}
    return {
        "n": len(rows), "refused": sum(bool(row["refused"]) for row in rows),
        "above_limit": sum(ratio > LIMIT for ratio in ratios),
        "largest_ratio": largest if math.isfinite(largest) else "inf", "largest_ratio_kept": largest_kept,
        "largest_change": max((row.get("change") or 0.0 for row in rows), default=0.0),
        **{key: sum(found) / len(found) if found else None for key, found in shares.items()},
    }  # fmt: skip


def run(lm: LM, edits: Sequence[lp.Edit], makes: dict[str, Make], file: Path, record: Row) -> Row:
    """Every edit under every method; rows are written chunk by chunk.

    Raises:
        SystemExit: the file is of another model.
    """
    kept = file.with_suffix(".jsonl.gz")
    found: Row = json.loads(file.read_text()) if file.exists() else {"summary": {}}
    if found.get("record", {}).get("fingerprint", record["fingerprint"]) != record["fingerprint"]:
        raise SystemExit(f"{file} is of another model. Move it away.")
    found["record"] = record
    rows = read_lines(kept)
    before = perplexity(lm)
    for name, make in makes.items():
        while (done := sum(row["method"] == name for row in rows)) < len(edits):
            chunk, start = edits[done : done + CHUNK], perf_counter()
            new = [measure(lm, edit, patch, before) for edit, patch in zip(chunk, make(lm, chunk), strict=True)]
            seconds = round((perf_counter() - start) / len(chunk), 3)
            rows += [{"method": name} | row | {"seconds": seconds} for row in new]
            write_lines(kept, rows)
            found["summary"][name] = summary([row for row in rows if row["method"] == name])
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=1) + "\n")
            partial.replace(file)
            print(name, json.dumps(found["summary"][name]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--n", type=int, default=300, help="edits")
    parser.add_argument("--only", nargs="*", choices=list(methods(None)), default=["rome", "memit", "finetune"])
    parser.add_argument("--own-text", action="store_true", help="covariances of the model's own samples, the default")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lm = lp.load(args.model, dtype="float32", device="cpu")
    edits = read_edits(args.data / "counterfact/train.jsonl.gz", limit=args.n)
    text = None if args.own_text else read_text(args.data / "wikitext2/raw_train_part.txt.gz")
    record = {
        "made": now(), "model": lm.name, "fingerprint": lm.fingerprint(), "versions": versions(),
        "hardware": hardware(), "dtype": "float32", "limit": LIMIT, "facts": "counterfact/train",
        "text": "own samples" if args.own_text else "wikitext2",
    }  # fmt: skip
    makes = {name: make for name, make in methods(text).items() if name in args.only}
    run(lm, edits, makes, args.out or RESULTS / f"harm-{args.model}.json", record)


if __name__ == "__main__":
    main()
