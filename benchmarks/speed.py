"""Speed claims as ratios, both sides measured in this run, on this machine.

    python benchmarks/speed.py DATA/counterfact/train.jsonl.gz DATA/wikitext2/raw_train_part.txt.gz

writes results/speed.json. fp32, Gemma-3-270M. The plain sides are what released code does: one fact at a time, full
forwards, logits at every position; one pass over the text per layer, which stops there; one prompt at a time without a
cache. The search is also a share of what the machine's products reach, measured in the same run on the shapes that the
search multiplies and on square ones. `recipe` and `bake` have no plain side: milliseconds an answer with facts in a
memory and without, and seconds to put a patch of 100 facts on and take it off.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import lmpatch as lp
from lmpatch.data.edits import read_edits
from lmpatch.data.lines import read_text
from lmpatch.inference.generate import generate
from lmpatch.inference.tokens import Row, encode
from lmpatch.locate.covariance import accumulate, text_rows
from lmpatch.locate.prefixes import prefixes
from lmpatch.locate.products import bf16_gain
from lmpatch.locate.value_search import search
from lmpatch.methods import recipe, rome
from lmpatch.models.hooks import Hook, Stop, hooked
from lmpatch.models.lm import LM
from lmpatch.patches.weight.delta import LowRank
from lmpatch.provenance import hardware, now, versions

RESULTS = Path(__file__).parent / "results"
LAYER = 5
PARTS = ("answers", "search", "moments", "recipe", "bake")


def plain_search(lm: LM, edit: lp.Edit, cfg: rome.Config) -> torch.Tensor:
    """One fact's value search written down directly: each step a full forward of a padded batch, all logits."""
    told = [
        encode(lm, head + edit.prompt, edit.target, edit.subject)
        for head in prefixes(cfg.short_prefixes, cfg.long_prefixes)
    ]
    rows: list[Row] = [*told, encode(lm, f"{edit.subject} is a", subject=edit.subject)]
    width = max(len(r.ids) for r in rows)
    ids = torch.tensor([[*r.ids, *[0] * (width - len(r.ids))] for r in rows])
    mask = torch.tensor([[1] * len(r.ids) + [0] * (width - len(r.ids)) for r in rows])
    at = torch.tensor([r.subject_last for r in rows])
    module = lm.module(lm.layout.downs[LAYER])
    seen: list[torch.Tensor] = []

    def run(delta: torch.Tensor | None) -> torch.Tensor:
        def hook(_: object, __: object, out: torch.Tensor) -> torch.Tensor:
            seen.append(out.detach()[0, at[0]])
            if delta is None:
                return out
            change = torch.zeros_like(out).index_put((torch.arange(len(rows)), at), delta.expand(len(rows), -1))
            return out + change

        with hooked(Hook(module, hook)):
            out: torch.Tensor = lm.model(input_ids=ids, attention_mask=mask).logits.float()
        return out

    with torch.no_grad():
        base = run(None)[-1, len(rows[-1].ids) - 1].log_softmax(-1)
    norm = seen[0].norm()
    delta = torch.zeros_like(seen[0], requires_grad=True)
    adam = torch.optim.Adam([delta], lr=cfg.lr * float(norm) / len(delta) ** 0.5)
    for _ in range(cfg.steps):
        logits = run(delta)
        loss = cfg.decay * delta.square().sum() / norm**2
        for i, row in enumerate(told):
            want = torch.tensor(row.ids[row.target :])
            loss = loss + F.cross_entropy(logits[i, row.target - 1 : len(row.ids) - 1], want) / len(told)
        p = logits[-1, len(rows[-1].ids) - 1].log_softmax(-1)
        loss = loss + cfg.kl * (p.exp() * (p - base)).sum()
        if loss < cfg.stop:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta.mul_((cfg.clamp * norm / delta.norm()).clamp(max=1))
    return delta.detach()


def product_rate(rows: int, inner: int, outer: int, seconds: float = 1.0) -> float:
    """FLOP/s of fp32 products of that shape: the median of many."""
    x, w = torch.randn(rows, inner), torch.randn(outer, inner)
    times: list[float] = []
    begin = perf_counter()
    while perf_counter() - begin < seconds or len(times) < 5:
        start = perf_counter()
        F.linear(x, w)
        times.append(perf_counter() - start)
    return 2 * rows * inner * outer / median(times)


