"""Speed claims as ratios, both sides measured in this run, on this machine.

    python benchmarks/speed.py DATA/counterfact/train.jsonl.gz DATA/wikitext2/raw_train_part.txt.gz

writes results/speed.json. fp32, Gemma-3-270M. The plain sides are what released code does: one fact at a time, full
forwards, logits at every position; one pass over the text per layer; one prompt at a time without a cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch.nn import functional as F

import lmpatch as lp
from lmpatch.data.edits import read_edits
from lmpatch.data.lines import read_text
from lmpatch.inference.generate import generate
from lmpatch.inference.tokens import Row, encode
from lmpatch.locate.covariance import accumulate, text_rows
from lmpatch.locate.prefixes import prefixes
from lmpatch.locate.value_search import search
from lmpatch.methods import rome
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM
from lmpatch.provenance import hardware, now, versions

RESULTS = Path(__file__).parent / "results"
LAYER = 5


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


def timed_search(lm: LM, edits: list[lp.Edit], plain: int) -> dict[str, object]:
    """All sides make every step (stop = 0), so they do the same arithmetic."""
    cfg = rome.Config(layer=LAYER, stop=0.0)
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
    return {
        "what": "ROME value search, 20 steps, 10 prefixes", "plain_facts": plain, "batch_facts": len(edits),
        "plain_s_per_fact": slow, "fast_s_per_fact": single, "batched_s_per_fact": batched,
        "fast_ratio": slow / single, "batched_ratio": slow / batched, "largest_relative_difference_of_delta": apart,
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

        with torch.no_grad(), hooked(Hook(lm.module(lm.layout.downs[layer]), add, before=True)):
            for i in range(0, used, 8):
                lm.model(rows[i : min(i + 8, used)])
        worst = max(worst, float((total / count - fast[layer]).norm() / fast[layer].norm()))
    each = perf_counter() - start
    return {
        "what": "second moments of all layers: one pass, no head, against one full pass per layer", "tokens": count,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("facts")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=40_000, help="tokens of text for the second moments")
    parser.add_argument("--only", nargs="*", choices=["answers", "search", "moments"], help="keep the others' figures")
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
    }
    for name, run in runs.items():
        if not args.only or name in args.only:
            found[name] = {"made": now(), **run()}
            print(json.dumps(found[name], indent=1), flush=True)
            out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
