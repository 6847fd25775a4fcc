"""Generation with patches that act by hooks, over generation without, both measured in this run, on this machine.

    python benchmarks/hook_speed.py [--model gemma-3-270m]

writes results/hook_speed.json. fp32. A codebook of 1,000 keys (GRACE), 1,000 masks (MEMOIR) and 100 neurons (T-Patcher)
are drawn at random: how long they take does not depend on what they hold. Of the first two, one patch fires on every
prompt and one on none. Sides take turns; a ratio is the median over rounds. All sides make every step: no answer ends
early.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

import lmpatch as lp
from lmpatch.inference.generate import Sampling, StopTokens, steps
from lmpatch.inference.interventions import streams
from lmpatch.models.lm import LM
from lmpatch.patches.hook.operation import Operation
from lmpatch.patches.hook.operations.codebook import Codebook
from lmpatch.patches.hook.operations.masked import Masked, packed
from lmpatch.patches.hook.operations.neurons import Neurons
from lmpatch.patches.hook.patch import HookPatch
from lmpatch.provenance import hardware, now, versions

RESULTS = Path(__file__).parent / "results"
FACTS, NEURONS, TOKENS = 1000, 100, 32
PROMPTS = [f"{name} was born in the city of" for name in ("Ada Lovelace", "Alan Turing", "Grace Hopper", "Kurt Gödel")]


def operations(lm: LM) -> dict[str, Operation]:
    """By name, what is measured."""
    source = torch.Generator().manual_seed(0)
    layout, layer = lm.layout, round(lm.layout.n_layers * 7 / 9)
    f, d, down = layout.widths[layer], layout.d_model, layout.downs[layer]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source)

    index, far = torch.arange(FACTS, dtype=torch.int32), torch.zeros(FACTS)
    book = Codebook(
        down, "last", draw(FACTS, f), index[:, None], far, far > 0, 0.01 * draw(FACTS, d), index, torch.zeros(FACTS)
    )
    k = f // 4
    masks = packed(draw(FACTS, f).argsort(1).argsort(1) < k)
    whole = Masked(
        down, k, torch.zeros(f), torch.arange(f, dtype=torch.int32), 1e-4 * draw(1, d, f), masks,
        torch.zeros(FACTS, dtype=torch.int32), torch.full((FACTS,), k, dtype=torch.int32),
    )  # fmt: skip
    near = {
        "grace": Codebook(**{**vars(book), "epsilon": torch.full((FACTS,), 1e9)}),
        "memoir": Masked(**{**vars(whole), "least": torch.zeros(FACTS, dtype=torch.int32)}),
    }
    last, up = layout.downs[-1], layout.ups[-1][0]
    neurons = Neurons(last, up, "gelu", draw(2, NEURONS, d) / d, torch.zeros(2, NEURONS), 1e-3 * draw(NEURONS, d))
    return {"grace, none fires": book, "memoir, none fires": whole, "t_patcher": neurons} | {
        f"{name}, all fire": one for name, one in near.items()
    }


@torch.no_grad()
def seconds(lm: LM, prompts: list[str]) -> float:
    """Of one call that generates ``TOKENS`` tokens for each prompt."""
    told, ends, choice = streams(lm, prompts), StopTokens(lm, ()), Sampling()
    ends.known.clear()
    begun = perf_counter()
    for _ in steps(lm, told, told.rows, ends, choice, choice.numbers(len(prompts), TOKENS), [False] * len(prompts)):
        pass
    return perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "hook_speed.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lm = lp.load(given.model)
    patches = {name: HookPatch.make(lm, {}, [one], method="drawn") for name, one in operations(lm).items()}
    table = {}
    for size in (1, len(PROMPTS)):
        times: dict[str, list[float]] = {name: [] for name in ("none", *patches)}
        seconds(lm, PROMPTS[:size])
        for _ in range(given.rounds):
            for name in times:
                with lp.apply(lm, patches[name]) if name in patches else nullcontext():
                    times[name].append(seconds(lm, PROMPTS[:size]))
        table[f"{size} prompts"] = {
            name: {
                "seconds": round(median(own), 4),
                "ratio": round(median(a / b for a, b in zip(own, times["none"], strict=True)), 4),
            }
            for name, own in times.items()
        }
    made = {"model": given.model, "tokens": TOKENS, "facts": FACTS, "neurons": NEURONS, "rounds": given.rounds}
    made |= {"finished": now(), "versions": versions(), "hardware": hardware()}
    given.out.write_text(json.dumps({"made": made, "table": table}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