class Flops(TorchDispatchMode):
    """Counts those of products. PyTorch's own counter follows modules too, and fails where one backward pass runs
    inside another, as in the head's."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def timed_share(lm: LM, edits: list[lp.Edit], cfg: rome.Config) -> dict[str, object]:
    """FLOP of a search over its seconds, as a share of square products: one fact, and all in a batch."""
    square = product_rate(1024, 1024, 1024)
    d, f = lm.layout.d_model, lm.layout.widths[LAYER]
    shapes = {str(rows): product_rate(rows, d, f) for rows in (96, 1536)}  # tokens of one fact's rows, and of a batch
    found: dict[str, object] = {"gemm_gflops": square / 1e9, "mlp_gflops": {k: v / 1e9 for k, v in shapes.items()}}
    for name, facts in (("single", edits[:1]), ("batched", edits)):
        search(lm, facts[:1], [LAYER], cfg)
        seconds = []
        for _ in range(3):
            start = perf_counter()
            search(lm, facts, [LAYER], cfg)
            seconds.append(perf_counter() - start)
        with Flops() as counter:  # type: ignore[no-untyped-call]
            search(lm, facts, [LAYER], cfg)
        flops = counter.total
        found[name] = {
            "facts": len(facts), "gflop_per_fact": flops / len(facts) / 1e9,
            "s_per_fact": median(seconds) / len(facts), "share_of_gemm": flops / median(seconds) / square,
        }  # fmt: skip
    return found


def timed_search(lm: LM, edits: list[lp.Edit], plain: int) -> dict[str, object]:
    """All sides make every step (stop = 0). The plain side's are those of the whole head, as ours once are."""
    cfg = rome.Config(layer=LAYER, stop=0.0, head_tokens=None)
    start = perf_counter()
    wanted = [plain_search(lm, e, cfg) for e in edits[:plain]]
    slow = (perf_counter() - start) / plain
    start = perf_counter()
    alone = [search(lm, [e], [LAYER], cfg).delta[0, 0] for e in edits[:plain]]
    single = (perf_counter() - start) / plain
    start = perf_counter()
    search(lm, edits, [LAYER], cfg)
    batched = (perf_counter() - start) / len(edits)
    apart = max(float((a - b).norm() / b.norm()) for a, b in zip(alone, wanted, strict=True))
    usual = rome.Config(layer=LAYER, stop=0.0)
    shares: dict[str, object] = {"whole head": timed_share(lm, edits, cfg), "short head": timed_share(lm, edits, usual)}
    if bf16_gain(str(lm.device)) > 1:
        shares["short head, bf16 products"] = timed_share(lm, edits, replace(usual, products="bf16"))
    return {
        "what": "ROME value search, 20 steps, 10 prefixes", "plain_facts": plain, "batch_facts": len(edits),
        "plain_s_per_fact": slow, "fast_s_per_fact": single, "batched_s_per_fact": batched,
        "fast_ratio": slow / single, "batched_ratio": slow / batched, "largest_relative_difference_of_delta": apart,
        "bf16_gain": bf16_gain(str(lm.device)), "rates": shares,
    }  # fmt: skip


