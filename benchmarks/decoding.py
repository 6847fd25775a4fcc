"""Context-aware decoding against plain generation of as many rows, both measured in this run, on this machine.

    python benchmarks/decoding.py

writes results/decoding.json. fp32, Gemma-3-270M. Two streams are two rows of every block and of the head, so the fair
measure of what a rule adds is plain generation of a batch of two rows per question. What a question costs more than
without any rule is the ratio to one row. IRCAN's edit of eight columns stands beside them. The other side is what
released code does (IRCAN's loop): for each token two whole calls of one row, without a cache, logits everywhere. All
sides make every step: no answer ends early.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

import lmpatch as lp
from lmpatch.data.context import InContext, render
from lmpatch.inference.generate import Sampling, StopTokens, steps
from lmpatch.inference.interventions import Prompt, Rule, streams
from lmpatch.inference.tokens import encode
from lmpatch.locate.neurons import drawn, scaling
from lmpatch.models.lm import LM
from lmpatch.patches.decode.patch import DecodePatch
from lmpatch.patches.decode.rules import AdaCAD, Arr, Coiecd, Grd, Power
from lmpatch.provenance import hardware, now, versions

RESULTS = Path(__file__).parent / "results"
RULES: dict[str, Rule] = {
    "cad": Power(1.5), "adacad": AdaCAD(0.0), "arr": Arr(), "grd": Grd(0.75), "coiecd": Coiecd(1.0, 4.0),
}  # fmt: skip
PASSAGE = (
    "The old lighthouse was moved to the mountains when the harbour silted up. Its keeper went along and now counts "
    "the goats that pass instead of the ships. Every evening he climbs the stairs and lights the lamp, though none at "
    "sea can see it any more. The villagers set their clocks by it. "
)
THINGS = ("lighthouse", "keeper", "lamp", "harbour", "goats", "ships", "villagers", "stairs")


def questions(count: int) -> list[InContext]:
    asked = [f"What about the {thing}?" for thing in THINGS[:count]]
    return [InContext(render(PASSAGE, question), render("", question)) for question in asked]


@torch.no_grad()
def answers(lm: LM, prompts: list[Prompt], tokens: int) -> list[list[int]]:
    """``generate`` in one batch, without any end."""
    told = streams(lm, prompts)
    ends = StopTokens(lm, ())
    ends.known.clear()
    choice = Sampling()
    new: list[list[int]] = [[] for _ in prompts]
    batch = told.rows
    for step in steps(lm, told, batch, ends, choice, choice.numbers(len(batch), tokens), [False] * len(batch)):
        for i, token in step:
            new[i].append(token)
    return new


@torch.no_grad()
def released(lm: LM, asked: InContext, tokens: int) -> list[int]:
    """CAD of strength 0.5 as IRCAN's code runs it."""
    rows = [encode(lm, text).ids for text in (asked.prompt, asked.without_context)]
    new: list[int] = []
    for _ in range(tokens):
        full, without_context = (lm.model(torch.tensor([[*ids, *new]])).logits[0, -1].float() for ids in rows)
        new.append(int((1.5 * full - 0.5 * without_context).argmax()))
    return new


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return times


def timed(lm: LM, count: int, tokens: int, repeats: int) -> dict[str, object]:
    """Plain and every rule in turns, so that what else the machine does meets all alike."""
    asked: list[Prompt] = list(questions(count))
    rows: list[Prompt] = [one.prompt for one in questions(count)]
    texts: list[Prompt] = [text for one in questions(count) for text in (one.prompt, one.without_context)]
    patches = {name: DecodePatch.make(lm, rule, method=name) for name, rule in RULES.items()}
    answers(lm, texts, 2)  # the first call of anything is slow
    edit = scaling(lm, drawn(lm, 8, 0), 2.0, method="ircan")
    times: dict[str, list[float]] = {"plain": [], "one row": [], "ircan": [], **{name: [] for name in RULES}}
    for _ in range(repeats):
        times["one row"] += seconds(lambda: answers(lm, rows, tokens), 1)
        times["plain"] += seconds(lambda: answers(lm, texts, tokens), 1)
        with lp.apply(lm, edit):
            times["ircan"] += seconds(lambda: answers(lm, texts, tokens), 1)
        for name, patch in patches.items():
            with lp.apply(lm, patch):
                times[name] += seconds(lambda: answers(lm, asked, tokens), 1)
    with lp.apply(lm, patches["cad"]):
        (cached,) = answers(lm, asked[:1], tokens)
    (one,) = questions(1)
    (slow,) = seconds(lambda: released(lm, one, tokens), 1)

    def ratio(to: str) -> dict[str, float]:
        others = {name: each for name, each in times.items() if name not in ("plain", "one row")}
        return {name: median(a / b for a, b in zip(each, times[to], strict=True)) for name, each in others.items()}

    return {
        "what": "seconds over plain generation of two rows per question", "questions": count, "repeats": repeats,
        "new_tokens": tokens,
        "prompt_tokens": [len(encode(lm, text).ids) for text in (one.prompt, one.without_context)],
        "ratio": ratio("plain"), "ratio_to_one_row": ratio("one row"), "plain_s": median(times["plain"]),
        "one_row_s": median(times["one row"]), "cad_s_per_question": median(times["cad"]) / count,
        "released_s_per_question": slow, "released_over_cad": slow / (median(times["cad"]) / count),
        "same_tokens": cached == released(lm, questions(1)[0], tokens),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=20, help="new tokens per answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "decoding.json")
    args = parser.parse_args()
    lm = lp.load(args.model, dtype="float32", device="cpu")
    found: dict[str, object] = {"model": lm.name, "versions": versions(), "hardware": hardware(), "dtype": "float32"}
    for count in args.questions:
        found[f"{count} at once"] = {"made": now(), **timed(lm, count, args.tokens, args.repeats)}
        print(json.dumps(found[f"{count} at once"], indent=1), flush=True)
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
