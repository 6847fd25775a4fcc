"""What a second memit commit saves because factors of the second moments are kept: seconds with and without them.

    python benchmarks/factor.py [--out FILE]

writes results/factor.json. A random Llama-shaped model with MLPs of width 2048, one fact a commit, fp32; the best of
three commits each. "computed" forgets the factors before every commit and writes them again, "kept" reads them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lmpatch as lp
from lmpatch.provenance import hardware

RESULTS = Path(__file__).parent / "results"
WIDTH, LAYERS, RUNS = 2048, 4, 3
WORDS = ["<bos>", "The", "tower", "is", "in", "Rome", "Paris", "a"]


def model() -> lp.LM:
    bpe = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<bos>", pad_token="<bos>")
    shape: dict[str, Any] = dict(hidden_size=64, intermediate_size=WIDTH, num_hidden_layers=LAYERS + 1)
    shape["num_attention_heads"] = 4
    with torch.random.fork_rng():
        return lp.wrap(LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **shape)).eval(), tokenizer, name="random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "factor.json")
    out = parser.parse_args().out
    lm, edit = model(), lp.Edit("The tower is in", "Rome", "tower")
    found: dict[str, Any] = {"width": WIDTH, "layers": LAYERS, "runs": RUNS, **hardware()}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LMPATCH_CACHE"] = cache
        settings: dict[str, Any] = {"layers": tuple(range(LAYERS)), "steps": 1, "long_prefixes": 0}
        settings["moment_tokens"] = 4 * WIDTH
        for solver in ("memit", "alphaedit"):
            seconds: dict[str, list[float]] = {"computed": [], "kept": []}
            hashes = set()
            for kind in ["computed"] * RUNS + ["kept"] * RUNS:
                if kind == "computed":
                    for file in [*Path(cache).rglob("*-cholesky-*"), *Path(cache).rglob("*-eigenvectors-*")]:
                        file.unlink()
                start = perf_counter()
                hashes.add(lp.fit(lm, "memit", [edit], solver=solver, **settings).hash())
                seconds[kind].append(perf_counter() - start)
            assert len(hashes) == 1  # the same patch either way
            found[solver] = {kind: round(min(own), 3) for kind, own in seconds.items()}
    print(json.dumps(found, indent=1))
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
