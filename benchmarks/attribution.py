"""IRCAN's attribution against the published procedure, both measured in this run, on this machine.

    python benchmarks/attribution.py

writes results/attribution.json. fp32, Gemma-3-270M. The plain side is what released code does: for every layer two
whole forwards for the ends of the way, then for every step a whole forward and backward with logits at every position.
It is timed on four layers at even distances, first and last included, and multiplied up: the backward pass grows
evenly with depth, so their mean is the mean of all. ``--plain-layers 18`` times every one. Its steps run as one batch,
as in released code, where the logits of all of them fit into ``--plain-gb``; else as many at a time as do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter

import torch

import lmpatch as lp
from lmpatch.data.context import ContextRecord
from lmpatch.inference.forward import frozen
from lmpatch.inference.tokens import encode
from lmpatch.models.hooks import Hook, hooked
from lmpatch.models.lm import LM
from lmpatch.probes.integrated_gradients.probe import Case, Config, attributions, cases
from lmpatch.provenance import hardware, now, versions

RESULTS = Path(__file__).parent / "results"
PASSAGE = (
    "The old lighthouse was moved to the mountains when the harbour silted up. Its keeper went along and now counts "
    "the goats that pass instead of the ships. Every evening he climbs the stairs and lights the lamp, though none at "
    "sea can see it any more. The villagers set their clocks by it. In winter the road is closed for weeks, and the "
    "light is all that travellers have. A baker brings him bread on Tuesdays and takes the newspaper back down. They "
    "talk about the weather and about a film that was made there years ago. "
) * 8
FACTS = [("lighthouse", "mountains"), ("keeper", "goats"), ("baker", "bread"), ("film", "winter")]


def records(lm: LM, tokens: int) -> list[ContextRecord]:
    """Questions whose prompts with context are that long."""
    made = []
    for thing, answer in FACTS:
        without_context = f"Question: what about the {thing}? Answer: the"
        words = PASSAGE.split()
        room = tokens - len(encode(lm, f"\n{without_context}").ids)
        while len(encode(lm, " ".join(words)).ids) > max(room, 2):
            words.pop()
        made.append(
            ContextRecord(
                " ".join(words),
                thing,
                answer,
                prompt=f"{' '.join(words)}\n{without_context}",
                without_context=without_context,
            )
        )
    return made


def plain_layer(lm: LM, case: Case, layer: int, steps: int, batch: int) -> torch.Tensor:
    """One layer's endpoint credits [f] as published, so many steps a forward."""
    module = lm.module(lm.layout.downs[layer])
    seen: list[torch.Tensor] = []
    with torch.no_grad(), hooked(Hook(module, lambda _, args: seen.append(args[0]), before=True)):
        for prompt in (case.without_context, case.with_context):
            lm.model(torch.tensor([prompt]))
    start, end = (x.reshape(-1, x.shape[-1])[-1] for x in seen)
    ids = torch.tensor([case.with_context])
    total = torch.zeros_like(start)
    for share in (torch.arange(1, steps + 1) / steps).split(batch):
        leaf = (start + share[:, None] * (end - start)).requires_grad_()  # [batch, f]

        def put(_: object, args: tuple[torch.Tensor, ...], leaf: torch.Tensor = leaf) -> tuple[torch.Tensor]:
            whole = args[0].reshape(len(leaf), -1, args[0].shape[-1])
            return (torch.cat([whole[:, :-1], leaf[:, None]], 1).reshape(args[0].shape),)

        with hooked(Hook(module, put, before=True)):
            p = lm.model(ids.expand(len(leaf), -1)).logits[:, -1].float().softmax(-1)[:, case.label]
        total += (torch.autograd.grad(p.sum(), leaf)[0] * share[:, None]).sum(0)
    return (end - start) / steps * total


def timed(lm: LM, tokens: int, plain_layers: int, gigabytes: float) -> dict[str, object]:
    """Seconds per record on both sides, and how far their scores are apart."""
    cfg = Config()
    found = cases(lm, records(lm, tokens))
    n = lm.layout.n_layers
    layers = sorted({round(i * (n - 1) / max(plain_layers - 1, 1)) for i in range(plain_layers)})
    for _ in attributions(lm, found[:1], Config(steps=1)):  # the first call of anything is slow
        pass
    start = perf_counter()
    (alone,) = attributions(lm, found[:1], cfg)
    single = perf_counter() - start
    start = perf_counter()
    for _ in attributions(lm, found, cfg):
        pass
    batched = (perf_counter() - start) / len(found)
    with frozen(lm):
        start = perf_counter()
        most = max(1, int(gigabytes * 1e9 / (4 * len(found[0].with_context) * lm.layout.vocab)))
        batch = min(cfg.steps, most)
        wanted = torch.stack([plain_layer(lm, found[0], layer, cfg.steps, batch) for layer in layers])
        plain = (perf_counter() - start) / len(layers) * n
    got = alone.scores[0, layers]
    top, reference = (set(x.flatten().topk(cfg.top).indices.tolist()) for x in (got, wanted))
    return {
        "what": f"credits of {sum(lm.layout.widths)} neurons in {n} layers, {cfg.steps} steps",
        "tokens": len(found[0].with_context), "tokens_without_context": len(found[0].without_context),
        "plain_layers": layers, "plain_steps_in_batch": batch, "records_in_batch": len(found),
        "plain_s_per_record": plain, "fast_s_per_record": single, "batched_s_per_record": batched,
        "ratio": plain / single, "batched_ratio": plain / batched,
        "largest_relative_difference": float((got - wanted).abs().max() / wanted.abs().max()),
        "same_top": f"{len(top & reference)}/{len(reference)}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[35, 256])
    parser.add_argument("--plain-layers", type=int, default=4, help="layers the plain side is timed on")
    parser.add_argument("--plain-gb", type=float, default=1.5, help="of logits that a plain forward may hold")
    parser.add_argument("--out", type=Path, default=RESULTS / "attribution.json")
    args = parser.parse_args()
    lm = lp.load(args.model, dtype="float32", device="cpu")
    found: dict[str, object] = {"model": lm.name, "versions": versions(), "hardware": hardware(), "dtype": "float32"}
    for tokens in args.tokens:
        found[str(tokens)] = {"made": now(), **timed(lm, tokens, args.plain_layers, args.plain_gb)}
        print(json.dumps(found[str(tokens)], indent=1), flush=True)
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