def timed_moments(lm: LM, text: list[str], tokens: int) -> dict[str, object]:
    rows = text_rows(lm, text, tokens)
    layers = list(range(lm.layout.n_layers))
    start = perf_counter()
    fast, count, _ = accumulate(lm, rows, layers)
    one = perf_counter() - start
    used = len(rows) if count >= (len(rows) - 1) * (rows.shape[1] - 1) else -(-count // (rows.shape[1] - 1))
    start = perf_counter()
    worst = 0.0
    for layer in layers:
        width = lm.layout.widths[layer]
        total = torch.zeros(width, width)

        def add(_: object, args: tuple[torch.Tensor, ...], total: torch.Tensor = total) -> None:
            keys = args[0][:, 1:].flatten(0, 1)  # the start token stays out
            total.addmm_(keys.T, keys)
            raise Stop

        with torch.no_grad(), hooked(Hook(lm.module(lm.layout.downs[layer]), add, before=True)):
            for i in range(0, used, 8):
                with suppress(Stop):
                    lm.model(rows[i : min(i + 8, used)])
        worst = max(worst, float((total / count - fast[layer]).norm() / fast[layer].norm()))
    each = perf_counter() - start
    return {
        "what": "second moments of all layers: one pass, against one per layer that stops there", "tokens": count,
        "plain_s": each, "fast_s": one, "ratio": each / one, "largest_relative_difference": worst,
    }  # fmt: skip


def timed_answers(lm: LM, prompts: list[str], plain: int, tokens: int) -> dict[str, object]:
    """What the bench spends its time on: greedy answers."""
    start = perf_counter()
    wanted = []
    for prompt in prompts[:plain]:
        ids = list(encode(lm, prompt).ids)
        new: list[int] = []
        for _ in range(tokens):
            with torch.no_grad():
                token = int(lm.model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == lm.tokenizer.eos_token_id or "\n" in lm.tokenizer.decode([token]):
                break
            new.append(token)
        wanted.append(lm.tokenizer.decode(new))
    slow = (perf_counter() - start) / plain
    start = perf_counter()
    texts = generate(lm, prompts, max_new_tokens=tokens)
    fast = (perf_counter() - start) / len(prompts)
    same = sum(a == b for a, b in zip(texts, wanted, strict=False))
    return {
        "what": f"bench answers of {tokens} tokens: batched with a cache against one prompt at a time without",
        "plain_prompts": plain, "prompts": len(prompts), "plain_s_per_prompt": slow, "fast_s_per_prompt": fast,
        "ratio": slow / fast, "same_text": f"{same}/{plain}",
    }  # fmt: skip


def timed_recipe(lm: LM, edits: list[lp.Edit], tokens: int) -> dict[str, object]:
    """Answers one at a time, as a server gives them: without a patch, and with the facts in a memory."""
    patch = recipe.fit(lm, edits, recipe.Config(), editor=recipe.editor_for(lm))
    prompts = [edit.prompt for edit in edits]

    def each() -> list[float]:
        times = []
        for prompt in prompts:
            start = perf_counter()
            generate(lm, prompt, max_new_tokens=tokens)
            times.append(perf_counter() - start)
        return times

    each()
    plain = each()
    with lp.apply(lm, patch):
        each()
        asked = each()
    return {
        "what": f"answers of {tokens} tokens at most, one at a time, {len(edits)} facts in the memory",
        "plain_ms": 1e3 * median(plain), "recipe_ms": 1e3 * median(asked),
        "more_ms": 1e3 * median(b - a for a, b in zip(plain, asked, strict=True)),
    }  # fmt: skip


def timed_bake(lm: LM, facts: int, repeats: int = 7) -> dict[str, object]:
    """Putting a patch of that many facts on four layers' weights, and taking it off; the best of some."""
    draw, d = torch.Generator().manual_seed(0), lm.layout.d_model
    deltas = {}
    for layer in range(2, 6):
        b = 1e-3 * torch.randn(d, facts, generator=draw)
        a = torch.randn(facts, lm.layout.widths[layer], generator=draw)
        deltas[lm.layout.weight(lm.layout.downs[layer])] = LowRank(b, a)
    patch = lp.WeightPatch.make(lm, deltas, method="memit")
    on, off = [], []
    for _ in range(repeats):
        start = perf_counter()
        applied = lp.apply(lm, patch, mount="bake")
        middle = perf_counter()
        applied.remove()
        on.append(middle - start)
        off.append(perf_counter() - middle)
    return {"what": f"bake and remove {facts} facts on four layers", "bake_s": min(on), "remove_s": min(off),
            "both_s": min(on) + min(off)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("facts")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=40_000, help="tokens of text for the second moments")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="keep the others' figures")
    args = parser.parse_args()
    lm = lp.load("gemma-3-270m", dtype="float32", device="cpu")
    edits = read_edits(args.facts, limit=20)
    prompts = [p for e in read_edits(args.facts, limit=64) for p in (e.prompt, *e.rephrases)]
    out = RESULTS / "speed.json"
    found: dict[str, object] = json.loads(out.read_text()) if args.only and out.exists() else {}
    found |= {"versions": versions(), "hardware": hardware(), "dtype": "float32"}
    runs: dict[str, Callable[[], dict[str, object]]] = {
        "answers": lambda: timed_answers(lm, prompts, 6, 32),
        "search": lambda: timed_search(lm, edits, 3),
        "moments": lambda: timed_moments(lm, read_text(args.text), args.tokens),
        "recipe": lambda: timed_recipe(lm, read_edits(args.facts, limit=100), 16),
        "bake": lambda: timed_bake(lm, 100),
    }
    for name in args.only or PARTS:
        found[name] = {"made": now(), **runs[name]()}
        print(json.dumps(found[name], indent=1), flush=True)
        out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
